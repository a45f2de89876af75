"""The errors a user of proxbit can meet. Each says what is wrong, where, and what would be valid."""

__all__ = [
    "ActivationError",
    "CardError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HubError",
    "LatentError",
    "LossError",
    "MissingPackageError",
    "ModelStateError",
    "MuRangeError",
    "PackedFormatError",
    "PatternError",
    "ProcessLostError",
    "ProxbitError",
    "UnknownNameError",
]


class ProxbitError(ValueError):
    """Base of every error that proxbit raises on purpose."""


class UnknownNameError(ProxbitError):
    """A name that no registry entry has, or one that is already taken."""


class ConfigError(ProxbitError):
    """A configuration field with a value, or a combination of values, that cannot work."""


class PatternError(ProxbitError):
    """A module pattern that matches nothing, or a selection that cannot be converted."""


class ModelStateError(ProxbitError):
    """A model that is not in the state (float, latent, packed) that the call needs."""


class DataError(ProxbitError):
    """Pictures or labels that a model cannot be trained or evaluated with."""


class LatentError(ProxbitError):
    """Latent weights that cannot be binarized: NaN, infinite, or a row that is all zero."""


class LossError(ProxbitError):
    """A training that cannot go on: a loss, or a weight after a step, that is NaN or infinite."""


class MissingPackageError(ProxbitError, ImportError):
    """A package that is not installed, and that only some parts of proxbit need."""


class ActivationError(ProxbitError):
    """Activations that cannot be quantized: NaN, infinite, or one constant."""


class MuRangeError(ProxbitError):
    """A sharpness `mu` outside the range of its quantizer pair, or a schedule that leaves it."""


class PackedFormatError(ProxbitError):
    """A packed tensor that breaks the format: dtype, shape, padding bits or scales."""


class ProcessLostError(ProxbitError):
    """Another process of a distributed training has ended, or cannot be reached."""


class CardError(ProxbitError):
    """A quantization card, or a record of a run, with fields that are missing, unknown, or contradict each other."""


class CheckpointError(ProxbitError):
    """A checkpoint on disk that is incomplete, damaged, or of a newer format."""


class HubError(ProxbitError):
    """An upload that the Hub refused, or that did not reach it."""
