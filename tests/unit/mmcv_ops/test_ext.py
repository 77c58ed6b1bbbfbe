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


def test_the_advice_about_a_missing_operator_is_whole() -> None:
    with pytest.raises(NotImplementedError) as error:
        ext.border_align_forward(torch.rand(2, 5), pool_size=10)
    assert re.fullmatch(
        r"'border_align_forward' is an operator of mmcv's compiled module mmcv\._ext, which this mmcv came without, "
        r"and mmevm's stand-in does not have it \(docs/mmcv_ops\.md lists .*\)\. Install an mmcv with its operators: "
        r'a wheel made for your versions of torch and CUDA, or a build from source with a C\+\+ compiler, '
        r"MMCV_WITH_OPS=1 and pip's --no-build-isolation\.",
        str(error.value),
    )


def test_environment_reports_name_the_stand_in_and_no_cuda() -> None:
    assert mmcv.ops.get_compiler_version() == "none (mmevm's stand-in for mmcv._ext)"
    assert mmcv.ops.get_compiling_cuda_version() == 'not available'


def test_module_attributes_are_not_operators() -> None:
    with pytest.raises(AttributeError, match='__path__'):
        ext.__path__  # noqa: B018
