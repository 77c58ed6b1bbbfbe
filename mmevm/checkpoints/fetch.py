"""Find checkpoints: local files, URLs, ``timm://`` names and mmengine's file backends."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get_local_path

from mmevm.download import download
from mmevm.errors import CheckpointError

from .convert import convert_checkpoint
from .read import prefix_errors, read_checkpoint
from .state_dict import unwrap


def fetch_checkpoint(checkpoint: str, map_location: str | None = None) -> Any:
    """Read a checkpoint, and download it first if necessary.

    Args:
        checkpoint: A local file, a URL, a ``timm://`` name, or a path of mmengine's file backends, such as ``s3://``.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        The content of the file; for ``timm://``, the converted checkpoint.

    Raises:
        CheckpointError: If the file does not exist, or cannot be downloaded or read.
    """
    if checkpoint.startswith(('http://', 'https://')):
        return read_checkpoint(_download(checkpoint), map_location)
    if checkpoint.startswith('timm://'):
        return load_from_timm(checkpoint, map_location)
    if '://' in checkpoint:  # mmengine's CheckpointLoader would unpickle it
        return _read_from_backend(checkpoint, map_location)
    return read_checkpoint(checkpoint, map_location)


def _read_from_backend(uri: str, map_location: str | None) -> Any:
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(get_local_path(uri))
        except Exception as error:  # of the backend or its dependencies
            raise CheckpointError(
                f'{uri}: download by the file backend of mmengine failed ({type(error).__name__}). Download the file '
                'by other means and give its path.'
            ) from error
        with prefix_errors(uri):
            return read_checkpoint(path, map_location)


def _download(url: str) -> Path:
    # Files of different repositories have the same name, such as model.safetensors.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlparse(url).path).name}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    with _first_process_of_node_first():
        try:
            download(url, path)
        except OSError as error:
            raise CheckpointError(
                f'{url}: download failed ({error}). Download the file by other means and give its path.'
            ) from error
    return path


def load_safe(filename: str, map_location: str | None = None) -> Any:
    """Load a checkpoint for mmengine without running anything from it: ``load_from='safe://epoch_12.pth'``.

    Args:
        filename: ``safe://`` and an argument of :func:`fetch_checkpoint`.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        The content of the file, with the weights under 'state_dict', which mmengine's hooks need.

    Raises:
        CheckpointError: If the file does not exist, cannot be downloaded or read, or has no tensors.
    """
    name = strip_scheme(filename)
    content = fetch_checkpoint(name, map_location)
    with prefix_errors(name):
        state, _, _ = unwrap(content)
    return {**content, 'state_dict': state} if 'state_dict' in content else {'state_dict': state}


def strip_scheme(load_from: str) -> str:
    """Return the name of a checkpoint without the scheme that makes mmengine load it by mmevm."""
    return load_from.removeprefix('safe://').removeprefix('resume://')


def load_from_timm(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """Download EfficientViM weights from the Hugging Face Hub, or take them from its cache, and convert them.

    Args:
        filename: ``timm://`` and a name of ``timm.create_model``, with or without a pretrained tag, such as
            ``timm://efficientvim_m4.e450_in1k``, or a repository, ``timm://hf-hub:OWNER/NAME@REVISION``.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        ``{'state_dict': ..., 'meta': ...}``, as ``convert_checkpoint`` returns it.

    Raises:
        CheckpointError: If timm has no weights of that name, if they are not in the cache (``HF_HOME``) and cannot be
            downloaded, or if they are not those of an EfficientViM.
    """
    repository, revision = _repository(filename.removeprefix('timm://'))
    files: list[dict[str, Any]] = [  # timm uploads both, others may upload one of them
        dict(repo_id=repository, revision=revision, filename=weights)
        for weights in ('model.safetensors', 'pytorch_model.bin')
    ]
    with _first_process_of_node_first():
        try:
            cached = [path for file in files if isinstance(path := huggingface_hub.try_to_load_from_cache(**file), str)]
            path = cached[0] if cached else _download_from_hub(files)
        except Exception as error:  # of the hub, its HTTP library (which has changed) or the system
            raise CheckpointError(
                f'{filename}: download failed ({type(error).__name__}), and it is not in the cache of the Hugging Face '
                f'Hub. Download model.safetensors of {repository} by other means and give its path, '
                "init_cfg=dict(type='Pretrained', checkpoint='…/model.safetensors'), or copy a filled HF_HOME. Or "
                'train from random weights: --cfg-options model.backbone.init_cfg=None model.backbone.norm_eval=False '
                'for a detector, model.init_cfg=None for a classifier.'
            ) from error
    with prefix_errors(filename):
        converted, _ = convert_checkpoint(read_checkpoint(path, map_location))
    return converted


def _repository(name: str) -> tuple[str, str | None]:
    """Return the repository on the Hub and its revision."""
    if name.startswith(('hf-hub:', 'hf_hub:')):
        repository, _, revision = name[len('hf-hub:') :].partition('@')
        return repository, revision or None
    import timm  # takes seconds, and other checkpoints do not need it

    if not (name.startswith('efficientvim') and timm.is_model_pretrained(name)):
        names = timm.list_models('efficientvim*', pretrained=True)
        raise CheckpointError(
            f'timm://{name} is not a name of EfficientViM weights in timm {timm.__version__}, which has '
            f'{", ".join(names) or "none; install timm>=1.0.31"}. '
            'For other weights on the Hugging Face Hub, use timm://hf-hub:OWNER/NAME.'
        )
    return str(timm.models.get_pretrained_cfg_value(name, 'hf_hub_id')), None


def _download_from_hub(files: list[dict[str, Any]]) -> str:
    """Download the first file that exists."""
    for file in files:
        url = huggingface_hub.hf_hub_url(**file)
        try:
            # Without a network, hf_hub_download retries for half a minute, but this fails at once.
            huggingface_hub.get_hf_file_metadata(url, timeout=10)
        except huggingface_hub.utils.EntryNotFoundError:
            if file is files[-1]:
                raise
        else:
            break
    return huggingface_hub.hf_hub_download(**file)


@contextlib.contextmanager
def _first_process_of_node_first() -> Iterator[None]:
    """Let the other processes of a node wait until the first one has filled the cache."""
    waits = int(os.environ.get('LOCAL_RANK', get_rank())) > 0
    if waits:
        barrier()
    try:
        yield
    finally:  # also after an error: the others must fail too, not wait forever
        if not waits:
            barrier()
