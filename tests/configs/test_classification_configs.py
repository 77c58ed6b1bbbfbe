"""Compare the ImageNet configs with the authors' recipe."""

import functools
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmpretrain.models.utils.batch_augments import CutMix, Mixup

from mmevm.cli import replace_data_root

CONFIGS = Path(__file__).parents[2] / 'configs/classification'
CHANNELS = dict(m1=[128, 192, 320, 320], m2=[128, 256, 512, 512], m3=[224, 320, 512, 512], m4=[224, 320, 512, 512])
SIZES = dict(m1=224, m2=224, m3=224, m4=256)
ITERATIONS = 10  # of an epoch

# name: arch, size, epochs, batch size per GPU (of 8), learning rate, whether distilled, pretrained weights
RECIPES = {
    **{f'efficientvim-{arch}_300e_in1k': (arch, size, 300, 256, 2e-3, False, None) for arch, size in SIZES.items()},
    **{f'efficientvim-{arch}_450e_in1k': (arch, size, 450, 256, 2e-3, False, None) for arch, size in SIZES.items()},
    **{
        f'efficientvim-{arch}-distilled_300e_in1k': (arch, size, 300, 256, 2e-3, True, None)
        for arch, size in SIZES.items()
    },
    'efficientvim-m4_ft30e_in1k-384px': ('m4', 384, 30, 128, 1e-3, False, 'timm://efficientvim_m4.e300_in1k'),
    'efficientvim-m4_ft30e_in1k-512px': (
        'm4',
        512,
        30,
        128,
        1e-3,
        False,
        'work_dirs/efficientvim-m4_ft30e_in1k-384px/epoch_30.pth',
    ),
}


@functools.lru_cache(maxsize=1)
def build(model: str):
    """Build from JSON, so that equal configs share one model."""
    return MODELS.build(json.loads(model))


@pytest.fixture(scope='module', params=sorted(RECIPES, key=lambda name: (RECIPES[name][5], RECIPES[name][0])))
def recipe(request):
    cfg = Config.fromfile(CONFIGS / f'{request.param}.py')
    init_default_scope(cfg.default_scope)
    model = build(json.dumps(dict(cfg.model.to_dict(), data_preprocessor=cfg.data_preprocessor.to_dict())))
    return cfg, model, *RECIPES[request.param]


def test_all_configs_are_in_the_table():
    assert {path.stem for path in CONFIGS.glob('*.py')} == set(RECIPES)


def test_model(recipe):
    cfg, model, arch, _, _, _, _, distilled, weights = recipe
    assert cfg.model.get('init_cfg') == (weights and dict(type='Pretrained', checkpoint=weights))
    assert list(model.backbone.out_channels) == list(model.head.in_channels) == CHANNELS[arch]
    assert (model.head.num_classes, model.head.distilled) == (1000, distilled)
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith('mixer.A'))
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_label_smoothing_and_mixup(recipe):
    model = recipe[1]
    augments = model.data_preprocessor.batch_augments.augments
    assert [(type(augment), augment.alpha) for augment in augments] == [(Mixup, 0.8), (CutMix, 1.0)]
    assert model.data_preprocessor.batch_augments.probs is None  # one of the two, with the same probability

    logits, mixed = torch.randn(1, 1000), torch.zeros(1, 1000)
    mixed[0, 3], mixed[0, 7] = 0.7, 0.3
    expected = -((0.9 * mixed + 0.1 / 1000) * logits.log_softmax(1)).sum()
    torch.testing.assert_close(model.head.loss_module(logits, mixed), expected)


def test_preprocessing(recipe):
    preprocessor = recipe[1].data_preprocessor
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert preprocessor.to_rgb


def test_optimizer(recipe):
    cfg, model, _, _, _, _, lr, _, _ = recipe
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper) is OptimWrapper  # float32, no AMP
    assert wrapper.clip_grad_kwargs == dict(max_norm=0.02)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    decays = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert decays.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        assert decays[id(parameter)] == (0 if parameter.ndim <= 1 or name.endswith('.bias') else 0.05), name
    assert {(group['lr'], group['betas']) for group in wrapper.optimizer.param_groups} == {(lr, (0.9, 0.999))}


@functools.cache
def learning_rates(optim_wrapper: str, param_scheduler: str, epochs: int) -> list[float]:
    """Return a value per iteration. From JSON, so that equal configs are computed once."""
    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), json.loads(optim_wrapper))
    schedulers = []
    for scheduler in json.loads(param_scheduler):
        kind = PARAM_SCHEDULERS.get(scheduler.pop('type'))
        by_iteration = scheduler.pop('convert_to_iter_based', False)
        make = kind.build_iter_from_epoch if by_iteration else kind
        schedulers.append(
            make(optimizer=wrapper, **scheduler, **(dict(epoch_length=ITERATIONS) if by_iteration else {}))
        )
    rates = []
    for step in range(epochs * ITERATIONS):
        rates.append(wrapper.optimizer.param_groups[0]['lr'])
        wrapper.optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % ITERATIONS == 0:
                scheduler.step()
    return rates


def test_schedule(recipe):
    cfg, _, _, _, epochs, batch_size, lr, _, weights = recipe
    assert (cfg.train_cfg.by_epoch, cfg.train_cfg.max_epochs) == (True, epochs)
    assert cfg.train_dataloader.batch_size == batch_size
    assert (cfg.auto_scale_lr.enable, cfg.auto_scale_lr.base_batch_size) == (False, 8 * batch_size)

    settings = cfg.to_dict()
    rates = learning_rates(json.dumps(settings['optim_wrapper']), json.dumps(settings['param_scheduler']), epochs)
    warm_up, cool_down = (0, 0) if weights else (20, 10)
    assert rates[0] == pytest.approx(lr if weights else 2e-6)
    assert max(rates) == rates[warm_up * ITERATIONS] == pytest.approx(lr)
    if warm_up:
        assert rates[10 * ITERATIONS] == pytest.approx(lr / 2, rel=0.01)
    middle = (warm_up + epochs - cool_down) // 2
    assert rates[middle * ITERATIONS] == pytest.approx((lr + 2e-5) / 2, rel=0.02)
    if cool_down:
        assert rates[-cool_down * ITERATIONS :] == pytest.approx([2e-5] * cool_down * ITERATIONS, rel=0.01)
    assert rates[-1] == min(rates[warm_up * ITERATIONS :])


def test_distillation_and_mesa(recipe):
    cfg, *_, distilled, _ = recipe
    hooks = {hook.type: hook for hook in cfg.custom_hooks}
    assert set(hooks) == {'EMAHook', 'mmevm.DistillationHook' if distilled else 'mmevm.MESAHook'}
    average = HOOKS.build(hooks['EMAHook']).ema_cfg
    assert (average['momentum'], average['update_buffers']) == (pytest.approx(1 - 0.9995), True)
    if distilled:
        teacher = hooks['mmevm.DistillationHook'].teacher
        assert (teacher.model_name, teacher.pretrained) == ('regnety_160.deit_in1k', True)
    else:
        assert HOOKS.build(hooks['mmevm.MESAHook']).begin == 0.25


def test_data(recipe):
    cfg, _, _, size, _, _, _, _, weights = recipe
    for loader, split in [(cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val'), (cfg.test_dataloader, 'val')]:
        assert loader.dataset.type == 'ImageNet'
        assert (loader.dataset.data_root, loader.dataset.split) == ('data/imagenet', split)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert list(steps) == [
        'LoadImageFromFile',
        'RandomResizedCrop',
        'RandomFlip',
        'RandAugment',
        'RandomErasing',
        'PackInputs',
    ]
    assert steps['RandomResizedCrop'].scale == size
    assert steps['RandomFlip'].prob == 0.5
    augment = steps['RandAugment']  # rand-m9-mstd0.5-inc1
    assert (augment.policies, augment.num_policies, augment.total_level) == ('timm_increasing', 2, 10)
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    erasing = steps['RandomErasing']
    assert (erasing.erase_prob, erasing.mode) == (0.25, 'rand')  # 'pixel' of timm
    evaluation = cfg.val_dataloader.dataset.pipeline
    if weights:  # whole images
        assert [(step.type, step.get('scale')) for step in evaluation[1:-1]] == [('Resize', size)]
    else:
        resize, crop = evaluation[1:-1]
        assert (resize.type, resize.edge, resize.scale) == ('ResizeEdge', 'short', int(size * 256 / 224))
        assert (crop.type, crop.crop_size) == ('CenterCrop', size)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert (evaluator.type, evaluator.topk) == ('Accuracy', (1, 5))


def test_replace_data_root(recipe):
    moved = replace_data_root(recipe[0], '/elsewhere')
    assert {moved[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')} == {'/elsewhere/'}
