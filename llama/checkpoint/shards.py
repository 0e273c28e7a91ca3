"""TODO."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, identify_format, read_file
from . import torch_file
from .params import describe_folder, list_folder

# The dimension along which shards, and ranks, split a weight; None: the same in every shard.
SPLIT_DIMS: dict[str, int | None] = {
    "tok_embeddings": 1,
    "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
IGNORED_TENSORS = re.compile(
    r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs"
)  # in Meta's files; computed here


class Shards(dict[str, dict[str, torch.Tensor]]):
    """File name -> tensor name -> mapped tensor; and what stood at the files' paths before they were mapped."""

    def __init__(self, tensors: dict[str, dict[str, torch.Tensor]], stamps: dict[Path, Any], saved: str | None = None) -> None:
        """saved: the kind of the weights in a file of ours (saved.py)."""
        super().__init__(tensors)
        self.stamps, self.saved = stamps, saved

    @property
    def first(self) -> dict[str, torch.Tensor]:
        return next(iter(self.values()))

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file is not what it was: numbers of two files make no model, and reading beyond the end of
        one that was cut short kills the process."""
        for path, before in self.stamps.items():
            now = file_identity(path)
            if now != before:
                what = "is another file, or other contents, now" if now else "has gone"
                raise CheckpointError(f"{path} {what}, while it was being read; wait until all files are there, and try again")


def file_identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the same one changed, and from another in its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def split_dim(name: str) -> int | None:
    return SPLIT_DIMS[re.sub(r"^layers\.\d+\.|\.weight$", "", name)]


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards in a folder: all .pth files, in the order of their names."""
    return [folder / name for name in list_folder(folder) if name.endswith(".pth")]


def stored_dtype(ckpt_dir: str | os.PathLike[str]) -> torch.dtype | None:
    """Return the dtype of a folder's shards; None where there are none."""
    if not shard_paths(Path(ckpt_dir).expanduser()):
        return None
    embedding = open_shards(ckpt_dir).first.get("tok_embeddings.weight")
    return None if embedding is None else embedding.dtype


def open_shards(ckpt_dir: str | os.PathLike[str]) -> Shards:
    """Map every shard; reads names and shapes, no values. Raises CheckpointError if one is missing or damaged."""
    folder = Path(ckpt_dir).expanduser()
    paths = shard_paths(folder)
    if not paths:
        raise CheckpointError(f"{folder}: no consolidated.NN.pth; {describe_folder(folder)}")
    numbers = [int(m[1]) for path in paths if (m := re.fullmatch(r"consolidated\.([0-9]{2})\.pth", path.name))]
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0)) if i not in numbers]
    if missing:
        last = f"consolidated.{max(numbers):02d}.pth"
        raise CheckpointError(
            f"{folder}: {', '.join(missing[:8])} missing; the shards here go up to {last}, and all are needed"
        )
    stamps = {path: file_identity(path) for path in paths}
    return Shards({path.name: _open_shard(path) for path in stamps}, stamps)


def _open_shard(path: Path) -> dict[str, torch.Tensor]:
    head = read_file(path, 64)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise CheckpointError(
            f"{path}: a bare pickle or PyTorch's format of before 1.6, which cannot be mapped; "
            "if you trust it, load it and torch.save() it again"
        )
    if head[:2] != b"PK":
        raise CheckpointError(f"{path}: not a PyTorch checkpoint; {identify_format(head)}; fetch it again")
    try:
        tensors = torch_file.read_torch_file(path)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: holds more than tensors and was not loaded, as it could run code ({e})") from e
    except Exception as e:
        found = file_identity(path)
        size = f"{found[2]:,} bytes" if found else "and gone by now"
        raise CheckpointError(
            f"{path}: cut off, damaged or another kind of zip ({size}); compare with checklist.chk, fetch it again"
        ) from e
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}; Meta's shards hold tensors by name and nothing else")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or (tensor is None and not IGNORED_TENSORS.fullmatch(name)):
            raise CheckpointError(
                f"{path}: {name!r:.80} is no plain tensor; Meta's shards hold tensors by name and nothing else"
            )
    return tensors
