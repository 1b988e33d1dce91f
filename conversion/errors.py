"""The error of a conversion that cannot go on although its source is sound: see also `CheckpointError`."""


class ConversionError(ValueError):
    """What was asked for cannot be done: a destination in use, no space, a value that the dtype cannot hold."""
