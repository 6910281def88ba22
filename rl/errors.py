"""What goes wrong in `rl`, by kind. Every message names the value and the remedy."""


class RLError(ValueError):
    """Base of this package's errors."""


class ObjectiveError(RLError):
    """Arrays or settings that no objective can be computed from."""
