import functools

from mmengine.config import utils


def read_once():
    """Cache the model index of MMDetection, hundreds of YAML files, which mmengine reads for each ``mmdet::`` name."""
    if not hasattr(utils.load, 'cache_info'):
        utils.load = functools.cache(utils.load)
