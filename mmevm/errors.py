"""Errors whose message is written for the user. The command lines print it alone and exit with status 1."""


class ExplainedError(RuntimeError):
    """The message says what is wrong, where, and what to do."""


class ConfigError(ExplainedError):
    """A config, a command line or its data cannot be used. The message names the key and what to change."""
