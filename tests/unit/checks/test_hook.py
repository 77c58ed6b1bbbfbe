import pytest

from mmevm.errors import ConfigError

DATASET = 'train_dataloader.dataset'


def test_summary_of_a_detector(check, detector, tmp_path):
    summary, warnings = check(detector)
    assert warnings == []
    for text in (
        'train_dataloader.dataset (CocoDataset): 3 images of 4 (1 skipped by filter_cfg=',
        'input: 192 × 192 pixels',
        'model.backbone (EfficientViM) returns 128, 192, 320 channels at stride 16, 32, 64',
        'model.rpn_head (RPNHead) takes 64 channels at stride 4, 8, 16, 32, 64',
        'weights: random',
        'optimizer: AdamW, learning rate 0.0007',
        'training: 1000 iterations of 4 images per process',
        'param_scheduler.0: LinearLR from iteration 0 to 100',
    ):
        assert text in summary
    assert not (tmp_path / 'work').exists()


def test_summary_of_a_classifier(check, classifier):
    summary, warnings = check(classifier)
    assert warnings == []
    assert f'{DATASET} (CustomDataset): 8 images' in summary
    assert 'per class: dog 4, cat 4' in summary


def test_more_outputs_than_classes(check, detector):
    detector.model.roi_head.bbox_head.num_classes = detector.model.roi_head.mask_head.num_classes = 80
    _, warnings = check(detector)
    assert warnings == [
        f'model.roi_head.{head}.num_classes=80, but {DATASET} has 1 classes; 79 outputs will never be trained.'
        for head in ('bbox_head', 'mask_head')
    ]


def test_topk_larger_than_the_number_of_classes(check, classifier):
    classifier.val_evaluator.topk = (1, 5)
    with pytest.raises(ConfigError, match=r'^val_evaluator\.topk=\(1, 5\), but the head has num_classes=2\. Set '):
        check(classifier)


def test_training_shorter_than_the_schedule(check, detector):
    detector.train_cfg.max_iters = 50
    detector.param_scheduler.append(dict(type='MultiStepLR', milestones=[2000], by_epoch=False))
    _, warnings = check(detector)
    assert [warning.partition(',')[0] for warning in warnings] == [
        'param_scheduler.0 (LinearLR) is a warm-up of 100 iterations',
        'param_scheduler.1 (CosineAnnealingLR) has no effect before 100 iterations',
        'param_scheduler.2 (MultiStepLR) has no effect before 2000 iterations',
    ]


def test_training_much_longer_than_the_schedule(check, detector):
    detector.train_cfg.max_iters = 5000
    _, warnings = check(detector)
    (warning,) = warnings
    assert warning.startswith('param_scheduler: the learning rate stays the same after 20% of the training. If you ')


def test_warmup_of_most_of_the_training(check, detector):
    detector.train_cfg.max_iters = 150
    detector.param_scheduler = [
        *detector.param_scheduler[:1],
        dict(type='LinearLR', start_factor=1, end_factor=0.1, by_epoch=False, end=150),  # a decay is no warm-up
    ]
    _, warnings = check(detector)
    assert warnings == [
        'param_scheduler.0 (LinearLR) is a warm-up of 100 iterations, more than half of the training, which has 150. '
        'Reduce param_scheduler.0.end, or train longer.'
    ]
