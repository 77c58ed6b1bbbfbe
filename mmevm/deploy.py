"""A whole detector or classifier in its form for inference."""

from collections import Counter

from mmcv.cnn import ConvModule, fuse_conv_bn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def deploy(model: nn.Module) -> nn.Module:
    """Take the form for inference, in place: the same outputs, faster.

    Every part with a ``switch_to_deploy``, such as ``EfficientViM``, does that; elsewhere BatchNorms are multiplied out
    into the convolutions before them, but for convolutions that several norms share.

    Args:
        model: A backbone, classifier or detector, with its weights.

    Returns:
        The model, in eval mode. It cannot be trained any more.

    Raises:
        ValueError: If a norm of an ``EfficientViM`` is no BatchNorm.
    """
    for module in list(model.modules()):
        switch_to_deploy = getattr(module, 'switch_to_deploy', None)
        if switch_to_deploy is not None:
            switch_to_deploy()
    layers = {module for module in model.modules() if isinstance(module, ConvModule)}
    uses = Counter(layer.conv for layer in layers)
    for layer in layers:
        in_order = layer.with_norm and layer.order.index('norm') == layer.order.index('conv') + 1
        if in_order and isinstance(layer.norm, _BatchNorm) and uses[layer.conv] == 1:
            fuse_conv_bn(layer)
    model.eval()  # some of MMDetection's return nothing
    return model
