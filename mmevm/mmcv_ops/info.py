"""Compiler versions for environment reports."""


def get_compiler_version() -> str:
    """Return the text that ``mmcv.ops.get_compiler_version`` reports as the compiler of the operators."""
    return 'none (fallback operators of mmevm)'


def get_compiling_cuda_version() -> str:
    """Return the text that an mmcv compiled without CUDA reports."""
    return 'not available'
