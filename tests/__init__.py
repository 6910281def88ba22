"""A package of its own: some of the peers in extra `parity` install a top-level package `tests` too."""
