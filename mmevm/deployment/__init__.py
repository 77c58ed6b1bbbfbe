"""Prepare a trained model for inference: deploy mode, and ONNX export with or without post-processing."""

from .deploy import deploy

__all__ = ['deploy']
