"""Measure a model: parameters and multiply-accumulates (``complexity``), time and memory (``latency``)."""
