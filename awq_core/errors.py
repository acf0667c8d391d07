"""Every error a user can meet, each carrying what to try next and the exit code the command line answers with.

Exit codes: 1 failed, 2 usage, 3 no plugin or an ambiguous one, 4 plugin broken, 5 quality gate failed.
"""

from __future__ import annotations


class AwqError(Exception):
    """A failure with a one-line remedy.

    Args:
        message: what went wrong and where (file, tensor or layer), in one line.
        hint: the next thing to try; printed after the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(AwqError):
    """A setting that cannot be honoured: unknown key, impossible group size, unknown component."""

    exit_code = 2


class UnsupportedModelError(AwqError):
    """No installed plugin claims the model."""

    exit_code = 3


class PluginConflictError(AwqError):
    """Two installed plugins claim the same model and the user has not said which to use."""

    exit_code = 3


class PluginError(AwqError):
    """A plugin raised or returned something of the wrong type; names plugin, distribution, version and hook."""

    exit_code = 4


class PlanError(AwqError):
    """The declared scale groups do not fit the model: a path matches nothing, or a fold would change its function."""

    exit_code = 4


class CheckpointError(AwqError):
    """A model folder that cannot be read: missing or truncated shard, wrong dtype or shape, NaN or inf."""


class CalibrationError(AwqError):
    """Calibration data that cannot be used: empty, too short, not UTF-8, unknown format."""


class OutputError(AwqError):
    """The result cannot be written: folder not empty, disk full."""


class NumericsError(AwqError):
    """NaN or inf appeared in weights, activations or scales; the message names the tensor."""
