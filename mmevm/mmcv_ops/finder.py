"""How Python finds the stand-in: by the last entry of ``sys.meta_path``, asked when nothing else has ``mmcv._ext``."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FALLBACK = Path(__file__).with_name('ext.py')


class FallbackFinder:
    """Answers for the name ``mmcv._ext`` and for no other."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python asks every finder with these arguments."""
        if fullname != 'mmcv._ext':
            return None
        return importlib.util.spec_from_file_location(fullname, FALLBACK)


def register() -> None:
    """Let ``mmcv._ext`` be the stand-in where mmcv has no compiled operators.

    It changes nothing where a compiled ``mmcv/_ext*.so`` or a file ``mmcv/_ext.py`` exists, imports neither mmcv nor
    the stand-in, and may be called any number of times.
    """
    if FallbackFinder not in sys.meta_path:
        sys.meta_path.append(FallbackFinder)
