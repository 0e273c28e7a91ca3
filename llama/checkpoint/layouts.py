"""Read a model's folder in Meta's layout or in Hugging Face's, whichever it is in.

A folder with `params.json` is in Meta's layout. A folder without it is in Hugging Face's if it contains `config.json`, and
weights or a packed file.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..quantization.weight import FORMATS
from . import hugging_face, hugging_face_config, params, shards
from .adapter_config import CONFIG
from .shards import Shards

_FOR_ADAPTER = "give the folder of the model that was adapted as ckpt_dir, and this folder as adapter"


def uses_hugging_face(folder: Path) -> bool:
    """Return True if a folder is in Hugging Face's layout."""
    names = {*params.list_folder(folder)}
    packed = {f"{format}.safetensors" for format in ("bfloat16", *FORMATS)}
    return "params.json" not in names and "config.json" in names and bool(names & (packed | {*hugging_face.FILES}))


def is_adapter(folder: Path) -> bool:
    """Return True if a folder contains an adapter and no model."""
    names = params.list_folder(folder)
    return CONFIG in names and "params.json" not in names and not uses_hugging_face(folder)


def read_params(ckpt_dir: str | os.PathLike[str], for_adapter: str = _FOR_ADAPTER) -> dict[str, Any]:
    """Return the contents of params.json or config.json as arguments of ModelArgs. Raise CheckpointError for any bad value.

    for_adapter: what the error for a folder with an adapter advises.
    """
    folder = params.check_folder(ckpt_dir)
    if is_adapter(folder):
        raise CheckpointError(f"{folder}: it contains an adapter ({CONFIG}), not a model: {for_adapter}")
    return hugging_face_config.read_config(folder) if uses_hugging_face(folder) else params.read_params(folder)


def weight_paths(ckpt_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the paths of a folder's files of weights, without its packed files; an empty list if there are none."""
    folder = Path(ckpt_dir).expanduser()
    return hugging_face.weight_paths(folder) if uses_hugging_face(folder) else shards.shard_paths(folder)


def open_weights(ckpt_dir: str | os.PathLike[str], values: bool = True) -> Shards:
    """Map a folder's weights. values: if False, the tensors have names, shapes and dtypes only, and nothing is mapped.

    Raises CheckpointError if a file is missing, damaged or unreadable.
    """
    folder = Path(ckpt_dir).expanduser()
    if uses_hugging_face(folder):
        return hugging_face.open_weights(folder, values)
    return shards.open_shards(folder, values)


def stored_embedding(ckpt_dir: str | os.PathLike[str]) -> torch.Tensor | None:
    """Return the stored embedding without its values, on the meta device; None if the folder has no weights."""
    return open_weights(ckpt_dir, values=False).first.get("tok_embeddings.weight") if weight_paths(ckpt_dir) else None


def notes(ckpt_dir: str | os.PathLike[str], max_seq_len: int) -> list[str]:
    """Return a line about each setting of a folder that this library does not follow.

    max_seq_len: the context length. Raises CheckpointError if the model cannot be run with it.
    """
    folder = Path(ckpt_dir).expanduser()
    return hugging_face_config.notes(folder, max_seq_len) if uses_hugging_face(folder) else []
