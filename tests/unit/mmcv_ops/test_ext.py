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
    """Return the cells of each row of the table."""
    lines = [line for line in TABLE.read_text(encoding='utf-8').splitlines() if line.startswith('| `')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r'`(\w+)`', cell)


def test_docs_list_every_function_once() -> None:
    documented = [name for row in rows() for name in names(row[-1])]
    assert sorted(documented) == sorted(ext.__all__)


@pytest.mark.parametrize('row', rows(), ids=lambda row: row[0])
def test_documented_operators_exist_in_mmcv(row: list[str]) -> None:
    newer = {'line_nms'} if digit_version(mmcv.__version__) < digit_version('2.3') else set()
    assert all(hasattr(mmcv.ops, name) for name in names(row[0]) if name not in newer)
    assert (row[3] == 'yes') == any('backward' in name for name in names(row[-1]))


def test_unsupported_operator_raises_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match=r"'nms_rotated' .* Install an mmcv with compiled operators"):
        mmcv.ops.nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)


def test_message_for_unsupported_operator() -> None:
    with pytest.raises(NotImplementedError) as error:
        ext.border_align_forward(torch.rand(2, 5), pool_size=10)
    assert re.fullmatch(
        r'mmcv has no compiled operators, and the fallback operators of mmevm do not include '
        r"'border_align_forward' \(docs/mmcv_ops\.md .*\)\. Install an mmcv with compiled operators: a wheel for your "
        r'versions of torch and CUDA, or a build from source with a C\+\+ compiler, MMCV_WITH_OPS=1 and pip install '
        r'--no-build-isolation\.',
        str(error.value),
    )


def test_compiler_versions_for_environment_reports() -> None:
    assert mmcv.ops.get_compiler_version() == 'none (fallback operators of mmevm)'
    assert mmcv.ops.get_compiling_cuda_version() == 'not available'


def test_module_attributes_are_not_operators() -> None:
    with pytest.raises(AttributeError, match='__path__'):
        ext.__path__  # noqa: B018
