import pytest
from command_line import ROOT, succeed
from mmengine.config import Config

from mmevm.config_path import find_config, find_root
from mmevm.errors import ConfigError


def test_root_is_the_repository():
    assert find_root() == ROOT
    assert find_config('mmevm::maskrcnn_evm_m4.py') == ROOT / 'configs/maskrcnn_evm_m4.py'


def test_missing_config():
    with pytest.raises(ConfigError, match=rf'^mmevm::none\.py does not exist\. .*{ROOT}/configs'):
        find_config('mmevm::none.py')


@pytest.mark.parametrize('name', ['maskrcnn_evm_m1.py', 'classification/efficientvim-m1_300e_in1k.py'])
def test_base_config_equals_the_file(tmp_path, name):
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = ['mmevm::{name}']\n")
    assert Config.fromfile(own).to_dict() == Config.fromfile(ROOT / 'configs' / name).to_dict()


def test_base_configs_of_other_packages_are_unchanged(tmp_path):
    own = tmp_path / 'own.py'
    own.write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n")
    assert Config.fromfile(own).model.type == 'RetinaNet'


def test_base_configs_of_mmseg_are_found_in_both_distributions(tmp_path):
    pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
    own = tmp_path / 'own.py'
    own.write_text("_base_ = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'\n")
    assert Config.fromfile(own).model.decode_head.type == 'FPNHead'


@pytest.mark.parametrize('order', ['import mmevm, mmengine', 'import mmengine, mmevm'])
def test_any_order_of_imports(tmp_path, order):
    (tmp_path / 'own.py').write_text("_base_ = 'mmevm::_base_/schedule_1x_adamw.py'\n")
    code = f"{order}; from mmengine.config import Config; print(Config.fromfile('own.py').train_cfg.max_epochs)"
    assert succeed('-c', code, cwd=tmp_path).strip().splitlines()[-1] == '12'
