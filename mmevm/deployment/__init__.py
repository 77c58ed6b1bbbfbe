"""Prepare a trained model for inference: fuse its layers, export it to ONNX with or without post-processing."""

from .deploy import deploy

__all__ = ['deploy']
