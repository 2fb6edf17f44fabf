"""The exceptions a person may see, and the exit code each one ends a command with.

    ParaxisError            1    anything we refuse or give up on, said in one readable message
    |-- ConfigError        78    a setting, layout or recipe that cannot be run as asked
    |-- DataError          65    missing, empty or broken training data or tokenizer
    |-- CheckpointError    77    a missing, foreign or damaged checkpoint
    |-- StorageError       74    a folder that cannot be written, or a full disk
    |-- TrainingError      70    a run that cannot go on (non-finite steps, a lost rank)
    `-- Preempted          75    stopped on request with its state saved; start it again to continue

An error's message names the field, the value, the rule and the next move. Asserts are for what only we can break.
"""


class ParaxisError(Exception):
    """Something a person can act on; the command line prints its message without a traceback."""

    exit_code = 1
    said: bool | None = None  # whether another rank says the same; None where the ranks could not agree on who does


class ConfigError(ParaxisError):
    """A setting, layout or recipe that cannot be run as asked."""

    exit_code = 78


class DataError(ParaxisError):
    """Missing, empty or broken training data or tokenizer."""

    exit_code = 65


class CheckpointError(ParaxisError):
    """A missing, foreign or damaged checkpoint."""

    exit_code = 77


class StorageError(ParaxisError):
    """A folder that cannot be written, or a full disk."""

    exit_code = 74


class TrainingError(ParaxisError):
    """A run that cannot go on: too many non-finite steps, or a lost rank."""

    exit_code = 70


class Preempted(ParaxisError):
    """Stopped on request (SIGTERM, Ctrl-C, SIGUSR1) after its state was saved; the same command continues it."""

    exit_code = 75
