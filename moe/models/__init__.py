"""Whole models: the decoder, its decoding engine, checkpoints and tokenizers."""
