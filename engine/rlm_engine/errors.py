"""What can go wrong for a person, each with the exit code the command line gives it."""


class EngineError(Exception):
    """Base of all errors whose text is written for the person at the terminal: what, where, what to do."""

    exit_code = 1


class UsageError(EngineError):
    """A setting that cannot be (impossible sampling values, an unknown option value)."""

    exit_code = 2


class ModelError(EngineError):
    """A model that cannot be loaded or that produces numbers nobody can use."""

    exit_code = 3


class InputError(EngineError):
    """A prompt or file that is refused: too long, empty, not text."""

    exit_code = 4
