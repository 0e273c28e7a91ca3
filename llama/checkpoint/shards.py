"""Open a checkpoint's shards as memory-mapped tensors, and detect files that change while they are read."""

import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, explain_system_error, identify_format, read_file
from . import torch_file
from .params import describe_folder, list_folder

if TYPE_CHECKING:
    from .adapter import Adapter

# The dimension along which each weight is divided among shards and ranks; None if every shard contains the whole weight.
SPLIT_DIMS: dict[str, int | None] = {
    "tok_embeddings": 1,
    "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
# Shards may also contain rotary frequencies or rotations, once or in each layer: rope.freqs in Llama 2,
# layers.N.attention.inner_attention.rope.freqs in LLaMA 1, the other names in files of other programs. They are ignored,
# whatever their dtype, because the model computes them itself.
IGNORED_TENSORS = re.compile(
    r"(?:.*\.)?(?:rope\.(?:freqs|cache)|(?:rope_|rotary_emb\.)?(?:inv_freq|freqs_(?:cis|cos|sin))|rotary_emb\.(?:cos|sin)_cached)"
)
_EXPECTED = "the files of a model contain tensors by name and nothing else"


class Shards(dict[str, dict[str, torch.Tensor]]):
    """The mapped tensors of a checkpoint: file name -> tensor name -> tensor.

    identities: the `file_identity` of each file, taken before the file was mapped.
    packed_format: the format of the weights in a packed file (packed_file.py); None for shards.
    rotary_halves: the width of a head if the rows of wq and wk are in Hugging Face's order; None if they are in Meta's.
    adapter: what is merged into the weights while they are read (adapter.py); None for nothing.
    """

    def __init__(
        self,
        tensors: dict[str, dict[str, torch.Tensor]],
        identities: dict[Path, Any],
        packed_format: str | None = None,
        rotary_halves: int | None = None,
    ) -> None:
        super().__init__(tensors)
        self.identities, self.packed_format, self.rotary_halves = identities, packed_format, rotary_halves
        self.adapter: Adapter | None = None

    @property
    def first(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the first file."""
        return next(iter(self.values()))

    def is_in_metas_order(self, name: str) -> bool:
        """Return True if the rows of a weight are stored in Meta's order."""
        return self.rotary_halves is None or not is_rotated(name)

    def metas_order(self, name: str, n_rows: int) -> torch.Tensor:
        """Return the numbers of a weight's stored rows in Meta's order: int64 (n_rows). The rows are those of whole heads.

        A rotary embedding rotates pairs of rows of wq and wk. In Meta's order the two rows of a pair are adjacent. In Hugging
        Face's, the first rows of all pairs of a head come before all second rows.
        """
        if self.is_in_metas_order(name):
            return torch.arange(n_rows, device="cpu")
        assert self.rotary_halves is not None
        return metas_order(n_rows, self.rotary_halves)

    def in_metas_order(self, name: str, view: torch.Tensor) -> torch.Tensor:
        """Return rows (rows, in) of a stored weight in Meta's order: the view if they are in this order, otherwise a copy."""
        return view if self.is_in_metas_order(name) else view[self.metas_order(name, len(view))]

    def copy_in_metas_order(self, name: str, view: torch.Tensor, target: torch.Tensor) -> None:
        """Copy rows (rows, in) of a stored weight into `target`, in Meta's order, without memory for another copy."""
        if not self.is_in_metas_order(name):
            assert self.rotary_halves is not None
            half = self.rotary_halves // 2
            view, target = view.unflatten(0, (-1, 2, half)).transpose(1, 2), target.unflatten(0, (-1, half, 2))
        target.copy_(view)

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


def is_rotated(name: str) -> bool:
    """Return True for wq and wk, whose rows a rotary embedding rotates in pairs. name: Meta's name of the weight."""
    return name.endswith((".wq.weight", ".wk.weight"))


def metas_order(n_rows: int, head_dim: int) -> torch.Tensor:
    """Return the numbers of rows of wq or wk that are in Hugging Face's order, in Meta's order: int64 (n_rows)."""
    return torch.arange(n_rows, device="cpu").view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


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


def open_shards(ckpt_dir: str | os.PathLike[str], values: bool = True) -> Shards:
    """Map all shards in a folder: all files named *.pth, in the order of their names, as the reference does.

    values: if False, nothing is mapped; the tensors have names, shapes and dtypes only. Raises CheckpointError if a shard is
    missing, damaged or unreadable, and if the order of the shards is not clear.
    """
    folder = Path(ckpt_dir).expanduser()
    paths = shard_paths(folder)
    if not paths:
        raise CheckpointError(f"{folder}: no consolidated.NN.pth, and no other .pth file; {describe_folder(folder)}")
    _check_names(folder, [path.name for path in paths])
    identities = {path: file_identity(path) for path in paths}
    return Shards({path.name: open_shard(path, values) for path in paths}, identities)


def _check_names(folder: Path, names: list[str]) -> None:
    """Raise CheckpointError if Meta's names have a gap, or if sorting by name does not sort by number."""
    numbers = [int(m[1]) for name in names if (m := re.fullmatch(r"consolidated\.([0-9]{2})\.pth", name))]
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0)) if i not in numbers]
    if missing and len(numbers) == len(names):
        raise CheckpointError(
            f"{folder}: {', '.join(missing[:8])} missing; the shards here go up to {names[-1]}, and all are needed"
        )
    numbers_before: dict[str, list[int]] = {}  # name with # for each number -> numbers in the last name of this kind
    for name in names:
        kind, name_numbers = re.sub(r"[0-9]+", "#", name), [int(digits) for digits in re.findall(r"[0-9]+", name)]
        if numbers_before.get(kind, []) > name_numbers:
            raise CheckpointError(
                f"{folder}: shards are read in the order of their names, which puts {name} after a higher number; "
                "rename them with numbers of equal length, as in consolidated.00.pth"
            )
        numbers_before[kind] = name_numbers


def open_shard(path: Path, values: bool) -> dict[str, torch.Tensor]:
    """Map one file that torch.save wrote, and return its tensors by name. values: see `open_shards`.

    Raises CheckpointError if the file is damaged, contains anything but tensors, or cannot be read.
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
        tensors = torch_file.read_torch_file(path, values)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: contains more than tensors and was not loaded, as it could run code ({e})") from e
    except Exception as e:
        if reason := explain_system_error(e):
            raise CheckpointError(f"{path}: {reason}") from e
        identity = file_identity(path)
        size = f"{identity[2]:,} bytes" if identity else "deleted by now"
        raise CheckpointError(
            f"{path}: cut off, damaged or another kind of zip ({size}); compare its checksum (checklist.chk), fetch it again"
        ) from e
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: contains a {type(tensors).__name__}; {_EXPECTED}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or (tensor is None and not IGNORED_TENSORS.fullmatch(name)):
            raise CheckpointError(f"{path}: {name!r:.80} is no plain tensor; {_EXPECTED}")
    return tensors
