"""BCCD, a real dataset in Pascal VOC format: a folder that the environment variable BCCD names."""

import os
from pathlib import Path

import pytest
from command_line import ROOT

BCCD = Path(os.environ.get('BCCD', ROOT.parent / 'shared/bccd'))
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f'{BCCD} does not exist; set BCCD to the folder of BCCD')
