import sys
from pathlib import Path

import mmevm  # noqa: F401 - before anything that imports mmcv.ops, as in tools/

sys.path.insert(0, str(Path(__file__).parent))  # helpers shared by test files, such as randomise.py
