from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import SigmoidFocalLoss, SoftmaxFocalLoss, sigmoid_focal_loss, softmax_focal_loss
from torch import Tensor

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU have no fixed order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

CLASSES = 5


def classes() -> Tensor:
    return torch.tensor([0, 4, 2, 1, 3, 3])


def classes_and_background() -> Tensor:
    return torch.tensor([0, CLASSES, 2, CLASSES, 3, 4])


def logits() -> Tensor:
    return torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True)


def reference_sigmoid(x: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    one_hot = F.one_hot(target, CLASSES + 1)[:, :CLASSES].bool()
    p = x.sigmoid()
    return torch.where(one_hot, -alpha * (1 - p) ** gamma * p.log(), -(1 - alpha) * p**gamma * (1 - p).log())


def reference_softmax(x: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    p = x.softmax(dim=1)[range(len(target)), target]
    return -alpha * (1 - p) ** gamma * p.log()


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.0, 0.5), (0.5, 0.8)])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_sigmoid_focal_loss_and_gradient(gamma: float, alpha: float, reduction: str) -> None:
    x = logits()
    expected = reference_sigmoid(x, classes_and_background(), gamma, alpha)
    expected = {'none': expected, 'mean': expected.sum() / len(x), 'sum': expected.sum()}[reduction]
    loss = sigmoid_focal_loss(x, classes_and_background(), gamma, alpha, None, reduction)
    torch.testing.assert_close(loss, expected)
    grads = (torch.autograd.grad((value**2).sum(), x) for value in (loss, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.0, 1.0), (0.5, 0.8)])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_softmax_focal_loss_and_gradient(gamma: float, alpha: float, reduction: str) -> None:
    x = logits()
    expected = getattr(reference_softmax(x, classes(), gamma, alpha), reduction)()
    loss = softmax_focal_loss(x, classes(), gamma, alpha, None, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value**2, x) for value in (loss, expected)))


def test_softmax_focal_loss_without_reduction() -> None:
    x = logits()
    loss = softmax_focal_loss(x, classes(), 2.0, 0.25, None, 'none')
    torch.testing.assert_close(loss, reference_softmax(x, classes(), 2.0, 0.25))


def test_class_weights_scale_rows() -> None:
    weight = torch.rand(CLASSES, dtype=torch.float64)
    x = logits()
    sigmoid = SigmoidFocalLoss(2.0, 0.25, weight, 'sum')
    torch.testing.assert_close(
        sigmoid(x, classes()), (reference_sigmoid(x, classes(), 2.0, 0.25) * weight[classes()][:, None]).sum()
    )
    softmax = SoftmaxFocalLoss(2.0, 0.25, weight, 'sum')
    torch.testing.assert_close(
        softmax(x, classes()), (reference_softmax(x, classes(), 2.0, 0.25) * weight[classes()]).sum()
    )
    assert gradcheck(lambda y: sigmoid(y, classes()), (x,))
    assert gradcheck(lambda y: softmax(y, classes()), (x,))


def test_background_has_weight_one() -> None:
    x = logits()
    weight = torch.rand(CLASSES, dtype=torch.float64)
    losses = sigmoid_focal_loss(x, classes_and_background(), 2.0, 0.25, weight, 'none')
    background = classes_and_background() == CLASSES
    torch.testing.assert_close(
        losses[background], reference_sigmoid(x, classes_and_background(), 2.0, 0.25)[background]
    )


def test_softmax_focal_loss_ignores_negative_classes() -> None:
    x = logits()
    target = classes().clone()
    target[2] = -1
    loss = softmax_focal_loss(x, target, 2.0, 0.25, None, 'sum')
    (grad,) = torch.autograd.grad(loss, x)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(loss, reference_softmax(x[others], classes()[others], 2.0, 0.25).sum())
    assert not grad[2].any()


@pytest.mark.parametrize('function', [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_extreme_logits_give_finite_loss_and_gradient(function, gamma: float) -> None:
    x = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = function(x, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('function', [sigmoid_focal_loss, softmax_focal_loss])
def test_half_precision(function, dtype: torch.dtype) -> None:
    x = logits().detach().to(dtype).requires_grad_()
    loss = function(x, classes(), 2.0, 0.25, None, 'sum')
    assert loss.dtype == dtype
    expected = function(x.float(), classes(), 2.0, 0.25, None, 'sum')
    torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=1e-3)
    grads = (torch.autograd.grad(value, x)[0].float() for value in (loss, expected))
    torch.testing.assert_close(*grads, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize('function', [sigmoid_focal_loss, softmax_focal_loss])
def test_empty_input(function) -> None:
    x = torch.zeros(0, CLASSES, requires_grad=True)
    function(x, classes()[:0], 2.0, 0.25, None, 'sum').backward()
    assert x.grad.shape == (0, CLASSES)
