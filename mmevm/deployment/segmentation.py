"""What can be exported of a segmentor: logits at the size of the image, or the class of each pixel."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


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
    if not class_map:
        return logits
    if model.out_channels == 1:  # two classes
        return (logits.sigmoid() > model.decode_head.threshold).long().squeeze(1)
    return logits.argmax(1)


def compare_class_maps(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the share of pixels whose class differs; rounding decides between logits that are almost equal."""
    return [(out != ref).double().mean().item() for out, ref in zip(outputs, expected, strict=True)]
