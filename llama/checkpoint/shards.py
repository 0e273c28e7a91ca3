"""Open a checkpoint's shards as memory-mapped tensors, and detect files that change while they are read."""

import errno
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, DeviceError, format_bytes, identify_format, read_file
from . import torch_file
from .params import describe_folder, list_folder

# The dimension along which each weight is divided among shards and ranks; None if every shard contains the whole weight.
SPLIT_DIMS: dict[str, int | None] = {
    "tok_embeddings": 1,
    "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
# Meta's shards also contain rotary frequencies. They are ignored, because the model computes them itself.
IGNORED_TENSORS = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")
_EXPECTED = "Meta's shards contain tensors by name and nothing else"


class Shards(dict[str, dict[str, torch.Tensor]]):
    """The mapped tensors of a checkpoint: file name -> tensor name -> tensor.

    identities: the `file_identity` of each file, taken before the file was mapped.
    packed_format: the format of the weights in a packed file (packed_file.py); None for Meta's shards.
    """

    def __init__(
        self, tensors: dict[str, dict[str, torch.Tensor]], identities: dict[Path, Any], packed_format: str | None = None
    ) -> None:
        super().__init__(tensors)
        self.identities, self.packed_format = identities, packed_format

    @property
    def first(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the first file."""
        return next(iter(self.values()))

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has been changed, replaced or deleted since it was mapped.

        A model must not mix weights from before and after a change. If a file has become shorter, reading the mapped memory
        beyond its end would kill the process.
        """
        for path, before in self.identities.items():
            now = file_identity(path)
            if now != before:
                change = "was changed or replaced" if now else "was deleted"
                raise CheckpointError(f"{path} {change} while it was being read; wait until all files are there, and try again")


def file_identity(path: Path) -> tuple[int, ...] | None:
    """Return values that change if a file is changed or replaced; None if the file does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def split_dim(name: str) -> int | None:
    """Return the dimension along which a weight is divided among shards or ranks; None if the weight is not divided.

    name: Meta's name of the weight, such as "layers.0.attention.wq.weight".
    """
    return SPLIT_DIMS[re.sub(r"^layers\.\d+\.|\.weight$", "", name)]


def shard_paths(folder: Path) -> list[Path]:
    """Return the paths of the shards in a folder: all .pth files, sorted by name."""
    return [folder / name for name in list_folder(folder) if name.endswith(".pth")]


def stored_dtype(ckpt_dir: str | os.PathLike[str]) -> torch.dtype | None:
    """Return the dtype of the embedding in a folder's shards; None if there are no shards."""
    if not shard_paths(Path(ckpt_dir).expanduser()):
        return None
    embedding = open_shards(ckpt_dir).first.get("tok_embeddings.weight")
    return None if embedding is None else embedding.dtype


def open_shards(ckpt_dir: str | os.PathLike[str]) -> Shards:
    """Map all shards in a folder: read the names and shapes of tensors, but no values.

    Raises CheckpointError if a shard is missing or damaged.
    """
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
    identities = {path: file_identity(path) for path in paths}
    return Shards({path.name: _open_shard(path) for path in paths}, identities)


def check_mappable(path: Path, error: Exception) -> None:
    """Raise DeviceError if `error` says that there is no memory, or no address space, to map a file."""
    if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error):
        size = (file_identity(path) or (0, 0, 0))[2]
        raise DeviceError(
            f"{path}: its {format_bytes(size)} cannot be mapped: {os.strerror(errno.ENOMEM)}; raise this process's limits "
            "(ulimit -v, ulimit -d)"
        ) from error


def _open_shard(path: Path) -> dict[str, torch.Tensor]:
    """Map one shard, and return its tensors by name.

    Raises CheckpointError if the file is damaged, or contains anything but tensors.
    """
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
        raise CheckpointError(f"{path}: contains more than tensors and was not loaded, as it could run code ({e})") from e
    except Exception as e:
        check_mappable(path, e)
        identity = file_identity(path)
        size = f"{identity[2]:,} bytes" if identity else "deleted by now"
        raise CheckpointError(
            f"{path}: cut off, damaged or another kind of zip ({size}); compare with checklist.chk, fetch it again"
        ) from e
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: contains a {type(tensors).__name__}; {_EXPECTED}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or (tensor is None and not IGNORED_TENSORS.fullmatch(name)):
            raise CheckpointError(f"{path}: {name!r:.80} is no plain tensor; {_EXPECTED}")
    return tensors
