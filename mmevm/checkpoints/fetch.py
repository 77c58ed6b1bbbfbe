"""Checkpoints from wherever they are: local files, URLs, ``timm://`` names."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import timm
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get_local_path
from mmengine.runner.checkpoint import CheckpointLoader

from mmevm.errors import CheckpointError

from .convert import convert_checkpoint, unwrap
from .read import prefix_errors, read_checkpoint


def fetch_checkpoint(checkpoint: str, map_location: str | None = None) -> Any:
    """Read a checkpoint from wherever it is.

    Args:
        checkpoint: A local file, a URL, a ``timm://`` name, or what a file backend of mmengine has, such as ``s3://``.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        The content of the file; for ``timm://``, the converted checkpoint.

    Raises:
        CheckpointError: If there is no such file, or it cannot be fetched or read.
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
        except Exception as error:  # of a backend or of what it is made of
            raise CheckpointError(
                f'{uri} cannot be had by a file backend of mmengine ({type(error).__name__}): fetch it elsewhere and '
                'name the file.'
            ) from error
        with prefix_errors(uri):
            return read_checkpoint(path, map_location)


def _download(url: str) -> Path:
    # Every repository of a hub calls its file model.safetensors: the name alone does not tell one from another.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(urlparse(url).path).name}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    with _first_process_of_node_first():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(path), progress=False)
            except OSError as error:
                raise CheckpointError(
                    f'{url} cannot be downloaded ({error}): fetch it elsewhere and name the file.'
                ) from error
    return path


@CheckpointLoader.register_scheme(prefixes='safe://', force=True)
def load_safe(filename: str, map_location: str | None = None) -> Any:
    """Read for mmengine what follows ``safe://``, but run nothing of it: ``load_from='safe://epoch_12.pth'``.

    Args:
        filename: ``safe://`` and what :func:`fetch_checkpoint` takes.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        The content of the file, with the weights as 'state_dict', where mmengine's hooks look for them.

    Raises:
        CheckpointError: If there is no such file, if it cannot be fetched or read, or if it holds no tensors.
    """
    name = filename.removeprefix('safe://')
    content = fetch_checkpoint(name, map_location)
    with prefix_errors(name):
        state, _, _ = unwrap(content)
    return content if 'state_dict' in content else {'state_dict': state}


@CheckpointLoader.register_scheme(prefixes='timm://', force=True)
def load_from_timm(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """Download EfficientViM weights from the Hugging Face Hub, or take them from its cache, and convert them.

    Args:
        filename: ``timm://`` and what ``timm.create_model`` takes: a name with or without a pretrained tag, such as
            ``timm://efficientvim_m4.e450_in1k``, or a repository, ``timm://hf-hub:OWNER/NAME@REVISION``.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        ``{'state_dict': ..., 'meta': ...}`` as ``convert_checkpoint`` gives it.

    Raises:
        CheckpointError: If timm has no weights of that name, if they are neither in the cache (``HF_HOME``) nor can be
            downloaded, or if they are not those of an EfficientViM.
    """
    repository, revision = _repository(filename.removeprefix('timm://'))
    # timm uploads both, people sometimes one of them.
    files: list[dict[str, Any]] = [
        dict(repo_id=repository, revision=revision, filename=weights)
        for weights in ('model.safetensors', 'pytorch_model.bin')
    ]
    with _first_process_of_node_first():
        try:
            cached = [path for file in files if isinstance(path := huggingface_hub.try_to_load_from_cache(**file), str)]
            path = cached[0] if cached else _download_from_hub(files)
        except Exception as error:  # of the hub, of its HTTP library (which has changed) or of the system
            raise CheckpointError(
                f'{filename} is not in the cache of the Hugging Face Hub, and its download failed '
                f'({type(error).__name__}). Either download model.safetensors of {repository} elsewhere and '
                "name that file, init_cfg=dict(type='Pretrained', checkpoint='…/model.safetensors'), or copy a "
                'filled HF_HOME; or train from random weights, with init_cfg=None where this name is: '
                '--cfg-options model.backbone.init_cfg=None model.backbone.norm_eval=False for a detector, '
                'model.init_cfg=None for a classifier.'
            ) from error
    with prefix_errors(filename):
        converted, _ = convert_checkpoint(read_checkpoint(path, map_location))
    return converted


def _repository(name: str) -> tuple[str, str | None]:
    """Return the repository on the Hub and its revision."""
    if name.startswith(('hf-hub:', 'hf_hub:')):
        repository, _, revision = name[len('hf-hub:') :].partition('@')
        return repository, revision or None
    if not (name.startswith('efficientvim') and timm.is_model_pretrained(name)):
        names = timm.list_models('efficientvim*', pretrained=True)
        raise CheckpointError(
            f'timm {timm.__version__} has no weights of the name {name!r}. It has: '
            f'{", ".join(names) or "none of EfficientViM, which came with timm 1.0.31"}. '
            'Weights of others on the Hugging Face Hub are timm://hf-hub:OWNER/NAME.'
        )
    return str(timm.models.get_pretrained_cfg_value(name, 'hf_hub_id')), None


def _download_from_hub(files: list[dict[str, Any]]) -> str:
    """Download the first of some files that exists."""
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
    finally:  # also when it failed: the others shall fail with the same sentence, not wait for ever
        if not waits:
            barrier()
