"""Short trainings by mmengine's runner, whose student has a teacher."""

import copy

import pytest
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from randomise import randomise

from mmevm.checkpoints import CheckpointError
from mmevm.hooks import DistillationHook, MESAHook
from mmevm.preflight import ConfigError

TINY = dict(embed_dims=(8, 16, 16), depths=(1, 1, 1), state_dims=(4, 4, 4))
TIMM = dict(embed_dim=(8, 16, 16), depths=(1, 1, 1), state_dim=(4, 4, 4), num_classes=5)
EMA = dict(type='EMAHook', momentum=0.1, update_buffers=True)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def default_scope(tmp_path):
    yield
    DefaultScope.get_instance(f'after {tmp_path}', scope_name='mmengine')  # the runner's stays, but is not the latest


def network(kind='mmevm.TaughtImageClassifier', distilled=False, num_classes=5):
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
    """Keeps the losses of each iteration, calls ``check`` before it, and may pull the plug."""

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


def make_runner(folder, hooks, model=None, by_epoch=True, saving=False, **kwargs):
    """4 images in batches of 2, so 2 iterations an epoch; 8 in all."""
    torch.manual_seed(0)
    return Runner(
        model=build(model or network()),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=dataset(),
            batch_size=2,
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=4) if by_epoch else dict(by_epoch=False, max_iters=8),
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


def the_average(runner):
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    return hook.ema_model.module


def assert_same(state, expected):
    torch.testing.assert_close(dict(state), dict(expected), rtol=0, atol=0)


class TestMESA:
    @pytest.mark.parametrize(
        ('by_epoch', 'ema', 'begin', 'first'),
        [
            (True, 'EMAHook', {}, 2),
            (False, 'mmengine.EMAHook', {}, 2),
            (False, 'EMAHook', dict(begin=0.0), 0),
            (True, 'mmengine.EMAHook', dict(begin=0.55), 5),
        ],
    )
    def test_begins_at_its_share_of_the_training(self, tmp_path, by_epoch, ema, begin, first):
        recorder = Recorder()
        hooks = [dict(EMA, type=ema), dict(type='mmevm.MESAHook', **begin), recorder]
        runner = train(tmp_path, hooks, by_epoch=by_epoch)
        assert list(recorder.losses) == recorder.having('loss') == list(range(8))
        assert recorder.having('loss_mesa') == list(range(first, 8))
        assert runner.model.teacher is None
        (log,) = tmp_path.glob('*/*.log')
        assert log.read_text().count('MESA begins at iteration') == 1
        assert f'MESA begins at iteration {first} of 8.' in log.read_text()

    @pytest.mark.parametrize('update_buffers', [True, False])
    def test_the_teacher_is_the_average_in_eval_mode_and_does_not_move_by_being_asked(self, tmp_path, update_buffers):
        answers, states = [], []

        def check(runner):
            states.append(copy.deepcopy(the_average(runner).state_dict()))
            if runner.model.teacher is not None:
                reference = build(network())
                reference.load_state_dict(states[-1])
                answer = runner.model.teacher(IMAGES)
                torch.testing.assert_close(answer, reference.eval()(IMAGES), rtol=0, atol=0)
                assert not torch.allclose(answer, runner.model(IMAGES))
                assert_same(the_average(runner).state_dict(), states[-1])
                answers.append(answer)

        class AfterTheStep(Hook):
            priority = 'VERY_HIGH'  # before EMAHook averages

            def after_train_iter(self, runner, *args, **kwargs):
                assert_same(the_average(runner).state_dict(), states[-1])

        hooks = [dict(EMA, update_buffers=update_buffers), dict(type='mmevm.MESAHook'), AfterTheStep(), Recorder(check)]
        train(tmp_path, hooks)
        assert len(answers) == 6
        assert not torch.allclose(answers[0], answers[-1])

    def test_the_loss_is_of_the_average_of_that_iteration(self, tmp_path):
        expected = {}
        batches = [torch.stack([sample['inputs'] for sample in dataset()[i : i + 2]]) for i in (0, 2)]

        def check(runner):
            images = (batches[runner.iter % 2] - 127.5) / 127.5
            student, average = build(network()).train(), build(network()).eval()
            student.load_state_dict(runner.model.state_dict())
            average.load_state_dict(the_average(runner).state_dict())
            with torch.no_grad():
                expected[runner.iter] = -(average(images).softmax(1) * student(images).log_softmax(1)).sum(1).mean()

        recorder = Recorder(check)
        train(tmp_path, [EMA, dict(type='mmevm.MESAHook', begin=0.75), recorder])
        for i in (6, 7):
            torch.testing.assert_close(recorder.losses[i]['loss_mesa'], expected[i])

    @pytest.mark.parametrize(('begin', 'first'), [(0.25, 4), (0.7, 6)])
    def test_a_resumed_training_goes_on_as_if_nothing_had_happened(self, tmp_path, begin, first):
        mesa = dict(type='mmevm.MESAHook', begin=begin)
        whole = train(tmp_path / 'whole', [EMA, mesa, Recorder()])
        with pytest.raises(InterruptedError):
            train(tmp_path / 'part', [EMA, mesa, Recorder(stop_at=5)], saving=True)
        recorder = Recorder()
        rest = make_runner(tmp_path / 'part', [EMA, mesa, recorder], resume=True)
        rest.train()
        assert list(recorder.losses) == list(range(4, 8))
        assert recorder.having('loss_mesa') == list(range(first, 8))
        assert_same(rest.model.state_dict(), whole.model.state_dict())
        assert_same(the_average(rest).state_dict(), the_average(whole).state_dict())

    def test_a_checkpoint_has_the_weights_of_the_average_and_no_others(self, tmp_path):
        runner = train(tmp_path, [EMA, dict(type='mmevm.MESAHook'), Recorder()], saving=True)
        checkpoint = torch.load(tmp_path / 'epoch_4.pth', weights_only=False)
        assert_same(checkpoint['state_dict'], the_average(runner).state_dict())
        assert not torch.equal(checkpoint['state_dict']['head.heads.0.weight'], runner.model.head.heads[0].weight)
        assert set(checkpoint['state_dict']) == set(build(network('ImageClassifier')).state_dict())

    def test_without_an_average_it_is_an_error(self, tmp_path):
        runner = make_runner(tmp_path, [dict(type='mmevm.MESAHook'), Recorder()])
        with pytest.raises(ConfigError, match=r"no EMAHook: add dict\(type='EMAHook'"):
            runner.train()

    def test_a_distilled_head_is_an_error(self, tmp_path):
        runner = make_runner(tmp_path, [EMA, dict(type='mmevm.MESAHook'), Recorder()], model=network(distilled=True))
        with pytest.raises(ConfigError, match='MESAHook is for heads with distilled=False'):
            runner.train()

    @pytest.mark.parametrize('begin', [-0.1, 1, 25])
    def test_begin_is_a_share(self, begin):
        with pytest.raises(ValueError, match=f'begin={begin}: a share'):
            MESAHook(begin)


def write_teacher(kind, folder):
    """The config of a trained teacher, and the same network with its weights."""
    path = str(folder / 'teacher.pth')
    name, _, how = kind.partition(' ')
    if name == 'timm':
        reference = randomise(timm.create_model('efficientvim_m1', **TIMM))
        cfg = dict(type='TimmClassifier', model_name='efficientvim_m1', **TIMM)
    else:
        cfg = network('ImageClassifier')
        reference = randomise(build(cfg))
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


class TestDistillation:
    @pytest.mark.parametrize('kind', TEACHERS)
    def test_the_teacher_has_the_weights_of_the_file_to_the_end_and_is_in_no_checkpoint(self, tmp_path, kind):
        cfg, reference = write_teacher(kind, tmp_path)
        answers = []

        def check(runner):
            answers.append(runner.model.teacher(IMAGES))
            parameters = {id(p) for group in runner.optim_wrapper.param_groups for p in group['params']}
            assert parameters == {id(p) for p in runner.model.parameters()}

        recorder = Recorder(check)
        hooks = [EMA, ConfigDict(type='mmevm.DistillationHook', teacher=cfg), recorder]
        runner = train(tmp_path / 'work', hooks, model=network(distilled=True), saving=True)
        assert recorder.having('loss_distill') == recorder.having('loss') == list(range(8))
        assert len(answers) == 8
        for answer in answers:
            assert not answer.requires_grad
            torch.testing.assert_close(answer, reference(IMAGES).detach(), rtol=0, atol=0)
        assert runner.model.teacher is None

        checkpoint = torch.load(tmp_path / 'work' / 'epoch_4.pth', weights_only=False)
        assert_same(checkpoint['state_dict'], the_average(runner).state_dict())
        names = set(build(network('ImageClassifier', distilled=True)).state_dict())
        assert set(checkpoint['state_dict']) == names
        assert {name.removeprefix('module.') for name in checkpoint['ema_state_dict']} == {*names, 'steps'}

    def test_the_loss_is_of_the_teachers_choice(self, tmp_path):
        cfg, reference = write_teacher('mmpretrain init_cfg', tmp_path)
        batches = [torch.stack([sample['inputs'] for sample in dataset()[i : i + 2]]) for i in (0, 2)]
        expected = {}

        def check(runner):
            images = (batches[runner.iter % 2] - 127.5) / 127.5
            student = build(network(distilled=True)).train()
            student.load_state_dict(runner.model.state_dict())
            with torch.no_grad():
                choice = reference(images).argmax(1)
                expected[runner.iter] = -student(images)[1].log_softmax(1)[range(2), choice].mean() / 2

        recorder = Recorder(check)
        train(tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), recorder], model=network(distilled=True))
        for i in range(8):
            torch.testing.assert_close(recorder.losses[i]['loss_distill'], expected[i])

    def test_a_head_that_is_not_distilled_is_an_error(self, tmp_path):
        cfg, _ = write_teacher('mmpretrain init_cfg', tmp_path)
        runner = make_runner(tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), Recorder()])
        with pytest.raises(ConfigError, match=r'set model\.head\.distilled=True'):
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
    def test_a_teacher_without_weights_is_an_error(self, teacher):
        with pytest.raises(ConfigError, match=f'the teacher {teacher["type"]} has random weights'):
            DistillationHook(teacher)

    @pytest.mark.parametrize(
        ('kind', 'harm'),
        [
            ('timm init_cfg', 'one tensor'),
            ('mmpretrain init_cfg', 'all tensors'),
            ('mmpretrain pretrained', 'one tensor'),
        ],
    )
    def test_a_teacher_that_does_not_receive_everything_is_an_error(self, tmp_path, kind, harm):
        cfg, _ = write_teacher(kind, tmp_path)
        path = tmp_path / 'teacher.pth'
        content = torch.load(path)
        state = content.get('state_dict', content)
        (name,) = [name for name in state if name.endswith('stages.1.blocks.0.ffn.fc1.conv.weight')]
        rest = {k: v for k, v in state.items() if k != name}
        torch.save(rest if harm == 'one tensor' else {'x.y': state[name]}, path)
        runner = make_runner(
            tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), Recorder()], model=network(distilled=True)
        )
        lacks = r'lacks 1 tensors of the teacher \(.*fc1\.conv\.weight\)' if harm == 'one tensor' else r'it has x\.y'
        with pytest.raises(CheckpointError, match=lacks) as error:
            runner.train()
        assert str(path) in str(error.value)

    def test_a_teacher_of_other_classes_is_an_error(self, tmp_path):
        path = tmp_path / 'teacher.pth'
        cfg = network('ImageClassifier', num_classes=7)
        torch.save(build(cfg).state_dict(), path)
        cfg['init_cfg'] = dict(type='Pretrained', checkpoint=str(path))
        runner = make_runner(
            tmp_path, [dict(type='mmevm.DistillationHook', teacher=cfg), Recorder()], model=network(distilled=True)
        )
        with pytest.raises(ValueError, match='teacher knows 7 classes'):
            runner.train()


@pytest.mark.parametrize('hook', ['MESAHook', 'DistillationHook'])
@pytest.mark.parametrize('part', ['model', 'head'])
def test_a_model_that_cannot_be_taught_is_an_error(tmp_path, hook, part):
    model = network('ImageClassifier') if part == 'model' else network()
    if part == 'head':
        model['backbone']['out_hidden_states'] = False
        model['neck'] = dict(type='GlobalAveragePooling')
        model['head'] = dict(type='LinearClsHead', num_classes=5, in_channels=16)
    cfg = dict(type=f'mmevm.{hook}')
    if hook == 'DistillationHook':
        cfg['teacher'], _ = write_teacher('mmpretrain init_cfg', tmp_path)
    runner = make_runner(tmp_path, [EMA, cfg, Recorder()], model=model)
    with pytest.raises(ConfigError, match=f"{hook} needs model.type='mmevm.TaughtImageClassifier'"):
        runner.train()
