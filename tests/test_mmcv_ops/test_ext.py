import re
from pathlib import Path

import mmcv.ops
import pytest
import torch
from mmengine.utils import digit_version

import mmevm
from mmevm.mmcv_ops import ext

TABLE = Path(mmevm.__file__).parents[1] / 'docs' / 'mmcv_ops.md'


def rows() -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in TABLE.read_text(encoding='utf-8').splitlines() if line.startswith('| `')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r'`(\w+)`', cell)


def test_the_table_lists_every_function_once() -> None:
    documented = [name for row in rows() for name in names(row[-1])]
    assert sorted(documented) == sorted(ext.__all__)


@pytest.mark.parametrize('row', rows(), ids=lambda row: row[0])
def test_documented_operators_exist(row: list[str]) -> None:
    younger = {'line_nms'} if digit_version(mmcv.__version__) < digit_version('2.3') else set()
    assert all(hasattr(mmcv.ops, name) for name in names(row[0]) if name not in younger)
    assert (row[3] == 'yes') == any('backward' in name for name in names(row[-1]))


def test_an_operator_that_is_missing_says_what_to_do() -> None:
    with pytest.raises(
        NotImplementedError, match=r"'nms_rotated' is an operator .* Install an mmcv with its operators"
    ):
        mmcv.ops.nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)


def test_module_attributes_are_not_operators() -> None:
    with pytest.raises(AttributeError, match='__path__'):
        ext.__path__  # noqa: B018
