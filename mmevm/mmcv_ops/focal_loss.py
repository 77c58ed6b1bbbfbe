"""Sigmoid and softmax focal loss, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widen


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each logit of ``input`` to ``output``, both (N, C).

    ``target`` is the class of each row, (N,), where C is the background. ``weight`` is empty or holds the class
    weights, (C,); the background has weight 1.
    """
    log_p, q, _, balance = _sigmoid_terms(input, target, weight, alpha)
    output.copy_(-balance * q**gamma * log_p)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss with respect to its logit to ``grad_input``, (N, C)."""
    log_p, q, sign, balance = _sigmoid_terms(input, target, weight, alpha)
    grad_input.copy_(-sign * balance * q**gamma * (q - gamma * (1 - q) * log_p))


def _sigmoid_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p, 1 - p, sign and weight for each logit, all (N, C) or broadcastable to it.

    p is the probability of the correct binary label: sigmoid(sign · logit), with sign 1 for the target class and -1 for
    the others.
    """
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
    """Write the loss of each row of ``input``, the softmax of the logits, (N, C), to ``output``, (N,).

    ``target`` is the class of each row, (N,); rows with a negative class are ignored. ``weight`` is empty or holds the
    class weights, (C,).
    """
    p, q, balance = _softmax_terms(input, target, weight, alpha)
    output.copy_(-balance * q**gamma * p.log())


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss with respect to the logits to ``grad_input``, (N, C)."""
    p, q, balance = _softmax_terms(input, target, weight, alpha)
    # p · dloss/dp; the derivative of the softmax provides the factor p.
    slope = balance * (gamma * q ** (gamma - 1) * p * p.log() - q**gamma)
    buff.copy_(slope)
    one_hot = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_(slope[:, None] * (one_hot.to(slope.dtype) - widen(input)))


def _softmax_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probability p of the target class, 1 - p, both clamped above 0, and the weight, each (N,)."""
    probabilities = widen(input)
    tiny = torch.finfo(torch.float32).tiny
    label = target.clamp(min=0)
    p = probabilities.gather(1, label[:, None])[:, 0]
    balance = alpha * (target >= 0).to(p.dtype)
    if weight.numel():
        balance = balance * weight.to(p.dtype)[label]
    return p.clamp(min=tiny), (1 - p).clamp(min=tiny), balance
