"""The errors a caller's input can cause.

Each is a `ValueError` whose message is one sentence: what is wrong, where, and what to do about it.
The command line prints that sentence and exits with status 2.
"""


class InputError(ValueError):
    """Something the caller supplied cannot be used; the base of the errors below."""


class ConfigError(InputError):
    """A model configuration that is malformed or that this architecture cannot run."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsafe, or not the model its config describes."""


class PromptError(InputError):
    """A prompt or a generation option that cannot be used."""
