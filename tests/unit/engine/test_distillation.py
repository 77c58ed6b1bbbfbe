"""MESA and distillation hooks in short trainings by mmengine's runner."""

import copy
import functools
from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from randomize import randomize

from mmevm.checkpoints import CheckpointError
from mmevm.engine.hooks import DistillationHook, MESAHook
from mmevm.errors import ConfigError

TINY = dict(embed_dims=(8, 16, 16), depths=(1, 1, 1), state_dims=(4, 4, 4))
TIMM = dict(embed_dim=(8, 16, 16), depths=(1, 1, 1), state_dim=(4, 4, 4), num_classes=5)
EMA = dict(type='EMAHook', momentum=0.1, update_buffers=True)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def default_scope(tmp_path):
    yield
    DefaultScope.get_instance(f'after {tmp_path}', scope_name='mmengine')  # the runner's stays, but is not the latest


def network(kind='mmevm.DistillationClassifier', distilled=False, num_classes=5):
    return dict(
        type=kind,
        backbone=dict(type='mmevm.EfficientViM', arch=TINY, out_indices=(2,), out_hidden_states=True),
        head=dict(
            type='mmevm.FusionClsHead', num_classes=num_classes, in_channels=(8, 16, 16, 16), distilled=distilled
        ),
        data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, num_classes=num_classes),
    )


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(copy.deepcopy(cfg))


def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return [dict(inputs=image, data_samples=DataSample().set_gt_label(i % 5)) for i, image in enumerate(images)]


class Recorder(Hook):
    """Record the losses of each iteration, call ``check`` before it, and stop at ``stop_at``."""

    priority = 'VERY_LOW'  # after the others

    def __init__(self, check=lambda runner: None, stop_at=None):
        self.check, self.stop_at, self.losses = check, stop_at, {}

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == self.stop_at:
            raise InterruptedError
        self.check(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = outputs

    def having(self, name):
        return [i for i, losses in self.losses.items() if name in losses]


def make_runner(folder, hooks, model=None, by_epoch=True, epochs=4, saving=False, **kwargs):
    """4 images in batches of 2, so 2 iterations an epoch; 8 in all if there are 4 epochs."""
    torch.manual_seed(0)
    return Runner(
        model=build(model or network()),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=dataset(),
            batch_size=2,
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs) if by_epoch else dict(by_epoch=False, max_iters=8),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=2) if saving else None,
        ),
        custom_hooks=copy.deepcopy(hooks[:-1]) + hooks[-1:],
        randomness=dict(seed=0),
        default_scope='mmpretrain',
        experiment_name=str(folder),
        **kwargs,
    )


def train(folder, hooks, **kwargs):
    runner = make_runner(folder, hooks, **kwargs)
    runner.train()
    return runner


def averaged_model(runner):
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    return hook.ema_model.module


def assert_same(state, expected):
    torch.testing.assert_close(dict(state), dict(expected), rtol=0, atol=0)


def with_state(model, state):
    model.load_state_dict(state)
    return model


def normalized_images(iteration):
    first = 2 * (iteration % 2)
    return (torch.stack([sample['inputs'] for sample in dataset()[first : first + 2]]) - 127.5) / 127.5


@pytest.fixture(scope='module')
def mesa(tmp_path_factory):
    """Train with MESA from the second epoch, and record the state before each iteration."""

    @functools.cache
    def train_once(update_buffers):
        before, after_the_step = [], []

        def note(runner):
            average = averaged_model(runner)
            moment = SimpleNamespace(student=copy.deepcopy(runner.model.state_dict()))
            moment.average = copy.deepcopy(average.state_dict())
            moment.output = None if runner.model.teacher is None else runner.model.teacher(IMAGES)
            moment.average_after_forward = copy.deepcopy(average.state_dict())
            before.append(moment)

        class AfterTheStep(Hook):
            priority = 'VERY_HIGH'  # before EMAHook averages

            def after_train_iter(self, runner, *args, **kwargs):
                after_the_step.append(copy.deepcopy(averaged_model(runner).state_dict()))

        folder = tmp_path_factory.mktemp('mesa')
        recorder = Recorder(note)
        hooks = [dict(EMA, update_buffers=update_buffers), dict(type='mmevm.MESAHook'), AfterTheStep(), recorder]
        runner = train(folder, hooks, saving=True)
        return SimpleNamespace(
            folder=folder, runner=runner, recorder=recorder, before=before, after_the_step=after_the_step
        )

    return train_once


def assert_begins_at(first, folder, runner, recorder):
    assert list(recorder.losses) == recorder.having('loss') == list(range(8))
    assert recorder.having('loss_mesa') == list(range(first, 8))
    assert runner.model.teacher is None
    (log,) = folder.glob('*/*.log')
    assert log.read_text().count('MESA begins at iteration') == 1
    assert f'MESA begins at iteration {first} of 8.' in log.read_text()


class TestMESA:
    def test_begins_after_a_quarter_of_the_training(self, mesa):
        training = mesa(update_buffers=True)
        assert_begins_at(2, training.folder, training.runner, training.recorder)

    @pytest.mark.parametrize(
        ('by_epoch', 'ema', 'begin', 'first'),
        [
            (False, 'mmengine.EMAHook', {}, 2),
            (False, 'EMAHook', dict(begin=0.0), 0),
            (True, 'mmengine.EMAHook', dict(begin=0.55), 5),
        ],
    )
    def test_begins_after_the_given_fraction(self, tmp_path, by_epoch, ema, begin, first):
        recorder = Recorder()
        hooks = [dict(EMA, type=ema), dict(type='mmevm.MESAHook', **begin), recorder]
        assert_begins_at(first, tmp_path, train(tmp_path, hooks, by_epoch=by_epoch), recorder)

    @pytest.mark.parametrize('update_buffers', [True, False])
    def test_teacher_is_the_averaged_model_in_eval_mode_and_its_forward_changes_nothing(self, mesa, update_buffers):
        training = mesa(update_buffers=update_buffers)
        for moment, after_the_step in zip(training.before, training.after_the_step, strict=True):
            assert_same(moment.average_after_forward, moment.average)
            assert_same(after_the_step, moment.average)
        with_teacher = [moment for moment in training.before if moment.output is not None]
        assert len(with_teacher) == 6
        for moment in with_teacher:
            reference = with_state(build(network()), moment.average).eval()
            torch.testing.assert_close(moment.output, reference(IMAGES), rtol=0, atol=0)
            assert not torch.allclose(moment.output, with_state(build(network()), moment.student).train()(IMAGES))
        assert not torch.allclose(with_teacher[0].output, with_teacher[-1].output)

    def test_loss_compares_with_the_averaged_model(self, mesa):
        training = mesa(update_buffers=True)
        for i in range(2, 8):
            images = normalized_images(i)
            student = with_state(build(network()), training.before[i].student).train()
            average = with_state(build(network()), training.before[i].average).eval()
            with torch.no_grad():
                expected = -(average(images).softmax(1) * student(images).log_softmax(1)).sum(1).mean()
            torch.testing.assert_close(training.recorder.losses[i]['loss_mesa'], expected)

    @pytest.mark.parametrize(('begin', 'first'), [(0.25, 4), (0.7, 6)])
    def test_resumed_training_equals_an_uninterrupted_one(self, tmp_path, mesa, monkeypatch, begin, first):
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # mmengine 0.10.7 cannot resume without it
        hook = dict(type='mmevm.MESAHook', begin=begin)
        if begin == 0.25:  # as by default
            uninterrupted = mesa(update_buffers=True).runner
        else:
            uninterrupted = train(tmp_path / 'uninterrupted', [EMA, hook, Recorder()])
        with pytest.raises(InterruptedError):
            train(tmp_path / 'part', [EMA, hook, Recorder(stop_at=5)], saving=True)
        recorder = Recorder()
        rest = make_runner(tmp_path / 'part', [EMA, hook, recorder], resume=True)
        rest.train()
        assert list(recorder.losses) == list(range(4, 8))
        assert recorder.having('loss_mesa') == list(range(first, 8))
        assert_same(rest.model.state_dict(), uninterrupted.model.state_dict())
        assert_same(averaged_model(rest).state_dict(), averaged_model(uninterrupted).state_dict())

    def test_checkpoint_has_the_averaged_weights_and_no_others(self, mesa):
        training = mesa(update_buffers=True)
        runner = training.runner
        checkpoint = torch.load(training.folder / 'epoch_4.pth', weights_only=False)
        assert_same(checkpoint['state_dict'], averaged_model(runner).state_dict())
        assert not torch.equal(checkpoint['state_dict']['head.heads.0.weight'], runner.model.head.heads[0].weight)
        assert set(checkpoint['state_dict']) == set(build(network('ImageClassifier')).state_dict())

    def test_missing_ema_hook_is_an_error(self, tmp_path):
        runner = make_runner(tmp_path, [dict(type='mmevm.MESAHook'), Recorder()])
        with pytest.raises(ConfigError, match=r"no EMAHook, .* Add dict\(type='EMAHook'"):
            runner.train()

    def test_distilled_head_is_an_error(self, tmp_path):
        runner = make_runner(tmp_path, [EMA, dict(type='mmevm.MESAHook'), Recorder()], model=network(distilled=True))
        with pytest.raises(ConfigError, match='distilled=True does not work with MESAHook'):
            runner.train()

    @pytest.mark.parametrize('begin', [-0.1, 1, 25])
    def test_begin_must_be_a_fraction(self, begin):
        with pytest.raises(ValueError, match=f'begin={begin} must be a fraction'):
            MESAHook(begin)


def write_teacher(kind, folder):
    """Return the config of a trained teacher, and the same network with its weights."""
    path = str(folder / 'teacher.pth')
    name, _, how = kind.partition(' ')
    if name == 'timm':
        reference = randomize(timm.create_model('efficientvim_m1', **TIMM))
        cfg = dict(type='TimmClassifier', model_name='efficientvim_m1', **TIMM)
    else:
        cfg = network('ImageClassifier')
        reference = randomize(build(cfg))
    state = reference.state_dict()
    if how == 'checkpoint_path':
        cfg['checkpoint_path'] = path
    elif how == 'pretrained':
        cfg['pretrained'] = path
        state = {'state_dict': state, 'meta': {}}
    elif how == 'prefix':
        state = {f'student.{name}': tensor for name, tensor in state.items()}
        cfg['init_cfg'] = dict(type='Pretrained', checkpoint=path, prefix='student')
    else:
        cfg['init_cfg'] = dict(type='Pretrained', checkpoint=path)
    torch.save(state, path)
    return cfg, reference.eval()


TEACHERS = [
    'timm checkpoint_path',
    'timm init_cfg',
    'mmpretrain init_cfg',
    'mmpretrain pretrained',
    'mmpretrain prefix',
]


@pytest.fixture(scope='module')
def distillation(tmp_path_factory):
    """Train with a teacher, and record the state before each iteration."""

    @functools.cache
    def train_once(kind):
        folder = tmp_path_factory.mktemp('distillation')
        cfg, reference = write_teacher(kind, folder)
        outputs, students = [], []

        def note(runner):
            students.append(copy.deepcopy(runner.model.state_dict()))
            outputs.append(runner.model.teacher(IMAGES))
            parameters = {id(p) for group in runner.optim_wrapper.param_groups for p in group['params']}
            assert parameters == {id(p) for p in runner.model.parameters()}

        recorder = Recorder(note)
        hooks = [EMA, ConfigDict(type='mmevm.DistillationHook', teacher=cfg), recorder]
        runner = train(folder, hooks, model=network(distilled=True), epochs=2, saving=True)
        return SimpleNamespace(
            folder=folder, runner=runner, recorder=recorder, reference=reference, outputs=outputs, students=students
        )

    return train_once


class TestDistillation:
    @pytest.mark.parametrize('kind', TEACHERS)
    def test_teacher_keeps_the_weights_of_the_file_and_is_in_no_checkpoint(self, distillation, kind):
        training = distillation(kind)
        recorder, runner = training.recorder, training.runner
        assert recorder.having('loss_distill') == recorder.having('loss') == list(range(4))
        assert len(training.outputs) == 4
        for output in training.outputs:
            assert not output.requires_grad
            torch.testing.assert_close(output, training.reference(IMAGES).detach(), rtol=0, atol=0)
        assert runner.model.teacher is None

        checkpoint = torch.load(training.folder / 'epoch_2.pth', weights_only=False)
        assert_same(checkpoint['state_dict'], averaged_model(runner).state_dict())
        names = set(build(network('ImageClassifier', distilled=True)).state_dict())
        assert set(checkpoint['state_dict']) == names
        assert {name.removeprefix('module.') for name in checkpoint['ema_state_dict']} == {*names, 'steps'}

    def test_loss_uses_the_argmax_of_the_teacher(self, distillation):
        training = distillation('mmpretrain init_cfg')
        for i, state in enumerate(training.students):
            images = normalized_images(i)
            student = with_state(build(network(distilled=True)), state).train()
            with torch.no_grad():
                choice = training.reference(images).argmax(1)
                expected = -student(images)[1].log_softmax(1)[range(2), choice].mean() / 2
            torch.testing.assert_close(training.recorder.losses[i]['loss_distill'], expected)

    def test_head_without_distillation_is_an_error(self, tmp_path):
        cfg, _ = write_teacher('mmpretrain init_cfg', tmp_path)
        runner = make_runner(tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), Recorder()])
        with pytest.raises(ConfigError, match=r'Set model\.head\.distilled=True'):
            runner.train()

    @pytest.mark.parametrize(
        'teacher',
        [
            dict(type='TimmClassifier', model_name='resnet18'),
            dict(type='TimmClassifier', model_name='resnet18', pretrained=False, checkpoint_path=''),
            network('ImageClassifier'),
            dict(network('ImageClassifier'), init_cfg=dict(type='Kaiming', layer='Conv2d')),
            dict(
                network('ImageClassifier'),
                backbone=dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint='x.pth')),
            ),
        ],
    )
    def test_teacher_without_weights_is_an_error(self, teacher):
        with pytest.raises(ConfigError, match=f'teacher {teacher["type"]} has random weights'):
            DistillationHook(teacher)

    @pytest.mark.parametrize(
        ('kind', 'change'),
        [
            ('timm init_cfg', 'one tensor is missing'),
            ('timm init_cfg', 'one tensor has another shape'),
            ('mmpretrain init_cfg', 'all tensors are missing'),
            ('mmpretrain pretrained', 'one tensor is missing'),
        ],
    )
    def test_incomplete_teacher_weights_are_an_error(self, tmp_path, kind, change):
        cfg, _ = write_teacher(kind, tmp_path)
        path = tmp_path / 'teacher.pth'
        content = torch.load(path)
        state = content.get('state_dict', content)
        (name,) = [name for name in state if name.endswith('stages.1.blocks.0.ffn.fc1.conv.weight')]
        changed, message = {
            'one tensor is missing': (
                {k: v for k, v in state.items() if k != name},
                r'208 tensors: 1 missing \(.*fc1\.conv\.weight\)',
            ),
            'one tensor has another shape': (
                {**state, name: state[name][:-1]},
                r'fc1\.conv\.weight: .* expected, .* in the file',
            ),
            'all tensors are missing': ({'x.y': state[name]}, r'208 missing .*The names in the file are x\.y'),
        }[change]
        torch.save(changed, path)
        runner = make_runner(
            tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), Recorder()], model=network(distilled=True)
        )
        with pytest.raises(CheckpointError, match=message) as error:
            runner.train()
        assert str(path) in str(error.value)

    def test_failed_download_of_teacher_weights_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
        name = 'test_resnet.r160_in1k'
        teacher = dict(type='mmpretrain.TimmClassifier', model_name=name, pretrained=True)
        hooks = [dict(type='mmevm.DistillationHook', teacher=teacher), Recorder()]
        runner = make_runner(tmp_path, hooks, model=network(distilled=True))
        with pytest.raises(CheckpointError, match=rf'{name} failed .* set checkpoint_path'):
            runner.train()

    def test_teacher_with_another_number_of_classes_is_an_error(self, tmp_path):
        path = tmp_path / 'teacher.pth'
        cfg = network('ImageClassifier', num_classes=7)
        torch.save(build(cfg).state_dict(), path)
        cfg['init_cfg'] = dict(type='Pretrained', checkpoint=str(path))
        runner = make_runner(
            tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), Recorder()], model=network(distilled=True)
        )
        with pytest.raises(ValueError, match='teacher, which has 7 classes'):
            runner.train()


@pytest.mark.parametrize('hook', ['MESAHook', 'DistillationHook'])
@pytest.mark.parametrize('part', ['model', 'head'])
def test_model_without_distillation_support_is_an_error(tmp_path, hook, part):
    model = network('ImageClassifier') if part == 'model' else network()
    if part == 'head':
        model['backbone']['out_hidden_states'] = False
        model['neck'] = dict(type='GlobalAveragePooling')
        model['head'] = dict(type='LinearClsHead', num_classes=5, in_channels=16)
    cfg = dict(type=f'mmevm.{hook}')
    if hook == 'DistillationHook':
        cfg['teacher'], _ = write_teacher('mmpretrain init_cfg', tmp_path)
    runner = make_runner(tmp_path, [EMA, cfg, Recorder()], model=model)
    with pytest.raises(ConfigError, match=f"{hook} needs model.type='mmevm.DistillationClassifier'"):
        runner.train()
