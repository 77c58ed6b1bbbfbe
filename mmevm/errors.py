"""Errors for the user. The message says what is wrong, where and what to do; the tools print it without a traceback."""


class UserError(RuntimeError):
    """Base class. The tools print the message and exit with status 1."""


class ConfigError(UserError):
    """A config, a command line or a dataset cannot be used. The message names the key and what to change."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, has an unknown format or lacks tensors."""
