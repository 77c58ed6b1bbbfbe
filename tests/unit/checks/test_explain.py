import pytest
from mmcv.transforms import BaseTransform
from mmdet.models import FPN
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.utils import is_installed

from mmevm.checks import explain_errors
from mmevm.checks.hook import CheckHook
from mmevm.errors import ConfigError

DATASET = 'train_dataloader.dataset'
NECK = 'model.neck.in_channels'

# ruff: noqa: E501
MISTAKES = [
    ('model.backbone.ach', 'm4', "model.backbone.ach: EfficientViM has no argument 'ach' (did you mean 'arch'?); it accepts"),
    ('model.backbone.arch', 'm5', "model.backbone.arch='m5' is unknown: choose from ['m1', 'm2', "),
    ('model.backbone.out_indices', (0, 3), 'model.backbone.out_indices=(0, 3): give one or more of [0'),
    ('model.backbone.out_strides', (8, 24), 'model.backbone.out_strides=(8, 24): give one or more of [2, 4, 8, 16, 32, 64], each once, ascending.'),
    ('model.backbone.out_strides', (8, 16, 32), f'{NECK}=[128, 192, 320] does not match the output channels [64, 128, 192] of model.backbone. Set {NECK}=[64, 128, 192].'),
    ('model.backbone.type', 'mmevm.EfficentViM', "model.backbone.type='mmevm.EfficentViM' is not registered. Did you mean 'mmevm.EfficientViM'?"),
    ('model.backbone.type', 'EfficientViM', "model.backbone.type='EfficientViM' is not registered. Did you mean 'mmevm.EfficientViM'?"),
    ('model.backbone.mixer_cfg', dict(type='mmevm.HSMSSD', expand=2), "model.backbone.mixer_cfg.expand: HSMSSD has no argument 'expand' (did you mean 'ssd_expand'?)"),
    ('model.backbone.arch', 'm4', f'{NECK}=[128, 192, 320] does not match the output channels [224, 320, 512] of model.backbone. Set {NECK}=[224, 320, 512].'),
    ('model.neck', dict(type='FPN', in_channels=[256, 512, 1024], out_channels=64, num_outs=5), f"{NECK}=[256, 512, 1024] does not match the output channels [128, 192, 320] of model.backbone. Replace the neck: model.neck=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[128, 192, 320], num_upsamples=2, out_channels=64, num_outs=5)."),
    ('model.neck', dict(type='FPN', in_channels=[256, 512, 1024], start_level=1, add_extra_convs='on_input', out_channels=64, num_outs=5), f"{NECK}=[256, 512, 1024] does not match the output channels [128, 192, 320] of model.backbone. Replace the neck: model.neck=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[128, 192, 320], num_upsamples=1, out_channels=64, num_outs=5, add_extra_convs='on_input')."),
    ('model.neck', dict(type=FPN, in_channels=[1, 2, 3], out_channels=64, num_outs=5), f"{NECK}=[1, 2, 3] does not match"),
    ('model.neck', None, 'model.rpn_head.in_channels=64 does not match the output channels [128, 192, 320] of model.backbone. Add a neck'),
    ('model.neck.in_channel', 64, "model.neck.in_channel: UpsampleFPN has no argument 'in_channel' (did you mean 'in_"),
    ('model.neck.num_outs', 4, 'model.neck.num_outs=4: expected at least num_upsamples='),
    ('model.neck.out_channels', 128, 'model.rpn_head.in_channels=64 does not match the output channels [128] of model.neck. Set'),
    ('model.roi_head.bbox_roi_extractor.out_channels', 256, 'model.roi_head.bbox_roi_extractor.out_channels=256 does not match the output channels [64] of model.neck. Set'),
    ('model.roi_head.bbox_head.in_channels', 256, 'model.roi_head.bbox_head.in_channels=256 does not match the output channels [64] of model.roi_head.bbox_roi_extractor. Set'),
    ('model.roi_head.mask_head.in_channels', 256, 'model.roi_head.mask_head.in_channels=256 does not match the output channels [64] of model.roi_head.mask_roi_extractor.'),
    ('model.rpn_head.loss_cls.use_sigmoids', True, "model.rpn_head.loss_cls.use_sigmoids: CrossEntropyLoss has no argument 'use_sigmoids' (did you mean"),
    ('model.rpn_head.loss_cls.type', 'CrossEntropy', "model.rpn_head.loss_cls.type='CrossEntropy' is not registered. Did you mean 'CrossEntropyLoss'?"),
    ('model.train_cfg.rcnn.assigner.pos_iou_th', 0.5, "model.train_cfg.rcnn.assigner.pos_iou_th: MaxIoUAssigner has no argument 'pos_iou_th' (did you mean"),
    ('optim_wrapper.optimizer.learning_rate', 1, "optim_wrapper.optimizer.learning_rate: AdamW has no argument 'learning_rate'"),
    ('optim_wrapper.optimizer.type', 'AdmW', "optim_wrapper.optimizer.type='AdmW' is not registered. Did you mean 'Ad"),
    ('optim_wrapper.clip_gradient', {}, "optim_wrapper.clip_gradient: OptimWrapper has no argument 'clip_gradient'"),
    ('param_scheduler.1.type', 'CosineLR', "param_scheduler.1.type='CosineLR' is not registered."),
    ('train_cfg.max_iter', 3, "train_cfg.max_iter: ResumableIterLoop has no argument 'max_iter' (did you mean"),
    ('train_dataloader.batchsize', 1, "train_dataloader.batchsize: DataLoader has no argument 'batchsize'."),
    (f'{DATASET}.type', 'COCODataset', f"{DATASET}.type='COCODataset' is not registered. Did you mean 'CocoDataset'?"),
    (f'{DATASET}.anno_file', 'x', f"{DATASET}.anno_file: CocoDataset has no argument 'anno_file' (did you mean"),
    (f'{DATASET}.pipeline.2.type', 'Rezise', f"{DATASET}.pipeline.2.type='Rezise' is not registered. Did you mean"),
    (f'{DATASET}.pipeline.2.scales', 3, f"{DATASET}.pipeline.2.scales: Resize has no argument 'scales' (did you mean"),
    ('val_evaluator.metrix', 'bbox', "val_evaluator.metrix: CocoMetric has no argument 'metrix' (did you mean"),
    ('custom_hooks', [dict(type='EMAHok')], "custom_hooks.0.type='EMAHok' is not registered. Did you mean 'EMAHook'?"),
]  # fmt: skip


def put(cfg, key, value):
    *path, last = key.split('.')
    for name in path:
        cfg = cfg[int(name)] if name.isdigit() else cfg[name]
    cfg[last] = value


# MMEngine 0.10.7 cannot write a config of both names and classes.
if not is_installed('onedl-mmengine'):
    MISTAKES = [mistake for mistake in MISTAKES if not (isinstance(mistake[1], dict) and mistake[1].get('type') is FPN)]


@pytest.mark.parametrize(('key', 'value', 'start'), MISTAKES)
def test_mistake(check, detector, key, value, start):
    put(detector, key, value)
    with pytest.raises(ConfigError) as error:
        check(detector)
    assert str(error.value).startswith(start)
    assert '\n' not in str(error.value)


def test_backbone_without_delete(check, detector):
    detector.model.backbone.update(depth=50, num_stages=4, style='pytorch')
    with pytest.raises(
        ConfigError, match=r'^model\.backbone has arguments that EfficientViM does not accept: depth, num_stages, style'
    ) as error:
        check(detector)
    assert 'Add _delete_=True to model.backbone' in str(error.value)


def test_missing_file_is_named_with_its_absolute_path(check, detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detector.val_dataloader.dataset.update(data_root='data/', ann_file='none.json')
    with pytest.raises(ConfigError) as error:
        check(detector)
    assert str(error.value).startswith(
        f'val_dataloader.dataset cannot be read: {tmp_path}/data/none.json does not exist'
    )
    assert f'the current folder is {tmp_path}' in str(error.value)


@pytest.mark.parametrize('text', ['', '{"images": [{"id": 1, "fi', 'no JSON', '[]', '{"annotations": []}'])
def test_unreadable_annotations(check, detector, tmp_path, text):
    detector.train_dataloader.dataset.ann_file = str(tmp_path / 'train.json')
    (tmp_path / 'train.json').write_text(text)
    with pytest.raises(ConfigError, match=f'^{DATASET} cannot be read: {tmp_path}/train.json'):
        check(detector)


def test_annotations_without_area(check, detector, edit):
    edit(lambda coco: coco['annotations'][0].pop('area') and None)
    with pytest.raises(ConfigError, match=r"cannot be read: .*train\.json: KeyError: 'area'"):
        check(detector)


def test_error_in_the_first_training_iteration(check, detector):
    put(detector, NECK, [128, 192, 321])
    with pytest.raises(ConfigError, match=r'^model\.neck\.in_channels=\[128, 192, 321\] does not match'):
        check(detector, check_only=False)


@pytest.mark.parametrize('error', [KeyError('x'), RuntimeError('CUDA out of memory'), ValueError('x=1'), MemoryError()])
def test_unknown_errors_pass(error):
    with pytest.raises(type(error)) as raised, explain_errors(Config(dict(model=dict(type='X'))), CheckHook()):
        raise error
    assert raised.value is error


def test_errors_after_the_first_iteration_pass():
    hook = CheckHook()
    hook.finished = True
    with pytest.raises(TypeError), explain_errors(Config(dict(model=dict(type='X'))), hook):
        raise TypeError("X.__init__() got an unexpected keyword argument 'y'")


@pytest.mark.parametrize(
    'error',
    [
        TypeError("Mine.__init__() got an unexpected keyword argument 'mine'"),
        TypeError("Mine.__init__() missing 1 required positional argument: 'mine'"),
        KeyError('Mine is not in the mmdet::model registry. Please check'),
    ],
)
def test_errors_of_the_users_code_pass(error):
    with pytest.raises(type(error)) as raised, explain_errors(Config(dict(model=dict(type='X'))), CheckHook()):
        raise error
    assert raised.value is error


@TRANSFORMS.register_module()
class FailingTransform(BaseTransform):
    def transform(self, results):
        return int(results, unknown=1)


def test_error_in_a_transform_keeps_its_traceback(check, detector):
    """MMEngine replaces the traceback of a TypeError in a hook."""
    detector.train_dataloader.dataset.pipeline.insert(2, dict(type='FailingTransform'))
    with pytest.raises(TypeError) as error:
        check(detector)
    assert error.traceback[-1].name == 'transform'
