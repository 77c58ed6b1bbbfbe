"""From the masks of an exported file to masks of the size of an image, as MMDetection computes them."""

import math

import cv2
import numpy as np


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """Paste the masks of a two-stage detector into an image.

    Args:
        masks: Probabilities within the box of each object, (N, S, S) float32.
        boxes: x1, y1, x2, y2 in pixels of the image, (N, 4).
        size: Height and width of the image.
        threshold: Lowest probability of a pixel of an object.

    Returns:
        Boolean masks, (N, height, width).
    """
    results = np.zeros((len(masks), *size), bool)
    for result, mask, (x1, y1, x2, y2) in zip(results, masks, boxes, strict=True):
        rows, columns = _weights(y1, y2, size[0], mask.shape[0]), _weights(x1, x2, size[1], mask.shape[1])
        result[:] = rows @ mask @ columns.T >= threshold
    return results


def _weights(start: float, end: float, size: int, count: int) -> np.ndarray:
    """Weights of bilinear interpolation, zero outside of the box: (size, count)."""
    position = (np.arange(size, dtype=np.float32) + 0.5 - start) / max(end - start, 1e-6) * count - 0.5
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(count, dtype=np.float32)))


def resize_masks(
    masks: np.ndarray, stride: int, scale: tuple[float, float], size: tuple[int, int], threshold: float
) -> np.ndarray:
    """Enlarge the masks of RTMDet-Ins to the size of an image.

    Args:
        masks: Logits of the whole input, (N, H', W') float32.
        stride: Of the masks, in pixels of the input.
        scale: Width and height of the input (without its padding) relative to those of the image.
        size: Height and width of the image.
        threshold: Logit above which a pixel belongs to an object.

    Returns:
        Boolean masks, (N, height, width).
    """
    results = np.zeros((len(masks), *size), bool)
    for result, mask in zip(results, masks, strict=True):
        height, width = (side * stride for side in mask.shape)
        mask = cv2.resize(mask, (width, height))
        # As MMDetection: first to the size of the input, then to that of the image.
        if scale != (1, 1):
            mask = cv2.resize(mask, (math.ceil(width * (1 / scale[0])), math.ceil(height * (1 / scale[1]))))
        mask = mask[: size[0], : size[1]]
        result[: mask.shape[0], : mask.shape[1]] = mask > threshold
    return results
