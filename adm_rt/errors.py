"""The package's own exceptions. Wrong arguments are plain ``ValueError`` / ``TypeError``."""


class CheckpointError(ValueError):
    """A weight file or model folder is unreadable, damaged, unsafe or of another model."""


class MissingExtraError(ImportError):
    """An optional dependency is needed; the message says how to install it."""


class NonFiniteError(RuntimeError):
    """NaN or infinity appeared where the result would be worthless."""


class SamplingInterrupted(KeyboardInterrupt):
    """Ctrl-C arrived during sampling; nothing half-written is left behind."""


class DataError(ValueError):
    """An image or a data set is missing, damaged, or not of the kind that was asked for."""


class ProcessLostError(RuntimeError):
    """Another process of a distributed run died or stopped answering."""


class EngineError(RuntimeError):
    """An inference library could not build, load or run a network; its own words are in it."""
