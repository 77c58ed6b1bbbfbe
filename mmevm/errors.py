"""Errors that a person can act on."""


class ExplainedError(RuntimeError):
    """Its message says what is wrong, where, and what to do: the command lines print that alone, and exit with 1."""
