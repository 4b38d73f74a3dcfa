"""What ganscale raises for users: one readable line that says what is wrong and what to do.

Programming errors are asserts; these are for people. The command line prints the message
alone and maps the class to an exit code.
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "GanscaleError", "TrainingFault"]


class GanscaleError(Exception):
    """A failure with a message meant for the user (exit code 1)."""


class ConfigError(GanscaleError, ValueError):
    """A wrong setting or wrong use of a command (exit code 2)."""


class DataError(GanscaleError):
    """A data set is missing, damaged or of the wrong kind (exit code 1)."""


class CheckpointError(GanscaleError):
    """A checkpoint or snapshot is missing or damaged (exit code 1)."""


class TrainingFault(GanscaleError):
    """Training went wrong and `guard.policy` says to end it (exit code 1)."""
