"""A whole detector or classifier in its form for inference."""

from collections import Counter

import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmevm.models.fuse import can_fold, fold_batch_norm


@torch.no_grad()
@torch.inference_mode(mode=False)  # inference tensors could not be changed in place later
def deploy(model: nn.Module) -> nn.Module:
    """Take the form for inference, in place: the same outputs, faster.

    Every part with a ``switch_to_deploy``, such as ``EfficientViM``, does that; elsewhere BatchNorms are multiplied out
    into the convolutions before them. This is done in mmcv's ``ConvModule`` only, and where it is known to be exact:
    for plain convolutions (weight standardisation, spectral norm, hooks, deformable and transposed convolutions stay as
    they are) that no other module shares, and BatchNorms with running statistics.

    Args:
        model: A backbone, classifier or detector, with its weights.

    Returns:
        The model, in eval mode. It cannot be trained any more.

    Raises:
        TypeError: If a part of an ``EfficientViM`` was replaced by one of another type.
        ValueError: If a norm of an ``EfficientViM`` is no BatchNorm, or a convolution of it is not a plain one.
    """
    for module in list(model.modules()):
        switch_to_deploy = getattr(module, 'switch_to_deploy', None)
        if switch_to_deploy is not None:
            switch_to_deploy()
    uses = Counter(child for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        # TOOD's TaskDecomposition calls norm and activation itself.
        if type(module).__name__ == 'TaskDecomposition':
            uses.update(child.conv for child in module.children() if isinstance(child, ConvModule))
    for layer in model.modules():
        if isinstance(layer, ConvModule) and _is_foldable(layer) and uses[layer.conv] == 1:
            _fold(layer)
    model.eval()  # some of MMDetection's return nothing
    return model


def _is_foldable(layer: ConvModule) -> bool:
    return (
        type(layer).forward is ConvModule.forward
        and layer.with_norm
        and layer.order.index('norm') == layer.order.index('conv') + 1
        and can_fold(layer.conv, layer.norm)
    )


def _fold(layer: ConvModule) -> None:
    conv = layer.conv
    weight, bias = fold_batch_norm(conv, layer.norm)
    requires_grad = conv.weight.requires_grad
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad)
    setattr(layer, layer.norm_name, nn.Identity())
    layer.efficient_conv_bn_eval_forward = None  # which expects a BatchNorm
