"""Errors whose message is written for the user. The command lines print it alone and exit with status 1."""


class UserError(RuntimeError):
    """The message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A config, a command line or its data cannot be used. The message names the key and what to change."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, is not recognised or does not hold what it must; the message says what to do."""


class EngineError(UserError):
    """An inference engine is not installed, or does not support the requested dtype, device or mode."""
