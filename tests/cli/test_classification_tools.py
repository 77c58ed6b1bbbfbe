"""Train, fine-tune and distill classifiers with the tools, on digits and on the CPU."""

import cv2
import numpy as np
import pytest
import timm
import torch
from command_line import ROOT, run, scalars, succeed

CONFIG = ROOT / 'configs/demo/efficientvim-m1_digits.py'
DETECTOR = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Four images of each digit, and a validation image with a single row of pixels."""
    root = tmp_path_factory.mktemp('digits')
    succeed(ROOT / 'tools/make_digits.py', root, cwd=root)
    for split in ('train', 'val'):
        for folder in (root / split).iterdir():
            for path in sorted(folder.iterdir())[4:]:
                path.unlink()
    cv2.imwrite(str(root / 'val/0/row.png'), np.zeros((1, 30), np.uint8))
    return root


def train(config, *arguments, cwd, options=()):
    options = ['train_dataloader.batch_size=8', 'train_cfg.max_epochs=2', 'default_hooks.logger.interval=1', *options]
    return succeed(ROOT / 'tools/train.py', config, *arguments, '--cfg-options', *options, cwd=cwd)


@pytest.fixture(scope='module')
def trained(digits, tmp_path_factory):
    """The work dir after two epochs of five iterations."""
    cwd = tmp_path_factory.mktemp('trained')
    train(CONFIG, '--work-dir', 'here', '--data-root', digits, cwd=cwd, options=['train_cfg.val_interval=2'])
    return cwd / 'here'


def derived(path, text):
    path.write_text(f"_base_ = '{CONFIG}'\n{text}")
    return path


def test_mesa_starts_at_a_quarter_and_ema_is_evaluated(trained):
    steps, (evaluation,) = scalars(trained)
    assert ['loss_mesa' in step for step in steps] == [False] * 3 + [True] * 7
    assert 0 <= evaluation['accuracy/top1'] <= 100
    checkpoint = torch.load(trained / 'epoch_2.pth', map_location='cpu', weights_only=False)
    name = 'backbone.patch_embed.conv.0.conv.weight'
    averaged, last = checkpoint['state_dict'][name], checkpoint['ema_state_dict'][f'module.{name}']
    assert not torch.equal(averaged, last)


def test_test_reproduces_the_accuracy_of_the_training(digits, trained, tmp_path):
    flags = ['--data-root', digits, '--work-dir', 'work', '--show-dir', 'pictures', '--out', 'predictions.pkl']
    printed = succeed(ROOT / 'tools/test.py', CONFIG, trained / 'epoch_2.pth', *flags, cwd=tmp_path)
    accuracy = scalars(trained)[1][0]['accuracy/top1']
    assert f'accuracy/top1: {accuracy:.4f}' in printed
    assert (tmp_path / 'predictions.pkl').stat().st_size
    assert len(list((tmp_path / 'pictures').iterdir())) == 10 * 4 + 1


def test_resume(digits, trained, tmp_path):
    resume = ['--resume', trained / 'epoch_2.pth']
    options = ['train_cfg.max_epochs=3', 'train_cfg.val_interval=9']
    train(CONFIG, '--work-dir', 'here', '--data-root', digits, *resume, cwd=tmp_path, options=options)
    steps, _ = scalars(tmp_path / 'here')
    assert [step['step'] for step in steps] == list(range(11, 16))
    assert all('loss_mesa' in step for step in steps)  # MESA started before


def test_detector_starts_from_a_classifier(trained, tmp_path):
    succeed(ROOT / 'tools/make_shapes.py', 'shapes', '--num-train', 4, '--num-val', 2, '--size', 96, cwd=tmp_path)
    init_cfg = dict(_delete_=True, type='Pretrained', prefix='backbone.', checkpoint=trained / 'epoch_2.pth')
    options = [f'model.backbone.init_cfg.{key}={value}' for key, value in init_cfg.items()]
    options += ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2']
    printed = succeed(
        *(ROOT / 'tools/train.py', DETECTOR, '--data-root', 'shapes', '--work-dir', 'here'),
        *('--cfg-options', *options, 'optim_wrapper.optimizer.lr=0'),
        cwd=tmp_path,
    )
    assert 'tensors of EfficientViM from' in printed
    classifier = torch.load(trained / 'epoch_2.pth', map_location='cpu', weights_only=False)['state_dict']
    detector = torch.load(tmp_path / 'here/iter_1.pth', map_location='cpu', weights_only=False)['state_dict']
    names = [name for name, tensor in classifier.items() if name.startswith('backbone.') and 'running' not in name]
    assert len(names) > 100
    for name in names:
        if 'num_batches_tracked' not in name:
            torch.testing.assert_close(detector[name], classifier[name], msg=name)


def test_fine_tuning_with_other_classes_and_resolution(digits, trained, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / 'own' / split).mkdir(parents=True)
        for name in '0123456':
            (tmp_path / 'own' / split / name).symlink_to(digits / split / name)
    config = tmp_path / 'fine_tuning.py'
    config.write_text(f"""
_base_ = '{ROOT / 'configs/demo/efficientvim-m1_finetune.py'}'
model = dict(init_cfg=dict(checkpoint='{trained / 'epoch_2.pth'}'), head=dict(num_classes=7))
data_preprocessor = dict(num_classes=7)
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(scale=96)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline), num_workers=1)
val_dataloader = dict(num_workers=1)
test_dataloader = val_dataloader
""")
    options = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    printed = train(config, '--work-dir', 'here', '--data-root', 'own', cwd=tmp_path, options=options)
    assert 'tensors of EfficientViM from' in printed
    assert 'has 10 classes, but FusionClsHead has 7: its 8 tensors that depend on the classes' in printed
    steps, (evaluation,) = scalars(tmp_path / 'here')
    assert len(steps) == 4
    assert 'accuracy/top1' in evaluation


def test_distillation_from_a_timm_model(digits, tmp_path):
    """Like efficientvim-m1-distilled_300e_in1k.py, with a small teacher."""
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'teacher.pth')
    config = derived(
        tmp_path / 'distill.py',
        f"""
model = dict(head=dict(distilled=True))
teacher = dict(
    type='mmpretrain.TimmClassifier',
    model_name='test_resnet',
    checkpoint_path='{tmp_path / 'teacher.pth'}',
    num_classes=10,
)
custom_hooks = [_base_.custom_hooks[0], dict(type='mmevm.DistillationHook', teacher=teacher)]
""",
    )
    options = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    train(config, '--work-dir', 'here', '--data-root', digits, cwd=tmp_path, options=options)
    steps, (evaluation,) = scalars(tmp_path / 'here')
    assert all(set(step) >= {'loss', 'loss_cls', 'loss_distill'} for step in steps)
    assert 'accuracy/top1' in evaluation
    state = torch.load(tmp_path / 'here/epoch_1.pth', map_location='cpu', weights_only=False)['state_dict']
    assert not [name for name in state if 'teacher' in name]
    assert 'head.heads_dist.0.weight' in state


def test_broken_image_is_named(digits, tmp_path):
    root = tmp_path / 'digits'
    for split in ('train', 'val'):
        (root / split).mkdir(parents=True)
        for folder in (digits / split).iterdir():
            (root / split / folder.name).symlink_to(folder)
    (root / 'val/9').unlink()
    (root / 'val/9').mkdir()
    (root / 'val/9/broken.png').write_text('not an image')
    options = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    result = run(
        *(ROOT / 'tools/train.py', CONFIG, '--data-root', root, '--work-dir', 'here', '--cfg-options', *options),
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert f'{root}/val/9/broken.png' in result.stderr


def test_different_folders_are_a_warning(digits, tmp_path):
    for split, names in dict(train='0123456789', val='123456789').items():
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / name).symlink_to(digits / split / name)
    output = succeed(ROOT / 'tools/train.py', CONFIG, '--data-root', tmp_path, '--check', cwd=tmp_path)
    assert "number their classes differently: one has '0' where the other has '1'" in output
