import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.losses import CrossEntropyLoss
from mmpretrain.structures import DataSample
from randomize import randomize
from torch import nn

from mmevm.checkpoints import convert_checkpoint
from mmevm.models import EfficientViM, FusionClsHead

TINY = dict(embed_dims=(16, 24, 32), depths=(1, 2, 1), state_dims=(9, 4, 4))
CHANNELS = (16, 24, 32, 32)


@pytest.fixture
def feats():
    """Hidden states of three stages and a map, of three images."""
    shapes = [(3, 16, 9), (3, 24, 4), (3, 32, 4), (3, 32, 2, 3)]
    return tuple(torch.randn(shape, dtype=torch.double) for shape in shapes)


def make_head(distilled=False, in_channels=CHANNELS, num_classes=5, **kwargs):
    head = FusionClsHead(num_classes, in_channels, distilled, **kwargs)
    head.init_weights()
    return randomize(head).double()


def labeled(labels):
    return [DataSample().set_gt_label(label) for label in labels]


def classifier(name):
    """mmpretrain's classifier with converted weights of timm's model."""
    reference = randomize(timm.create_model(name))
    arch = name.split('_')[1]
    backbone = dict(type='mmevm.EfficientViM', arch=arch, out_indices=(2,), out_hidden_states=True)
    dims = EfficientViM.arch_settings[arch]['embed_dims']
    head = dict(
        type='mmevm.FusionClsHead', num_classes=1000, in_channels=(*dims, dims[-1]), distilled=name.endswith('dist')
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head))
    model.load_state_dict(convert_checkpoint(reference.state_dict())[0]['state_dict'], strict=True)
    return model, reference


class TestAgainstTimm:
    @pytest.mark.parametrize('dist', ['', '_dist'])
    @pytest.mark.parametrize('arch', ['m1', 'm2', 'm3', 'm4'])
    def test_logits(self, arch, dist):
        model, reference = classifier(f'efficientvim_{arch}{dist}')
        model.eval()
        reference.eval()
        for size in [(1, 3, 97, 131), (3, 3, 32, 33)] if arch == 'm1' else [(2, 3, 64, 64)]:
            x = torch.randn(size)
            with torch.no_grad():
                logits, expected = model(x), reference(x)
            assert logits.shape == (size[0], 1000)
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()

    @pytest.mark.parametrize('dist', ['', '_dist'])
    def test_gradients_of_a_training_step(self, dist):
        model, reference = classifier(f'efficientvim_m1{dist}')
        model.double().train()
        reference.double().train()
        x = torch.randn(3, 3, 64, 96, dtype=torch.double)
        labels, teacher_logits = torch.tensor([7, 999, 0]), torch.randn(3, 1000, dtype=torch.double)
        if dist:
            reference.set_distilled_training(True)
            logits, of_teacher = reference(x)
            losses = [F.cross_entropy(logits, labels) / 2, F.cross_entropy(of_teacher, teacher_logits.argmax(1)) / 2]
            ours = model.head.loss(model.extract_feat(x), labeled(labels), teacher_logits=teacher_logits)
            assert set(ours) == {'loss_cls', 'loss_distill'}
        else:
            losses = [F.cross_entropy(reference(x), labels)]
            ours = model.loss(x, labeled(labels))
            assert set(ours) == {'loss'}
        torch.testing.assert_close(list(ours.values()), losses, rtol=1e-9, atol=1e-9)
        sum(ours.values()).backward()
        sum(losses).backward()

        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        names = convert_checkpoint(reference.state_dict())[1].renamed
        expected = {names[name]: p.grad for name, p in reference.named_parameters() if names[name] in grads}
        assert set(expected) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-8)


class TestFusion:
    """Eq. 12 and 13, with the norm before the mean, as in the authors' code."""

    @pytest.mark.parametrize(
        'shapes',
        [
            [(2, 7, 3, 5)],
            [(2, 7, 3, 5), (2, 4, 1, 1)],
            [(2, 4, 6), (2, 7, 3, 5)],
            [(2, 4, 6), (2, 5, 1), (2, 7, 3), (2, 7, 3, 5)],
        ],
    )
    def test_agrees_with_its_formula(self, shapes):
        feats = [torch.randn(shape, dtype=torch.double) * 3 + 1 for shape in shapes]
        head = make_head(in_channels=[shape[1] for shape in shapes]).eval()
        expected = torch.zeros(2, 5, dtype=torch.double)
        for i, x in enumerate(feats):
            tokens = x.reshape(*x.shape[:2], -1).transpose(1, 2)  # (B, N, C)
            centered = tokens - tokens.mean(2, keepdim=True)
            normed = centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()
            normed = normed * head.norm[i].weight + head.norm[i].bias
            mean = sum(normed[:, n] for n in range(normed.shape[1])) / normed.shape[1]
            share = head.weights[i].exp() / sum(weight.exp() for weight in head.weights)
            expected += share * (mean @ head.heads[i].weight.T + head.heads[i].bias)
        torch.testing.assert_close(head(tuple(feats)), expected)

    def test_distilled_head_returns_both_logits_in_training_and_their_mean_in_eval(self, feats):
        head = make_head(distilled=True)
        labels_only = make_head()
        labels_only.load_state_dict({k: v for k, v in head.state_dict().items() if 'dist' not in k})
        teacher_only = make_head()
        teacher_only.load_state_dict(
            {**head.state_dict(), **{k.replace('_dist', ''): v for k, v in head.state_dict().items() if 'dist' in k}},
            strict=False,
        )
        expected = labels_only(feats), teacher_only(feats)
        assert not torch.allclose(*expected)
        torch.testing.assert_close(head.train()(feats), expected)
        torch.testing.assert_close(head.eval()(feats), (expected[0] + expected[1]) / 2)

    def test_images_of_a_batch_are_independent(self, feats):
        head = make_head(distilled=True).eval()
        alone = torch.cat([head(tuple(x[i : i + 1] for x in feats)) for i in range(3)])
        torch.testing.assert_close(head(feats), alone)

    def test_every_parameter_gets_a_gradient(self, feats):
        for distilled in (False, True):
            for teacher_logits in (None, torch.randn(3, 5, dtype=torch.double)):
                head = make_head(distilled).train()
                sum(head.loss(feats, labeled([0, 1, 2]), teacher_logits=teacher_logits).values()).backward()
                for name, parameter in head.named_parameters():
                    assert parameter.grad is not None, name
                    assert parameter.grad.any(), name

    def test_norm_cfg(self, feats):
        head = make_head(norm_cfg=dict(type='BN')).train()
        assert all(type(norm) is nn.BatchNorm2d for norm in head.norm)
        pooled = head.pre_logits(feats)
        for i, x in enumerate(pooled):  # over samples and states or pixels, the mean is the bias
            torch.testing.assert_close(x.mean(0), head.norm[i].bias)
        for norm in head.norm:
            norm.running_mean.normal_()
        for x, norm, out in zip(feats, head.norm, head.eval().pre_logits(feats), strict=True):
            normed = (x.flatten(2).mean(2) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            torch.testing.assert_close(out, normed * norm.weight + norm.bias)

    def test_with_the_backbone(self):
        backbone = randomize(EfficientViM(TINY, out_indices=(1, 2), out_hidden_states=True)).eval()
        head = FusionClsHead(5, backbone.out_channels).eval()
        assert head(backbone(torch.randn(2, 3, 48, 80))).shape == (2, 5)


class TestLoss:
    def test_loss_of_labels(self, feats):
        head = make_head()
        losses = head.loss(feats, labeled([4, 0, 4]))
        assert set(losses) == {'loss'}
        torch.testing.assert_close(losses['loss'], -head(feats).log_softmax(1)[range(3), [4, 0, 4]].mean())

    def test_loss_of_smoothed_and_mixed_labels(self, feats):
        smoothing = dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original')
        head = make_head(loss=smoothing)
        mixed = torch.tensor([[0.3, 0, 0.7, 0, 0], [0, 1, 0, 0, 0], [0, 0.5, 0, 0, 0.5]], dtype=torch.double)
        expected = -((0.9 * mixed + 0.1 / 5) * head(feats).log_softmax(1)).sum(1).mean()
        samples = [DataSample().set_gt_score(score) for score in mixed]
        torch.testing.assert_close(head.loss(feats, samples)['loss'], expected)

    @pytest.mark.parametrize('mixed', [False, True])
    def test_loss_with_a_teacher_is_mesa(self, feats, mixed):
        head = make_head()
        teacher_logits = torch.randn(3, 5, dtype=torch.double)
        samples = labeled([1, 2, 3])
        if mixed:
            samples = [DataSample().set_gt_score(score) for score in torch.rand(3, 5).double().softmax(1)]
        losses = head.loss(feats, samples, teacher_logits=teacher_logits)
        assert set(losses) == {'loss_cls', 'loss_mesa'}
        torch.testing.assert_close(losses['loss_cls'], head.loss(feats, samples)['loss'])
        expected = -(teacher_logits.softmax(1) * head(feats).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(losses['loss_mesa'], expected)

    def test_loss_of_a_distilled_head_with_a_teacher_is_hard_distillation(self, feats):
        head = make_head(distilled=True).train()
        logits, of_teacher = head(feats)
        teacher_logits = torch.randn(3, 5, dtype=torch.double)
        losses = head.loss(feats, labeled([1, 2, 3]), teacher_logits=teacher_logits)
        assert set(losses) == {'loss_cls', 'loss_distill'}
        torch.testing.assert_close(losses['loss_cls'], -logits.log_softmax(1)[range(3), [1, 2, 3]].mean() / 2)
        choices = [max(range(5), key=row.__getitem__) for row in teacher_logits.tolist()]
        torch.testing.assert_close(losses['loss_distill'], -of_teacher.log_softmax(1)[range(3), choices].mean() / 2)

    @pytest.mark.parametrize('training', [False, True])
    def test_loss_of_a_distilled_head_without_a_teacher(self, feats, training):
        head = make_head(distilled=True)
        mean = head.eval()(feats)
        losses = head.train(training).loss(feats, labeled([1, 2, 3]))
        assert set(losses) == {'loss'}
        torch.testing.assert_close(losses['loss'], -mean.log_softmax(1)[range(3), [1, 2, 3]].mean())

    @pytest.mark.parametrize('distilled', [False, True])
    def test_accuracy_is_that_of_the_classifiers_trained_by_labels(self, feats, distilled):
        head = make_head(distilled, cal_acc=True, topk=(1, 2)).train()
        for linear in head.heads:
            linear.bias.data += 10  # mmpretrain counts logits above 0 only
        logits = head(feats)[0] if distilled else head(feats)
        order = logits.argsort(1, descending=True)
        labels = [order[0, 0].item(), order[1, 1].item(), order[2, 4].item()]
        losses = head.loss(feats, labeled(labels), teacher_logits=-logits.detach())
        assert [acc.item() for acc in losses['accuracy_top-1']] == pytest.approx([100 / 3])
        assert [acc.item() for acc in losses['accuracy_top-2']] == pytest.approx([200 / 3])

    @pytest.mark.parametrize('distilled', [False, True])
    def test_teacher_with_other_classes_raises(self, feats, distilled):
        head = make_head(distilled)
        with pytest.raises(ValueError, match=r'num_classes=5 .* teacher, which has 6 classes'):
            head.loss(feats, labeled([0, 1, 2]), teacher_logits=torch.randn(3, 6))


class TestPrediction:
    @pytest.mark.parametrize('training', [False, True])
    @pytest.mark.parametrize('distilled', [False, True])
    def test_predicts_the_best_class_in_any_mode(self, feats, distilled, training):
        head = make_head(distilled)
        logits = head.eval()(feats)
        head.train(training)
        for sample, row in zip(head.predict(feats), logits, strict=True):
            torch.testing.assert_close(sample.pred_score, row.softmax(0))
            assert sample.pred_label.item() == row.argmax()

    def test_predictions_are_written_to_the_given_samples(self, feats):
        head = make_head()
        samples = labeled([0, 1, 2])
        predicted = head.predict(feats, samples)
        for i, (sample, given) in enumerate(zip(predicted, samples, strict=True)):
            assert sample is given
            assert sample.gt_label.item() == i
            assert sample.pred_label.item() == head(feats)[i].argmax()


def test_initial_weights():
    head = FusionClsHead(1000, (128, 192, 320, 320), distilled=True)
    head.init_weights()
    for linear in [*head.heads, *head.heads_dist]:
        assert torch.all(linear.bias == 0)
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(linear.weight.mean().item()) < 0.001
    assert torch.all(head.weights == 1)
    assert torch.all(head.weights_dist == 1)


class TestArguments:
    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            (dict(in_channels=320), r'in_channels=320: expected a list'),
            (dict(in_channels=()), r'in_channels=\(\): expected a list'),
            (dict(num_classes=0), r'num_classes=0: expected at least 1'),
            (dict(num_classes=-3), r'num_classes=-3: expected at least 1'),
        ],
    )
    def test_invalid_argument_raises(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FusionClsHead(**{'num_classes': 5, 'in_channels': CHANNELS, **arguments})

    def test_unknown_argument_raises(self):
        with pytest.raises(TypeError, match='distill'):
            FusionClsHead(5, CHANNELS, distill=True)

    @pytest.mark.parametrize(
        'given',
        [
            dict(out_indices=(2,)),
            dict(out_indices=(0, 1, 2)),
            dict(out_indices=(0, 1, 2), out_hidden_states=True),
            dict(out_indices=(1,), out_hidden_states=True),
        ],
    )
    def test_backbone_with_other_outputs_raises(self, given):
        backbone = EfficientViM(TINY, **given)
        head = FusionClsHead(5, CHANNELS)
        feats = backbone(torch.randn(2, 3, 64, 64))
        for call in (head, head.predict, lambda x: head.loss(x, labeled([0, 1]))):
            with pytest.raises(ValueError, match='out_hidden_states=True') as error:
                call(feats)
            assert str(backbone.out_channels) in str(error.value)
            assert str(CHANNELS) in str(error.value)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain'])
def test_built_from_every_default_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        head = MODELS.build(dict(type='mmevm.FusionClsHead', num_classes=5, in_channels=CHANNELS))
    assert type(head) is FusionClsHead
    assert type(head.loss_module) is CrossEntropyLoss
