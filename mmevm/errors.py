"""Errors with messages for the user. The command-line tools print the message alone and exit with status 1."""


class UserError(RuntimeError):
    """Base class: the message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A config, a command line or its data cannot be used; the message names the key and what to change."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, is not recognized or lacks tensors; the message says what to do."""


class ExportError(UserError):
    """A model cannot be exported, or the exported file does not agree with the model; the message says where."""


class EngineError(UserError):
    """An inference engine is not installed, or does not support the requested dtype, device or mode."""
