import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.structures import DataSample
from randomize import randomize
from torch import nn

from mmevm.checkpoints import CheckpointError
from mmevm.errors import ConfigError

TINY = dict(embed_dims=(16, 24, 32), depths=(1, 2, 1), state_dims=(9, 4, 4))


def build(kind, distilled=False, **kwargs):
    cfg = dict(
        type=kind,
        backbone=dict(type='mmevm.EfficientViM', arch=TINY, out_indices=(2,), out_hidden_states=True),
        head=dict(type='mmevm.FusionClsHead', num_classes=5, in_channels=(16, 24, 32, 32), distilled=distilled),
        data_preprocessor=dict(num_classes=5),
        **kwargs,
    )
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return randomize(MODELS.build(cfg))


def pair(**kwargs):
    student, plain = build('mmevm.DistillationClassifier', **kwargs), build('ImageClassifier', **kwargs)
    assert type(plain) is ImageClassifier
    plain.load_state_dict(student.state_dict(), strict=True)
    return student, plain


@pytest.fixture
def batch():
    return torch.randn(4, 3, 48, 48), [DataSample().set_gt_label(label) for label in (0, 4, 2, 2)]


class Teacher(nn.Module):
    """Record the inputs, and return logits that require gradients."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.seen = []

    def forward(self, inputs):
        self.seen.append(inputs.clone())
        return self.linear(inputs.mean((2, 3)))


@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('has_teacher', [False, True])
def test_state_dict_equals_that_of_image_classifier(distilled, has_teacher):
    student, plain = pair(distilled=distilled)
    if has_teacher:
        teacher = Teacher()
        student.teacher = lambda inputs: teacher(inputs)
    assert list(student.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in student.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in student.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize('distilled', [False, True])
def test_without_teacher_equals_image_classifier(batch, distilled):
    student, plain = pair(distilled=distilled)
    student.train()
    plain.train()
    torch.testing.assert_close(student(*batch, mode='loss'), plain(*batch, mode='loss'))
    student.eval()
    plain.eval()
    torch.testing.assert_close(student(batch[0]), plain(batch[0]))
    for ours, theirs in zip(student.predict(batch[0]), plain.predict(batch[0]), strict=True):
        torch.testing.assert_close(ours.pred_score, theirs.pred_score)


@pytest.mark.parametrize(('distilled', 'name'), [(False, 'loss_mesa'), (True, 'loss_distill')])
def test_teacher_affects_only_the_loss(batch, distilled, name):
    model = build('mmevm.DistillationClassifier', distilled=distilled).train()
    teacher = Teacher()
    model.teacher = lambda inputs: teacher(inputs)
    losses = model(*batch, mode='loss')
    expected = model.head.loss(model.extract_feat(batch[0]), batch[1], teacher_logits=teacher(batch[0]))
    assert set(losses) == {'loss_cls', name}
    torch.testing.assert_close(losses, expected)
    teacher.seen.clear()
    model.eval()
    model(*batch, mode='predict')
    model(batch[0])
    assert not teacher.seen


@pytest.mark.parametrize('distilled', [False, True])
def test_teacher_gets_no_gradient(batch, distilled):
    model = build('mmevm.DistillationClassifier', distilled=distilled).train()
    teacher = Teacher()
    model.teacher = lambda inputs: teacher(inputs)
    sum(model.loss(*batch).values()).backward()
    assert len(teacher.seen) == 1
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_teacher_gets_the_images_after_mixup(batch):
    model = build('mmevm.DistillationClassifier', train_cfg=dict(augments=dict(type='Mixup', alpha=0.8))).train()
    teacher = Teacher()
    model.teacher = lambda inputs: teacher(inputs)
    student = []
    model.backbone.register_forward_pre_hook(lambda module, args: student.append(args[0].clone()))
    images = [image.mul(255).byte() for image in batch[0].sigmoid()]
    data = model.data_preprocessor(dict(inputs=images, data_samples=batch[1]), training=True)
    plain = model.data_preprocessor(dict(inputs=images, data_samples=batch[1]), training=False)['inputs']
    model(**data, mode='loss')
    assert 'gt_score' in data['data_samples'][0]
    assert len(student) == len(teacher.seen) == 1
    assert torch.equal(teacher.seen[0], student[0])
    assert not torch.allclose(teacher.seen[0], plain)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_has_no_teacher(batch, duplicate):
    model = build('mmevm.DistillationClassifier').eval()
    teacher = Teacher()
    model.teacher = lambda inputs: teacher(inputs)  # a lambda cannot be pickled
    copied = duplicate(model)
    assert copied.teacher is None
    assert model.teacher is not None
    torch.testing.assert_close(copied(batch[0]), model(batch[0]))
    assert set(copied.loss(*batch)) == {'loss'}
    assert set(model.loss(*batch)) == {'loss_cls', 'loss_mesa'}


class TestPretrained:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / 'trained.pth'
        torch.save(dict(state_dict=randomize(build('ImageClassifier'), seed=1).state_dict()), path)
        return path

    def test_backbone_and_head_get_every_tensor(self, file):
        model = build('mmevm.DistillationClassifier', init_cfg=dict(type='Pretrained', checkpoint=str(file)))
        model.init_weights()
        torch.testing.assert_close(dict(model.state_dict()), dict(torch.load(file)['state_dict']))

    @pytest.mark.parametrize('part', ['backbone', 'head'])
    def test_missing_tensor_raises(self, file, part):
        state = torch.load(file)['state_dict']
        state.pop(next(name for name in state if name.startswith(part)))
        torch.save(dict(state_dict=state), file)
        model = build('mmevm.DistillationClassifier', init_cfg=dict(type='Pretrained', checkpoint=str(file)))
        with pytest.raises(CheckpointError, match='1 missing'):
            model.init_weights()

    def test_prefix_raises(self, file):
        init_cfg = dict(type='Pretrained', checkpoint=str(file), prefix='backbone.')
        model = build('mmevm.DistillationClassifier', init_cfg=init_cfg)
        with pytest.raises(ConfigError, match=r'give backbone\.init_cfg and head\.init_cfg'):
            model.init_weights()
