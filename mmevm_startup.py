"""Import mmevm when a program first imports mmengine.

Python imports this module at startup because mmevm.pth, in site-packages, says so. mmevm/import_hooks.py says why.
"""

import sys
from contextlib import suppress


class _Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname == 'mmengine' and 'mmevm' not in sys.modules:
            # Installation errors are raised when a config uses mmevm; other programs must run.
            with suppress(Exception):
                import mmevm  # noqa: F401


sys.meta_path.insert(0, _Finder)
