"""What is wrong with a config, as a sentence."""

import difflib
from collections.abc import Iterable, Sequence

from mmevm.errors import ExplainedError


class ConfigError(ExplainedError):
    """A config that cannot be meant as it is; the message names the key and what to do."""


def some(names: Sequence[str | int], limit: int = 6) -> str:
    """The first few of many names, for a message."""
    return ', '.join(map(repr, names[:limit])) + (', …' if len(names) > limit else '')


def nearest(name: str, names: Iterable[str]) -> str:
    """A question that names what was probably meant, or nothing."""
    others = {other.lower(): other for other in names if other != name}
    near = difflib.get_close_matches(name.lower(), others, n=1)
    return f' (did you mean {others[near[0]]!r}?)' if near else ''
