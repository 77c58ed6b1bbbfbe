"""Run the tools in processes of their own, on a few small images and on the CPU."""

import json
import math
import pickle
import shutil

import cv2
import numpy as np
import pytest
import timm
import torch
from command_line import ROOT, error_line, run, scalars, succeed
from pycocotools.coco import COCO
from safetensors.torch import save_file
from torch.torch_version import TorchVersion

CONFIG = ROOT / 'configs' / 'demo' / 'maskrcnn_evm_m1_shapes.py'
SIZE = 96
NUM_VAL = 4
LOSSES = {'loss', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'}

pytestmark = pytest.mark.slow


def train(*arguments, cwd, options=(), start=(), **environment):
    """Train the detection demo with batch size 2."""
    options = [
        'optim_wrapper.optimizer.lr=1e-3',
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
        *options,
    ]
    return succeed(*start, ROOT / 'tools/train.py', *arguments, '--cfg-options', *options, cwd=cwd, **environment)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    numbers = ['--num-train', 8, '--num-val', NUM_VAL, '--size', SIZE]
    succeed(ROOT / 'tools/make_shapes.py', root, *numbers, cwd=root)
    return root


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """The work dir and the output of three training iterations."""
    cwd = tmp_path_factory.mktemp('trained')
    flags = ['--work-dir', 'here', '--data-root', shapes, '--auto-scale-lr', '--tensorboard']
    printed = train(CONFIG, *flags, cwd=cwd, options=['train_cfg.max_iters=3', 'train_cfg.val_interval=3'])
    assert [path.name for path in cwd.iterdir()] == ['here']
    return cwd / 'here', printed


@pytest.fixture(scope='session')
def tested(shapes, trained, tmp_path_factory):
    cwd = tmp_path_factory.mktemp('tested')
    flags = ['--data-root', shapes, '--work-dir', 'work', '--show-dir', 'pictures', '--out', 'predictions.pkl']
    printed = succeed(ROOT / 'tools/test.py', CONFIG, trained[0] / 'iter_3.pth', *flags, cwd=cwd)
    return cwd, printed


def test_train_logs_and_saves(trained):
    work_dir, printed = trained
    assert 'Iter(train) [3/3]' in printed
    assert 'eta: ' in printed
    steps, (evaluation,) = scalars(work_dir)
    assert [step['step'] for step in steps] == [1, 2, 3]
    for step in steps:
        assert set(step) >= LOSSES
        assert all(math.isfinite(step[name]) for name in LOSSES)
    assert set(evaluation) >= {'coco/bbox_mAP', 'coco/segm_mAP'}
    checkpoint = torch.load(work_dir / 'iter_3.pth', map_location='cpu', weights_only=False)
    assert checkpoint['meta']['iter'] == 3
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'iter_3.pth')


def test_train_auto_scale_lr(trained):
    first, *_ = scalars(trained[0])[0]
    assert first['lr'] == pytest.approx(1e-3 * 2 / 16 * 0.01)  # scaled by the batch size, first warm-up iteration


def test_train_tensorboard(trained):
    events = list(trained[0].glob('*/vis_data/events.out.tfevents.*'))
    assert len(events) == 1
    assert b'loss_rpn_cls' in events[0].read_bytes()


def test_train_resume(shapes, trained, tmp_path):
    work_dir = tmp_path / 'work'
    shutil.copytree(trained[0], work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_3.pth'))
    flags = ['--work-dir', work_dir, '--data-root', shapes, '--resume']
    printed = train(CONFIG, *flags, cwd=tmp_path, options=['train_cfg.max_iters=4', 'train_cfg.val_interval=10'])
    assert 'resumed epoch: 0, iter: 3' in printed
    assert [step['step'] for step in scalars(work_dir)[0]] == [4]
    checkpoint = torch.load(work_dir / 'iter_4.pth', map_location='cpu', weights_only=False)
    optimizer = checkpoint['optimizer']
    assert {int(state['step']) for state in optimizer['state'].values()} == {4}
    if TorchVersion(torch.__version__) >= '2.4' and not torch.cuda.is_available():
        assert all(group['fused'] for group in optimizer['param_groups'])


def test_train_resume_from_a_missing_file(shapes, tmp_path):
    result = run(ROOT / 'tools/train.py', CONFIG, '--data-root', shapes, '--resume', 'none.pth', cwd=tmp_path)
    assert 'There is no checkpoint none.pth' in error_line(result)


def test_test_prints_coco_metrics(tested):
    for metric in ('bbox', 'segm'):
        assert f'Evaluate annotation type *{metric}*' in tested[1]
        assert f'coco/{metric}_mAP: ' in tested[1]
    assert tested[1].count('Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all') == 2


def test_test_show_dir(shapes, tested):
    pictures = sorted((tested[0] / 'pictures').iterdir())
    assert [path.name for path in pictures] == sorted(path.name for path in (shapes / 'val').iterdir())
    for path in pictures:
        image = cv2.imread(str(shapes / 'val' / path.name))
        picture = cv2.imread(str(path))
        assert picture.shape == (SIZE, 2 * SIZE, 3)
        is_drawn_on = (picture[:, :SIZE] != image).any()
        assert is_drawn_on == (path != pictures[-1])  # has no objects


def test_test_out(shapes, tested):
    predictions = pickle.loads((tested[0] / 'predictions.pkl').read_bytes())
    coco = COCO(shapes / 'annotations/instances_val.json')
    assert [prediction['img_id'] for prediction in predictions] == sorted(coco.imgs)
    for prediction in predictions:
        found = prediction['pred_instances']
        assert found['bboxes'].shape == (len(found['scores']), 4)
        assert len(found['masks']) == len(found['scores'])


def test_test_format_only(shapes, trained, tested, tmp_path):
    flags = ['--data-root', shapes, '--format-only', 'results/shapes']
    printed = succeed(ROOT / 'tools/test.py', CONFIG, trained[0] / 'iter_3.pth', *flags, cwd=tmp_path)
    assert 'Average Precision' not in printed
    coco = COCO(shapes / 'annotations/instances_val.json')
    predictions = pickle.loads((tested[0] / 'predictions.pkl').read_bytes())
    expected = sum(len(prediction['pred_instances']['scores']) for prediction in predictions)
    assert expected > 0
    for metric in ('bbox', 'segm'):
        loaded = coco.loadRes(str(tmp_path / f'results/shapes.{metric}.json'))
        assert len(loaded.anns) == expected
        assert {ann['category_id'] for ann in loaded.anns.values()} <= set(coco.cats)


def test_test_refuses_an_incomplete_checkpoint(shapes, trained, tmp_path):
    checkpoint = torch.load(trained[0] / 'iter_3.pth', map_location='cpu', weights_only=False)
    del checkpoint['state_dict']['backbone.stages.0.blocks.0.alpha']
    torch.save(checkpoint, tmp_path / 'incomplete.pth')
    result = run(ROOT / 'tools/test.py', CONFIG, 'incomplete.pth', '--data-root', shapes, cwd=tmp_path)
    sentence = error_line(result)
    assert 'incomplete.pth does not fit' in sentence
    assert 'backbone.stages.0.blocks.0.alpha' in sentence


def test_train_without_data(tmp_path):
    sentence = error_line(run(ROOT / 'tools/train.py', ROOT / 'configs/maskrcnn_evm_m1.py', cwd=tmp_path))
    assert 'data/coco/' in sentence
    assert '--data-root DIR' in sentence


def pretrained(checkpoint):
    values = dict(_delete_=True, type='Pretrained', checkpoint=checkpoint)  # the demo has init_cfg=None
    return [f'model.backbone.init_cfg.{key}={value}' for key, value in values.items()]


def test_train_without_pretrained_weights_offline(shapes, tmp_path):
    options = [*pretrained('timm://efficientvim_m1.e450_in1k'), 'train_cfg.max_iters=1', 'train_cfg.val_interval=10']
    sentence = error_line(
        run(
            *(ROOT / 'tools/train.py', CONFIG, '--data-root', shapes, '--cfg-options', *options),
            cwd=tmp_path,
            HF_HUB_OFFLINE='1',
            HF_HOME=str(tmp_path / 'hub'),
        )
    )
    assert 'timm://efficientvim_m1.e450_in1k' in sentence
    assert 'model.backbone.init_cfg=None' in sentence


def test_train_from_a_timm_file(shapes, tmp_path):
    torch.manual_seed(1)
    state = timm.create_model('efficientvim_m1', pretrained=False).state_dict()
    save_file(state, tmp_path / 'model.safetensors')
    options = [
        *pretrained('model.safetensors'),
        *('optim_wrapper.optimizer.lr=0', 'train_cfg.max_iters=1', 'train_cfg.val_interval=10'),
    ]
    printed = train(CONFIG, '--data-root', shapes, '--work-dir', 'work', cwd=tmp_path, options=options)
    assert 'from model.safetensors' in printed
    trained = torch.load(tmp_path / 'work/iter_1.pth', map_location='cpu', weights_only=False)['state_dict']
    compared = 0
    for name, tensor in state.items():
        if name.startswith(('patch_embed.', 'stages.')) and name.endswith(('.weight', '.bias', '.alpha')):
            assert trained[f'backbone.{name}'].flatten().equal(tensor.flatten()), name
            compared += 1
    assert compared > 100


def test_amp_without_a_gpu(tmp_path):
    result = run(ROOT / 'tools/train.py', CONFIG, '--amp', cwd=tmp_path)
    assert result.returncode == 2
    assert '--amp needs a GPU' in result.stderr
    assert 'Traceback' not in result.stderr


def test_coco_subset(shapes, tmp_path):
    source = shapes / 'annotations/instances_train.json'
    printed = succeed(ROOT / 'tools/coco_subset.py', source, 'new/subset.json', '--num-images', 3, cwd=tmp_path)
    whole, subset = COCO(source), COCO(tmp_path / 'new/subset.json')
    first = sorted(whole.imgs)[:3]
    assert sorted(subset.imgs) == first
    assert subset.anns == {key: ann for key, ann in whole.anns.items() if ann['image_id'] in first}
    assert subset.cats == whole.cats
    assert f'3 images, {len(subset.anns)} objects' in printed

    result = run(ROOT / 'tools/coco_subset.py', source, 'none.json', '--num-images', 9, cwd=tmp_path)
    assert result.returncode == 2
    assert 'has only 7 images with objects' in result.stderr  # of 8; the last one has none
    assert not (tmp_path / 'none.json').exists()


def test_coco_subset_with_label_maps(tmp_path):
    def rectangle(category, x, y, w, h):
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        return dict(image_id=4, category_id=category, iscrowd=0, area=w * h, bbox=[x, y, w, h], segmentation=[corners])

    small, large = rectangle(90, 4, 2, 4, 4), rectangle(7, 2, 0, 10, 8)
    counts = [15 * 8, 2 * 8, 3 * 8]  # column by column: columns 15 and 16 of 20
    crowd = dict(rectangle(7, 15, 0, 2, 8), iscrowd=1, segmentation=dict(counts=counts, size=[8, 20]))
    anns = [dict(ann, id=i) for i, ann in enumerate([small, large, crowd], start=1)]
    image = dict(id=4, file_name='folder/four.jpg', height=8, width=20)
    categories = [dict(id=90, name='cup'), dict(id=7, name='cat')]
    (tmp_path / 'all.json').write_text(json.dumps(dict(images=[image], annotations=anns, categories=categories)))
    command = (ROOT / 'tools/coco_subset.py', 'all.json', 'one.json', '--num-images', 1, '--label-maps', 'maps')
    succeed(*command, cwd=tmp_path)

    expected = np.zeros((8, 20), int)
    expected[:, 2:12] = 2
    expected[2:6, 4:8] = 1  # the smaller object
    expected[:, 15:17] = 255
    labels = cv2.imread(str(tmp_path / 'maps/labels/four.png'), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, expected)
    assert (tmp_path / 'maps/classes.txt').read_text().split() == ['background', 'cup', 'cat']
    assert (tmp_path / 'maps/images.txt').read_text().split() == ['four']


def test_auto_scale_lr_requires_base_batch_size(tmp_path):
    (tmp_path / 'config.py').write_text('model = dict()')
    result = run(ROOT / 'tools/train.py', 'config.py', '--auto-scale-lr', cwd=tmp_path)
    assert 'auto_scale_lr=dict(base_batch_size=…)' in error_line(result)


def test_format_only_with_a_classifier(tmp_path):
    config = ROOT / 'configs/classification/efficientvim-m1_300e_in1k.py'
    result = run(ROOT / 'tools/test.py', config, 'none.pth', '--format-only', 'results', cwd=tmp_path)
    assert '--format-only is for detectors' in error_line(result)
