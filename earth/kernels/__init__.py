"""Kernels: one meaning, several implementations, chosen by the platform being lowered for."""
