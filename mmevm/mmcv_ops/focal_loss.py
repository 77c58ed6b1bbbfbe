"""Focal losses of logits (sigmoid) and of probabilities (softmax), and their derivatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widen


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Loss of each logit of ``input``, written to ``output``, both (N, C).

    ``target`` is the class of each row, (N,), where C is background. ``weight`` is empty or what each class weighs,
    (C,); background weighs 1.
    """
    log_p, q, _, balance = _sigmoid_terms(input, target, weight, alpha)
    output.copy_(-balance * q**gamma * log_p)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of each loss by its logit, written to ``grad_input``, (N, C)."""
    log_p, q, sign, balance = _sigmoid_terms(input, target, weight, alpha)
    grad_input.copy_(-sign * balance * q**gamma * (q - gamma * (1 - q) * log_p))


def _sigmoid_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the right answer, yes or no, for each logit: log of its probability p, 1 - p, its sign, and its weight."""
    logits = widen(input)
    positive = (target[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    sign = 2 * positive - 1
    balance = alpha * positive + (1 - alpha) * (1 - positive)
    if weight.numel():
        padded = F.pad(weight.to(logits.dtype), (0, 1), value=1)
        balance = balance * padded[target.clamp(max=len(weight))][:, None]
    return F.logsigmoid(sign * logits), torch.sigmoid(-sign * logits), sign, balance


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Loss of each row of ``input``, which is the softmax, (N, C), written to ``output``, (N,).

    ``target`` is the class of each row, (N,); rows of a negative class are ignored. ``weight`` is empty or what each
    class weighs, (C,).
    """
    p, q, balance = _softmax_terms(input, target, weight, alpha)
    output.copy_(-balance * q**gamma * p.log())


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of each loss by the logits that the softmax was of, written to ``grad_input``, (N, C)."""
    p, q, balance = _softmax_terms(input, target, weight, alpha)
    # dloss/dp times p, which is what the derivative of the softmax asks for.
    slope = balance * (gamma * q ** (gamma - 1) * p * p.log() - q**gamma)
    buff.copy_(slope)
    hot = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_(slope[:, None] * (hot.to(slope.dtype) - widen(input)))


def _softmax_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probability p of each row's class, 1 - p, and the row's weight; both probabilities kept off 0."""
    probabilities = widen(input)
    tiny = torch.finfo(torch.float32).tiny
    label = target.clamp(min=0)
    p = probabilities.gather(1, label[:, None])[:, 0]
    balance = alpha * (target >= 0).to(p.dtype)
    if weight.numel():
        balance = balance * weight.to(p.dtype)[label]
    return p.clamp(min=tiny), (1 - p).clamp(min=tiny), balance
