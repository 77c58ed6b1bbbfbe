"""Switch a whole detector or classifier to deploy mode."""

from collections import Counter

import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmevm.models.fuse import can_fold, fold_batch_norm


@torch.no_grad()
@torch.inference_mode(mode=False)  # inference tensors could not be changed in place later
def deploy(model: nn.Module) -> nn.Module:
    """Switch a model to deploy mode in place: the same outputs, faster.

    Modules with a ``switch_to_deploy`` method, such as ``EfficientViM``, are switched by it. In mmcv's ``ConvModule``,
    BatchNorm is folded into the convolution before it where that is exact: the convolution must be a plain one (no
    weight standardization, spectral norm or hooks, not deformable or transposed) that no other module uses, and the
    BatchNorm must have running statistics. Everything else stays as it is.

    Args:
        model: A backbone, classifier or detector, with its weights.

    Returns:
        The model, in eval mode. It cannot be trained any more.

    Raises:
        TypeError: If a layer of an ``EfficientViM`` was replaced by one of another type.
        ValueError: If a norm of an ``EfficientViM`` is not a BatchNorm, or a convolution of it is not a plain one.
    """
    for module in list(model.modules()):
        switch_to_deploy = getattr(module, 'switch_to_deploy', None)
        if switch_to_deploy is not None:
            switch_to_deploy()
    uses = Counter(child for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        # TOOD's TaskDecomposition uses the weight of the convolution, and calls norm and activation itself.
        if type(module).__name__ == 'TaskDecomposition':
            uses.update(child.conv for child in module.children() if isinstance(child, ConvModule))
    for layer in model.modules():
        if isinstance(layer, ConvModule) and _can_fold(layer) and uses[layer.conv] == 1:
            _fold(layer)
    model.eval()  # in MMDetection, eval() of some modules returns None
    return model


def _can_fold(layer: ConvModule) -> bool:
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
    layer.efficient_conv_bn_eval_forward = None  # it expects a BatchNorm
