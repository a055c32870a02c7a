"""The error hierarchy. Every message says what was found, where, and how to fix it."""

from __future__ import annotations


class RFDETRError(Exception):
    """Base class of every error that this package raises on purpose.

    `transient` tells whether the same call may succeed later, without a change by the user.
    """

    transient = False


class ConfigError(RFDETRError, ValueError):
    """A configuration value, or a combination of values, that cannot work."""


class CheckpointError(RFDETRError, ValueError):
    """A checkpoint that is corrupt, refused for safety, or does not fit the model."""


class DownloadError(RFDETRError, OSError):
    """Published weights that could not be downloaded."""

    transient = True


class DatasetError(RFDETRError, ValueError):
    """A dataset folder or annotation file that cannot be read as requested."""


class InputError(RFDETRError, ValueError):
    """An image, batch or target that the network cannot process."""


class NonFiniteLossError(RFDETRError, ValueError):
    """A loss term became NaN or infinite; names the term, the step and the images."""


class MissingDependencyError(RFDETRError, ImportError):
    """An optional package that a requested feature needs is not installed."""
