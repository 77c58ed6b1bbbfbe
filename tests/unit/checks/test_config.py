# ruff: noqa: E501
import pytest
from mmengine.config import Config

from mmevm.checks import check_config

EVM = 'timm://efficientvim_m1.e450_in1k'


def warnings(detector, **changes):
    for key, value in changes.items():
        *path, last = key.split('__')
        part = detector
        for name in path:
            part = part[name]
        part[last] = value
    return check_config(detector, ['train', 'val'])


@pytest.mark.parametrize(
    ('key', 'known'),
    [('train_dataloder', 'train_dataloader'), ('modle', 'model'), ('test_evalutor', 'test_evaluator'), ('optim_wraper', 'optim_wrapper'), ('custom_hook', 'custom_hooks')],
)  # fmt: skip
def test_misspelled_key(detector, key, known):
    assert warnings(detector, **{key: {}}) == [
        f'{key} is not a key that MMEngine reads. If you mean {known}, rename it.'
    ]


@pytest.mark.parametrize(
    'key', ['dataset_kind', 'max_epochs', 'base_lr', 'train_pipeline_stage2', 'img_scales', 'num_classes', 'lang_model_name', 'val_data_root', 'train_dataset', 'backend']
)  # fmt: skip
def test_users_own_keys_get_no_warning(detector, key):
    assert warnings(detector, **{key: {}}) == []


def test_string_classes(detector, tmp_path):
    (message,) = warnings(detector, train_dataloader__dataset__metainfo=dict(classes='raccoon'))
    assert "metainfo.classes='raccoon' is a string" in message
    assert "write ('raccoon',)" in message
    (tmp_path / 'classes.txt').write_text('raccoon')
    assert warnings(detector, train_dataloader__dataset__metainfo=dict(classes=str(tmp_path / 'classes.txt'))) == []


def test_evaluator_reads_another_file(detector, shapes):
    (message,) = warnings(detector, val_evaluator__ann_file=f'{shapes}/annotations/instances_train.json')
    assert message.startswith(
        f"val_evaluator.ann_file='{shapes}/annotations/instances_train.json', but val_dataloader.dataset reads "
    )
    same = f'{shapes}/train/../annotations/instances_val.json'
    assert warnings(detector, val_evaluator__ann_file=same) == []


def test_coco_metric_without_ground_truth(detector):
    """It would fail in the first evaluation, after epochs of training."""
    assert warnings(detector, val_evaluator__ann_file=None) == [
        "val_evaluator: CocoMetric has no ann_file, so it needs the samples' own annotations. Add 'instances' to "
        'meta_keys of PackDetInputs in the pipeline of val_dataloader.dataset, or set val_evaluator.ann_file.'
    ]


def test_coco_metric_with_annotations_of_the_samples(voc):
    voc.val_evaluator = dict(type='CocoMetric')
    voc.val_dataloader.dataset.pipeline[-1].meta_keys += ('instances',)
    assert warnings(voc) == []


def test_normalization(detector):
    pretrained = dict(model__backbone__init_cfg=dict(type='Pretrained', checkpoint=EVM))
    assert warnings(detector, **pretrained) == []
    for changes in (
        dict(model__data_preprocessor__mean=[103.53, 116.28, 123.675]),
        dict(model__data_preprocessor__std=[1.0, 1.0, 1.0]),
        dict(model__data_preprocessor__bgr_to_rgb=False),
    ):
        cfg = Config(detector.to_dict())
        (message,) = warnings(cfg, **pretrained, **changes)
        assert message.startswith('model.data_preprocessor gives ')
        assert 'mean=[123.675, 116.28, 103.53]' in message
        own = dict(type='Pretrained', checkpoint='work_dirs/own/epoch_3.pth')  # may expect any normalization
        assert warnings(cfg, model__backbone__init_cfg=own) == []


def test_norm_eval_with_random_weights(detector):
    (message,) = warnings(detector, model__backbone__norm_eval=True)
    assert message.startswith('model.backbone.norm_eval=True, but the backbone starts from random weights')
    assert warnings(detector, load_from='some.pth') == []


def test_no_batch_size_with_a_batch_sampler(detector):
    assert warnings(detector, train_dataloader__batch_size=None) == []


def test_faster_coco_metric(detector):
    detector.test_evaluator = dict(type='mmdet.FasterCocoMetric', ann_file=detector.test_evaluator.ann_file)
    assert warnings(detector) == []  # training does not use test_evaluator
    (message,) = check_config(detector, ['test'])
    assert 'pip install faster-coco-eval' in message
