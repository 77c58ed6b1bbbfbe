"""Import hook that resolves ``mmcv._ext`` to the fallback operators.

``mmcv.ops`` imports its compiled operators from the module ``mmcv._ext`` and fails if there is none. Putting a module
into ``sys.modules`` would be simpler, but it would hide compiled operators and import torchvision with every
``import mmevm``.

Python asks the finders in ``sys.meta_path`` in order. :class:`FallbackFinder` is appended as the last one, so Python
calls it only if neither a compiled ``mmcv/_ext*.so`` nor a file ``mmcv/_ext.py`` exists. It returns a spec for
``ext.py``, which Python executes under the name ``mmcv._ext`` when that name is imported for the first time.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FALLBACK = Path(__file__).with_name('ext.py')


class FallbackFinder:
    """Find ``mmcv._ext`` in ``ext.py``, and no other module."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the fallback operators. The signature is Python's ``MetaPathFinder.find_spec``."""
        if fullname != 'mmcv._ext':
            return None
        return importlib.util.spec_from_file_location(fullname, FALLBACK)


def register() -> None:
    """Use the fallback operators as ``mmcv._ext`` if mmcv has no compiled operators.

    Imports neither mmcv nor the operators. Calling it again has no effect.
    """
    if FallbackFinder not in sys.meta_path:
        sys.meta_path.append(FallbackFinder)
