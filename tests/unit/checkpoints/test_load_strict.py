"""Check and load checkpoints of complete models."""

from pathlib import Path
from types import SimpleNamespace

import mmdet
import pytest
import torch
from checkpoint_formats import assert_same, random_weights, timm_state
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.runner import Runner, runner
from torch import nn

from mmevm.checkpoints import (
    CheckpointError,
    check_partial,
    load_strict,
    unwrap_model,
)
from mmevm.registry import MODELS


def small_model(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, classes), nn.BatchNorm1d(classes))


@pytest.fixture
def small_file(tmp_path):
    """A file with the weights of a small model, and these weights."""
    content = {'state_dict': random_weights(small_model().state_dict()), 'meta': {'epoch': 1}}
    torch.save(content, tmp_path / 'x.pth')
    return str(tmp_path / 'x.pth'), content['state_dict']


def test_load_strict_loads_every_tensor(small_file, log):
    path, state = small_file
    model = small_model()
    assert load_strict(model, path)['meta'] == {'epoch': 1}
    assert_same(model.state_dict(), state)
    assert log.messages == [f'Loaded 7/7 tensors of Sequential from {path}.']


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda state: state.pop('0.bias'), r'of 7 tensors, 1 missing \(0\.bias\)\. '),
        (lambda state: state.update({'2.bias': torch.ones(1)}), r'7 tensors, 1 unknown to the model \(2\.bias\)\. '),
        (lambda state: state.update({'0.bias': torch.ones(4)}), r'0\.bias: \(3,\) expected, \(4,\) in the file\)\. '),
        (lambda state: state.update({'0.bias': torch.full((3,), torch.inf)}), r'NaN or infinite values \(0\.bias\)'),
        (lambda state: state.update({'0.bias': torch.ones(3).int()}), r'type torch\.int32'),
        (lambda state: state.clear(), 'The file has no tensors'),
    ],
)
def test_load_strict_loads_everything_or_nothing(small_file, change, problem):
    path, state = small_file
    change(state)
    torch.save({'state_dict': state}, path)
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=problem) as error:
        load_strict(model, path)
    assert path in str(error.value)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(('classes', 'level', 'count'), [(3, 'INFO', 7), (4, 'WARNING', 5)])
def test_check_partial_logs_the_number_of_loaded_tensors(small_file, log, classes, level, count):
    path, state = small_file
    check_partial(nn.Sequential(nn.Linear(2, classes), nn.BatchNorm1d(3)), {'state_dict': state}, path)
    (record,) = log.records
    assert record.levelname == level
    printed = f'Loaded {count}/7 tensors of Sequential from {path}.'
    if classes == 3:
        assert record.message == printed
    else:
        others = ' The others keep their initial weights: 2 of another shape (0.weight: (4, 2) expected,'
        assert record.message.startswith(printed + others)


def test_check_partial_refuses_other_networks_and_invalid_values(small_file):
    path, state = small_file
    with pytest.raises(CheckpointError, match=r'no tensor of Sequential: of 7, 6 missing .* are net\.0\.'):
        check_partial(small_model(), {f'net.{name}': tensor for name, tensor in state.items()}, path)
    with pytest.raises(CheckpointError, match=r'no tensor of Sequential: .*6 of another shape'):  # all except a counter
        check_partial(small_model(4), state, path)
    for content, problem in [([], 'holds a list'), (state | {'0.bias': torch.full((3,), torch.nan)}, 'NaN')]:
        with pytest.raises(CheckpointError, match=problem) as error:
            check_partial(small_model(), content, path)
        assert path in str(error.value)
    check_partial(small_model(), {**state, 'else': torch.tensor(torch.nan)}, path)  # not part of the model


TINY = dict(
    type='mmevm.EfficientViM', arch=dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4)), out_indices=(0, 1)
)


def tiny_detectors() -> tuple[nn.Module, nn.Module]:
    """Return mmdet's Faster R-CNN, and a SoftTeacher with two of them."""
    models = Path(mmdet.__file__).parent / '.mim/configs/_base_/models'
    detector = Config.fromfile(models / 'faster-rcnn_r50_fpn.py').model
    detector.backbone = TINY
    detector.neck = dict(type='mmevm.UpsampleFPN', in_channels=[16, 24], out_channels=8, num_outs=5)
    detector.rpn_head.update(in_channels=8, feat_channels=8)
    detector.roi_head.bbox_roi_extractor.out_channels = 8
    detector.roi_head.bbox_head.update(in_channels=8, fc_out_channels=8)
    preprocessor = dict(type='MultiBranchDataPreprocessor', data_preprocessor=detector.data_preprocessor)
    semi = dict(freeze_teacher=True, cls_pseudo_thr=0.9)
    cfg = dict(type='SoftTeacher', detector=detector, data_preprocessor=preprocessor, semi_train_cfg=semi)
    with torch.random.fork_rng():
        return tuple(MMDET_MODELS.build(dict(model, _scope_='mmdet')) for model in (detector, cfg))


def test_model_that_renames_keys_while_loading(tmp_path, log):
    detector, soft_teacher = tiny_detectors()
    state = random_weights(detector.state_dict())
    before = {name: tensor.clone() for name, tensor in soft_teacher.state_dict().items()}
    log.clear()
    check_partial(soft_teacher, {'state_dict': state}, 'x.pth')
    assert log.messages == [f'Loaded {2 * len(state)}/{2 * len(state)} tensors of SoftTeacher from x.pth.']
    assert_same(soft_teacher.state_dict(), before)  # mmengine loads them after the check

    torch.save({'state_dict': state}, tmp_path / 'x.pth')
    load_strict(soft_teacher, str(tmp_path / 'x.pth'))
    assert_same(soft_teacher.teacher.state_dict(), state)
    assert_same(soft_teacher.student.state_dict(), state)

    for change, problem in [
        (
            {'neck.fpn_convs.0.conv.bias': torch.ones(3)},
            r'2 of another shape .*teacher\.neck\.fpn_convs\.0\.conv\.bias: \(8',
        ),
        ({'neck.fpn_convs.0.conv.bias': torch.full((8,), torch.nan)}, r'NaN .*teacher\.neck\.fpn_convs\.0\.conv\.bias'),
        ({'surprise': torch.ones(1)}, r'2 unknown to the model .*teacher\.surprise'),
    ]:
        torch.save({'state_dict': {**state, **change}}, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=problem):
            load_strict(soft_teacher, str(tmp_path / 'x.pth'))
    with pytest.raises(CheckpointError, match='has no tensor of SoftTeacher'):
        check_partial(soft_teacher, {f'net.{name}': tensor for name, tensor in state.items()}, 'x.pth')


def test_training_of_a_model_that_renames_keys_while_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'collect_env', dict)
    detector, soft_teacher = tiny_detectors()
    state = random_weights(detector.state_dict())
    torch.save({'state_dict': state}, tmp_path / 'x.pth')
    made = Runner(
        soft_teacher,
        str(tmp_path),
        load_from=f'safe://{tmp_path}/x.pth',
        custom_hooks=[dict(type='mmevm.CheckpointCheckHook')],
        experiment_name=str(tmp_path),
    )
    made.load_or_resume()
    assert_same(soft_teacher.teacher.state_dict(), state)
    assert_same(soft_teacher.student.state_dict(), state)


class Masked(nn.Sequential):
    """Model with complex weights and with buffers that are not statistics, one of them infinite."""

    def __init__(self, *, ids: bool = True) -> None:
        super().__init__(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.frequencies = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.register_buffer('mask', torch.full((3,), -torch.inf))
        if ids:
            self.register_buffer('position_ids', torch.arange(3))


@pytest.mark.parametrize('load', [load_strict, lambda model, path: check_partial(model, torch.load(path), path)])
def test_buffers_may_have_any_value(tmp_path, log, load):
    path = str(tmp_path / 'x.pth')
    state = Masked().state_dict()
    torch.save(state, path)
    load(Masked(), path)
    torch.save(state | {'mask': torch.ones(3).bool()}, path)
    load(Masked(), path)
    assert {record.levelname for record in log.records} == {'INFO'}
    for name, value, problem in [
        ('1.running_var', torch.full((3,), torch.inf), 'infinite'),
        ('1.running_mean', torch.full((3,), torch.nan), 'NaN'),
        ('1.running_mean', torch.ones(3).int(), 'int32'),
        ('frequencies', torch.full((2,), torch.nan, dtype=torch.complex64), 'NaN'),
        ('0.weight', torch.full((3, 2), 1e300, dtype=torch.double), 'infinite'),
    ]:
        torch.save(state | {name: value}, path)
        with pytest.raises(CheckpointError, match=rf'{problem}.*\({name}\)'):
            load(Masked(), path)


def test_missing_or_additional_constant_buffer_is_a_warning(tmp_path, log):
    path = str(tmp_path / 'x.pth')
    for saved, loaded in [(True, False), (False, True)]:  # as between versions of transformers
        log.clear()
        torch.save(Masked(ids=saved).state_dict(), path)
        load_strict(Masked(ids=loaded), path)
        info, warning = log.records
        assert (warning.levelname, info.levelname) == ('WARNING', 'INFO')
        assert warning.message.startswith(f'{path}: 1 constant buffers')
        assert '(position_ids)' in warning.message
    torch.save({name: t for name, t in small_model().state_dict().items() if 'num_batches' not in name}, path)
    log.clear()
    load_strict(small_model(), path)
    assert [record.levelname for record in log.records] == ['INFO']


def test_timm_classifier_of_mmpretrain(tmp_path, log):
    """TimmClassifier adds a prefix while loading, and removes it from its state dict."""
    cfg = dict(type='TimmClassifier', model_name='efficientvim_m1', pretrained=False, _scope_='mmpretrain')
    state = timm_state('efficientvim_m1')
    torch.save(state, tmp_path / 'x.pth')
    model = MODELS.build(cfg)
    log.clear()
    load_strict(model, str(tmp_path / 'x.pth'))
    assert_same(model.model.state_dict(), state)
    check_partial(model, state, 'x.pth')
    assert [record.levelname for record in log.records] == ['INFO', 'INFO']
    torch.save({name: tensor for name, tensor in state.items() if name != 'norm.0.bias'}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'1 missing \(model\.norm\.0\.bias\)'):
        load_strict(model, str(tmp_path / 'x.pth'))


class CustomLoading(nn.Module):
    """Model that delegates loading to its network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def state_dict(self, *args, **kwargs):
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict=True):
        return self.net.load_state_dict(state_dict, strict)


class WritingData(nn.Linear):
    """Layer that loads into ``.data``, which does not increase the version of a tensor."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.weight.data.copy_(state_dict[f'{prefix}weight'])
        self.bias.data.copy_(state_dict[f'{prefix}bias'])


class Indexed(nn.Linear):
    """Layer with a parameter of integers."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)


@pytest.mark.parametrize('model', [CustomLoading(), WritingData(2, 3), Indexed(2, 3)])
def test_models_with_custom_loading_code(tmp_path, log, model):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / 'x.pth')
    check_partial(model, state, 'x.pth')
    load_strict(model, str(tmp_path / 'x.pth'))
    assert_same(model.state_dict(), state)
    assert {record.levelname for record in log.records} == {'INFO'}


def test_layer_versions_are_passed_to_load_state_dict(tmp_path):
    """Layers of mmdet and torch use them to load files of earlier versions."""

    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            versions.append(local_metadata.get('version'))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    versions = []
    model = nn.Sequential(Versioned(1, 1))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'x.pth')
    load_strict(model, str(tmp_path / 'x.pth'))
    assert set(versions) == {3}
    state = model.state_dict()
    state._metadata = 'invalid'
    check_partial(model, {'state_dict': state}, 'x.pth')
    assert versions[-1] is None


def test_failing_loading_code_of_a_model_is_an_error():
    class Failing(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise ValueError('no pos_embed\nin this file')

    model = Failing(1, 1)
    with pytest.raises(
        CheckpointError, match=r'x\.pth cannot be loaded into Failing \(ValueError: no pos_embed in this file\)\.'
    ):
        check_partial(model, model.state_dict(), 'x.pth')


def test_unwrap_model_removes_the_distributed_wrapper():
    model = small_model()
    assert unwrap_model(SimpleNamespace(model=model)) is model
    assert unwrap_model(SimpleNamespace(model=nn.DataParallel(model))) is model
