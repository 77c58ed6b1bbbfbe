"""What can be exported of a segmentor: logits at the size of the image, or the class of each pixel."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def replace_upsampling(model: Any) -> None:
    """Replace MMSegmentation's ``Upsample`` by PyTorch's, in place.

    It takes ``int()`` of a size, which ``torch.export`` then takes for a constant.
    """
    from mmseg.models.utils import Upsample

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Upsample and not layer.size:
                upsample = nn.Upsample(None, layer.scale_factor, layer.mode, layer.align_corners)
                setattr(parent, name, upsample.train(layer.training))


def segment(model: Any, image: Tensor, class_map: bool = False) -> Tensor:
    """Run a segmentor on whole images, without windows and without resizing to the size of the files.

    Args:
        model: A segmentor of MMSegmentation.
        image: Preprocessed images, (B, 3, H, W).
        class_map: Whether to return classes in place of logits.

    Returns:
        Logits, (B, K, H, W) for K outputs of the head, or the index of the class of each pixel, (B, H, W) int64.
    """
    size = image.shape[2:]
    logits = model.encode_decode(image, [dict(ori_shape=size, img_shape=size, pad_shape=size)])
    return to_class_map(logits, binary_threshold(model)) if class_map else logits


def binary_threshold(model: Any) -> float | None:
    """Return the probability above which a pixel has class 1, if a segmentor has one logit for two classes."""
    return model.decode_head.threshold if model.out_channels == 1 else None


def to_class_map(logits: Tensor, threshold: float | None) -> Tensor:
    """Return the index of the class of each pixel, (B, H, W) int64.

    Args:
        logits: (B, K, H, W).
        threshold: What :func:`binary_threshold` returns.
    """
    return logits.argmax(1) if threshold is None else (logits.sigmoid() > threshold).long().squeeze(1)


def compare_class_maps(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the share of pixels whose class differs; rounding decides between logits that are almost equal."""
    return [(out != ref).double().mean().item() for out, ref in zip(outputs, expected, strict=True)]
