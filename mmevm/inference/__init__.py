"""Run a trained detector, classifier or segmentor on images, folders, videos, cameras and URLs.

``inputs`` expands what the user names; ``detection``, ``classification`` and ``segmentation`` are the inferencers of
MMDetection and MMPretrain and one for MMSegmentation, with safe, strict loading and class names (``build`` chooses),
``onnx`` has those of exported files;
``predictor`` runs one over the inputs and writes pictures, videos and JSON files. Another task needs an
:class:`Inferencer` and an entry in ``build``.
"""

from .build import build_inferencer
from .inputs import Inputs, find_inputs
from .onnx import build_onnx_inferencer, check_images
from .predictor import Inferencer, Predictor

__all__ = [
    'Inferencer',
    'Inputs',
    'Predictor',
    'build_inferencer',
    'build_onnx_inferencer',
    'check_images',
    'find_inputs',
]
