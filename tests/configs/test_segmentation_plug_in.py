"""Train stock configs of MMSegmentation with only the backbone, and the channels of the heads, replaced."""

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

HEIGHT, WIDTH, CLASSES = 96, 128, 5
CHANNELS = [128, 192, 320]
BACKBONE = dict(_delete_=True, type='mmevm.EfficientViM', arch='m1')
AUXILIARY = dict(in_channels=192, in_index=1, num_classes=CLASSES)

SEGMENTORS = {
    'upernet': (
        'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
        dict(
            backbone=BACKBONE,
            decode_head=dict(in_channels=CHANNELS, in_index=[0, 1, 2], num_classes=CLASSES),
            auxiliary_head=AUXILIARY,
        ),
    ),
    'segformer': (
        'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        dict(backbone=BACKBONE, decode_head=dict(in_channels=CHANNELS, in_index=[0, 1, 2], num_classes=CLASSES)),
    ),
    'deeplabv3plus': (
        'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py',
        dict(
            backbone=BACKBONE,
            decode_head=dict(in_channels=320, in_index=2, c1_in_channels=128, num_classes=CLASSES),
            auxiliary_head=AUXILIARY,
        ),
    ),
    'mask2former': (
        'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        dict(
            backbone=BACKBONE,
            neck=dict(type='mmevm.UpsampleFPN', in_channels=CHANNELS, out_channels=64, num_outs=4, num_upsamples=1),
            decode_head=dict(
                in_channels=[64, 64, 64, 64],
                strides=[8, 16, 32, 64],
                num_queries=10,
                num_classes=CLASSES,
                loss_cls=dict(class_weight=[1.0] * CLASSES + [0.1]),
            ),
        ),
    ),
}


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentor_trains_and_predicts(name, tmp_path):
    from mmseg.structures import SegDataSample

    base, changes = SEGMENTORS[name]
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {base!r}\nmodel = {changes!r}\n')
    cfg = Config.fromfile(path)
    cfg.model.pop('pretrained', None)  # weights of a ResNet
    cfg.model.data_preprocessor.size = (HEIGHT, WIDTH)
    if name == 'mask2former':  # one layer in place of six and nine, to save time
        cfg.model.decode_head.pixel_decoder.encoder.num_layers = 1
        cfg.model.decode_head.transformer_decoder.num_layers = 3
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()

    grads = {}
    for key, parameter in model.backbone.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, key=key: grads.update({key: grad.clone()}))
    samples = []
    for _ in range(2):
        blocks = torch.randint(0, CLASSES, (1, HEIGHT // 16, WIDTH // 16))
        labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
        sample = SegDataSample(metainfo=dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), (HEIGHT, WIDTH)))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    images = [torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in samples]
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    logged = model.train().train_step(dict(inputs=images, data_samples=samples), wrapper)
    assert logged['loss'].isfinite()
    trained = {key for key, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert set(grads) == trained
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())

    model.eval()
    with torch.no_grad():
        predictions = model.test_step(dict(inputs=images, data_samples=samples))
    for prediction in predictions:
        assert prediction.seg_logits.data.shape == (CLASSES, HEIGHT, WIDTH)
        assert prediction.seg_logits.data.isfinite().all()
        assert prediction.pred_sem_seg.data.max() < CLASSES
