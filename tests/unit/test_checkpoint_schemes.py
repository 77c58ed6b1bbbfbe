import pytest
import torch
from command_line import succeed
from mmengine.runner.checkpoint import CheckpointLoader

from mmevm.errors import CheckpointError


@pytest.mark.parametrize('order', ['import mmevm, mmengine.runner', 'import mmengine.runner, mmevm'])
def test_import_of_mmevm_registers_the_schemes(tmp_path, order):
    torch.save(dict(state_dict=dict(weight=torch.ones(3))), tmp_path / 'weights.pth')
    code = (
        f'{order}; from mmengine.runner.checkpoint import CheckpointLoader\n'
        "print(CheckpointLoader.load_checkpoint('safe://weights.pth')['state_dict']['weight'].sum().item())"
    )
    assert succeed('-c', code, cwd=tmp_path).splitlines()[-1] == '3.0'


@pytest.mark.parametrize(
    ('scheme', 'message'),
    [('timm://', 'is not a name of EfficientViM weights'), ('safe://', 'none'), ('resume://', 'none')],
)
def test_errors_of_the_loaders(scheme, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointLoader.load_checkpoint(f'{scheme}none')
