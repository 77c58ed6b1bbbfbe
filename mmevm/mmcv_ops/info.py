"""What environment reports say in place of a compiler."""


def get_compiler_version() -> str:
    """Of mmcv's operators, as ``mmcv.ops.get_compiler_version`` reports it."""
    return "none (mmevm's stand-in for mmcv._ext)"


def get_compiling_cuda_version() -> str:
    """Of mmcv's operators: what an mmcv compiled without CUDA says."""
    return 'not available'
