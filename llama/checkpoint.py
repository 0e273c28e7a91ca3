"""Meta's checkpoints: find, check, reshard, load.

A checkpoint of n shards is loaded on m ranks, whatever n and m: of each matrix, rank r takes the r-th of m equal parts
of the n stored parts joined. Shards are memory-mapped. Where a rank's part is a stored tensor as it is, the mapped file
is the weight; else its views are joined, or packed for the kernel, tensor by tensor, so that a rank holds its own
weights and one tensor more at most. All is checked before anything is allocated, but the numbers, which are checked as
they are read. Nothing in a file is ever executed.
"""

import ctypes
import itertools
import json
import mmap
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, kind, path_to, read_file, what_is_it
from .model import ModelArgs, Transformer
from .parallel import ColumnParallelLinear, JoinedColumnParallelLinear, RowParallelLinear
from .quantize import HEAD, Quantized, check_width, quantize
from .runtime import model_parallel, progress

# The dimension along which shards, and ranks, split a weight; None: the same in every shard.
SPLIT: dict[str, int | None] = {
    "tok_embeddings": 1,
    "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
NOT_WEIGHTS = {"rope.freqs"}  # in Meta's files, but computed here
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTIZED_AT_ONCE = 1 << 24  # weights joined from several shards at a time

_NOT_FINITE = "holds NaN or infinity: the shards are damaged; compare with checklist.chk, fetch them again"
_OTHER_MODEL = "params.json and the shards are not of one model; fetch them again"
_MADE_BY = {"wk": "n_heads, n_kv_heads", "w1": "multiple_of, ffn_dim_multiplier", "norm": "dim"}  # key of a wrong shape

Shards = dict[str, dict[str, torch.Tensor]]  # file name -> tensor name -> mapped tensor


def split_dim(name: str) -> int | None:
    return SPLIT[re.sub(r"^layers\.\d+\.|\.weight$", "", name)]


# --- params.json -----------------------------------------------------------------------------------------------------

_COUNT = (int, lambda v: 1 <= v < 2**31, "a whole number from 1 to 2,147,483,647")
_PARAMS: dict[str, tuple[Any, Any, str]] = {
    "dim": _COUNT, "n_layers": _COUNT, "n_heads": _COUNT, "n_kv_heads": _COUNT, "multiple_of": _COUNT,
    "vocab_size": (int, lambda v: v == -1 or 1 <= v < 2**31, "-1 (the tokenizer's) or a whole number, 1 or more"),
    "ffn_dim_multiplier": ((int, float), lambda v: 0 < v <= 1000, "a number above 0, at most 1000"),
    "norm_eps": ((int, float), lambda v: 0 < v < 1, "a number between 0 and 1"),
    "rope_theta": ((int, float), lambda v: 1 <= v <= 1e18, "a number from 1 to 1e18"),
}  # fmt: skip
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier")  # null means absent


def read_params(ckpt_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked contents of `params.json`, for ModelArgs."""
    folder = path_to(ckpt_dir, "ckpt_dir", "a model's folder, with consolidated.NN.pth and params.json", folder=True)
    if "params.json" not in _names(folder):
        raise CheckpointError(f"{folder}: no params.json; {_what_instead(folder)}")
    path = folder / "params.json"
    text = read_file(path)
    try:
        params = json.loads(text)
    except (ValueError, RecursionError) as e:
        found = str(e) if text[:1] == b"{" else what_is_it(text[:64])
        raise CheckpointError(f"{path}: not JSON ({found}); fetch it again") from e
    if not isinstance(params, dict):
        raise CheckpointError(f"{path}: holds {kind(params)}, not an object of names and values; fetch it again")
    params = {k: v for k, v in params.items() if not (v is None and k in _OPTIONAL)}
    for key, value in params.items():
        if key not in _PARAMS:
            raise CheckpointError(f"{path}: unknown key {key!r}; a Llama 2 model has {', '.join(_PARAMS)}")
        types, valid, wanted = _PARAMS[key]
        if isinstance(value, bool) or not isinstance(value, types) or not valid(value):
            raise CheckpointError(f"{path}: {key} is {value!r:.80}; it must be {wanted}")
    args = ModelArgs(**params)
    if args.dim % args.n_heads or args.head_dim % 2:
        raise CheckpointError(f"{path}: dim={args.dim} does not make n_heads={args.n_heads} heads of even width")
    if args.n_heads % args.kv_heads:
        raise CheckpointError(f"{path}: n_heads={args.n_heads} is no multiple of n_kv_heads={args.n_kv_heads}")
    return params


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be read: {e.strerror}") from e


def _what_instead(folder: Path) -> str:
    names = _names(folder)
    if not names:
        return "the folder is empty"
    if any(n == "config.json" or n.endswith(".safetensors") or n.startswith("pytorch_model") for n in names):
        return (
            "the folder is in Hugging Face layout; this library reads Meta's own files "
            "(consolidated.NN.pth and params.json; Hugging Face's repositories keep them in original/)"
        )
    models = [n for n in names if os.path.isfile(folder / n / "params.json")]
    if models:
        return f"it holds model folders; give one of them as ckpt_dir: {', '.join(models[:8])}"
    return f"it holds {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}"


# --- shards ----------------------------------------------------------------------------------------------------------


def open_shards(ckpt_dir: str | os.PathLike[str]) -> Shards:
    """Map every consolidated.NN.pth; reads names and shapes, no numbers."""
    folder = Path(ckpt_dir)
    found = {int(m[1]): folder / m[0] for n in _names(folder) if (m := re.fullmatch(r"consolidated\.([0-9]{2})\.pth", n))}
    if not found:
        raise CheckpointError(f"{folder}: no consolidated.NN.pth; {_what_instead(folder)}")
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(found)) if i not in found]
    if missing:
        raise CheckpointError(
            f"{folder}: {', '.join(missing[:8])} missing; the shards here go up to {found[max(found)].name}, and all are needed"
        )
    return {found[i].name: _open(found[i]) for i in sorted(found)}


def _open(path: Path) -> dict[str, torch.Tensor]:
    head = read_file(path, 64)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise CheckpointError(
            f"{path}: a bare pickle or PyTorch's format of before 1.6, which cannot be mapped; "
            "if you trust it, load it and torch.save() it again"
        )
    if head[:2] != b"PK":
        raise CheckpointError(f"{path}: not a PyTorch checkpoint; {what_is_it(head)}; fetch it again")
    try:
        tensors = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).split("\n")[0]
        raise CheckpointError(f"{path}: holds more than tensors and was not loaded, as it could run code ({reason})") from e
    except Exception as e:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: cut off, damaged or another kind of zip ({size:,} bytes); compare with checklist.chk, fetch it again"
        ) from e
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}; Meta's shards hold tensors by name and nothing else")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name!r} is no plain tensor; Meta's shards hold tensors by name and nothing else")
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not (tensor.is_quantized or tensor.is_nested)


def build_on_meta(
    params: dict[str, Any], shards: Shards, max_seq_len: int, max_batch_size: int, vocab_size: int
) -> Transformer:
    """The Transformer of params.json, without memory, after checking that the shards hold its tensors and no others."""
    args = ModelArgs(**{**params, "vocab_size": vocab_size}, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    stored = {name for tensors in shards.values() for name in tensors}
    layers = len({n.split(".")[1] for n in stored if n.startswith("layers.")})
    if layers != args.n_layers:
        raise CheckpointError(f"params.json says n_layers={args.n_layers}, but the shards hold {layers} layers: {_OTHER_MODEL}")
    declared = params.get("vocab_size", -1)
    if declared not in (-1, vocab_size):
        raise CheckpointError(
            f"params.json says vocab_size={declared}, but the tokenizer has {vocab_size} pieces; use the model's own"
        )
    try:
        with torch.device("meta"):
            model = Transformer(args)
    except (RuntimeError, OverflowError) as e:
        raise CheckpointError(f"params.json describes tensors larger than any memory: {params}") from e
    _check(model, shards)
    return model


def _check(model: Transformer, shards: Shards) -> None:
    n, ranks = len(shards), model_parallel()[1]
    expected = {}
    # The last norm first, whose shape says whether `dim` is right, and so whether there are as many shards as there must be.
    for name, weight in sorted(model.state_dict().items(), key=lambda item: item[0] != "norm.weight"):
        shape, dim = list(weight.shape), split_dim(name)
        if dim is not None:
            shape[dim] *= ranks
        expected[name] = tuple(shape)

    for file, tensors in shards.items():
        for verb, names in (
            ("lacks", expected.keys() - tensors.keys()),
            ("holds unknown", tensors.keys() - expected.keys() - NOT_WEIGHTS),
        ):
            if names:
                some = ", ".join(sorted(map(str, names))[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise CheckpointError(f"{file} {verb} {some}: damaged, or not of the model that params.json describes")
        for name, whole in expected.items():
            tensor, dim = tensors[name], split_dim(name)
            part = whole if dim is None else tuple(w // n if d == dim else w for d, w in enumerate(whole))
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: {name} is stored as {tensor.dtype}; supported are bfloat16, float16 and float32; convert it"
                )
            if tuple(tensor.shape) != part or (dim is not None and whole[dim] % n):
                raise CheckpointError(f"{file}: {name} is {tuple(tensor.shape)}, {_why_not(name, tensor, whole, n)}")

    (first, reference), *_ = shards.items()
    rows: dict[tuple[float, ...], str] = {}
    for file, tensors in shards.items():
        for name in expected:
            if split_dim(name) is None:
                if not tensors[name].isfinite().all():
                    raise CheckpointError(f"{file}: {name} {_NOT_FINITE}")
                # Meta's are equal; derived files may differ by rounding, those of another model by far more.
                if not torch.allclose(reference[name].float(), tensors[name].float(), rtol=0.05, atol=0.02):
                    raise CheckpointError(f"{name} differs between {first} and {file}: they are shards of different models")
        row = tuple(tensors["layers.0.attention.wq.weight"][0].tolist())
        if rows.setdefault(row, file) != file and len(set(row)) > 1:
            raise CheckpointError(f"{file} holds the same numbers as {rows[row]}: a copy under another name; fetch it again")


def check_widths(model: Transformer, kind: str) -> None:
    """Raise DeviceError where this rank's part of a matrix cannot be quantized."""
    for name, module in model.named_modules():
        if isinstance(module, RowParallelLinear):
            check_width(name, module.in_features, kind, module.ranks)


def _why_not(name: str, tensor: torch.Tensor, whole: tuple[int, ...], n: int) -> str:
    if name == "tok_embeddings.weight" and tensor.ndim == 2 and tensor.shape[1] and whole[1] % tensor.shape[1] == 0:
        if tensor.shape[0] != whole[0]:
            return f"but the tokenizer has {whole[0]} pieces; use the model's own tokenizer.model"
        return f"one of {whole[1] // tensor.shape[1]} parts of {whole}, but there are {n} shards: some are missing, or too many"
    hint = next((f" (see {keys})" for part, keys in _MADE_BY.items() if part in name), "")
    return f"where params.json{hint} makes {whole} in {n} shard(s): {_OTHER_MODEL}"


def cut(parts: list[torch.Tensor], dim: int, rank: int, ranks: int) -> list[torch.Tensor]:
    """Views that, joined along `dim`, are the rank-th of `ranks` equal parts of the joined `parts`.

    3 parts of 4 rows, 2 ranks: rank 0 takes rows 0..6, which is part 0 whole and rows 0..2 of part 1.
    """
    width = parts[0].shape[dim]
    first, last = (width * len(parts) * r // ranks for r in (rank, rank + 1))
    views = []
    for i, part in enumerate(parts):
        begin, end = max(first - i * width, 0), min(last - i * width, width)
        if begin < end:
            views.append(part.narrow(dim, begin, end - begin))
    return views


def load_weights(model: Transformer, shards: Shards, dtype: torch.dtype, device: torch.device, kind: str | None = None) -> None:
    """Fill a model made on `meta` with this rank's part of the shards, its matrices quantized if `kind` is given.

    Raises CheckpointError for NaN and infinity.
    """
    plan: list[tuple[nn.Module, list[str], list[torch.Tensor]]] = []  # each weight, its names, and what it is read from
    for prefix, module in model.named_modules():
        if "weight" in module._parameters:
            names = module.names(prefix) if isinstance(module, JoinedColumnParallelLinear) else [f"{prefix}.weight"]
            as_a_whole = kind is not None and isinstance(module, RowParallelLinear)  # scales are those of whole rows
            views = [v for name in names for v in (_all_of(name, shards) if as_a_whole else _part_of(name, shards))]
            plan.append((module, names, views))
    # The largest first: while little is held yet, one tensor more weighs least.
    plan.sort(key=lambda item: -sum(view.numel() for view in item[2]))
    ahead = itertools.islice(plan, 1, None)
    for module, names, views in progress(plan, lambda item: sum(v.nbytes for v in item[2]), "loading"):
        for view in next(ahead, (None, [], []))[2]:
            _advise(view, _WILLNEED)  # the disk reads the next one while this one is packed
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and kind is not None:
            own = HEAD if names == ["output.weight"] else kind
            module.hold(Quantized.cat([q for name in names for q in _quantized(name, shards, own, dtype, device)]))
            for view in views:
                _advise(view, _DONTNEED)
            continue
        weight = views[0] if _in_place(views, dtype, device) else _join(views, split_dim(names[0]) or 0, dtype, device)
        _refuse_what_is_not_finite(weight, names, shards)
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.hold(weight)
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)
        if module.weight is None and weight is views[0]:  # packed straight from the file
            _advise(views[0], _DONTNEED)
        del weight  # before the next one is made


def _all_of(name: str, shards: Shards) -> list[torch.Tensor]:
    parts = [tensors[name] for tensors in shards.values()]
    return parts[:1] if split_dim(name) is None else parts


def _part_of(name: str, shards: Shards) -> list[torch.Tensor]:
    """Views of what this rank takes of a stored weight."""
    parts, dim = _all_of(name, shards), split_dim(name)
    return parts if dim is None else cut(parts, dim, *model_parallel())


def _quantized(name: str, shards: Shards, kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Quantized]:
    """This rank's part of a stored weight, block by block of its rows."""
    rank, ranks = model_parallel()
    by_columns = split_dim(name) == 1
    for views in [_all_of(name, shards)] if by_columns else [[view] for view in _part_of(name, shards)]:
        width = sum(view.shape[1] for view in views)
        step = max(1, QUANTIZED_AT_ONCE // width)
        for i in range(0, views[0].shape[0], step):
            rows = [view[i : i + step].to(device) for view in views]
            block = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
            _refuse_what_is_not_finite(block, [name], shards)
            found = quantize(block, kind, dtype)
            yield found.columns(width * rank // ranks, width * (rank + 1) // ranks) if by_columns else found


def _refuse_what_is_not_finite(weight: torch.Tensor, names: list[str], shards: Shards) -> None:
    # A sum is finite only if all its terms are, and costs one pass; it may overflow, so ask again if it is not.
    if weight.sum().isfinite() or weight.isfinite().all():
        return
    for name in names:
        if not all(view.isfinite().all() for view in _all_of(name, shards)):
            raise CheckpointError(f"{name} {_NOT_FINITE}")
    name = next(n for n in names if not all(v.to(weight.dtype).isfinite().all() for v in _all_of(n, shards)))
    raise CheckpointError(f"{name} holds numbers too large for {weight.dtype}; leave dtype out, or use 'bfloat16' or 'float32'")


def _in_place(views: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the mapped file can itself be the weight: no copy, and one copy in memory for all who map it."""
    first = views[0]
    aligned = first.data_ptr() % 64 == 0  # as torch.save writes them
    return len(views) == 1 and first.is_contiguous() and aligned and first.dtype == dtype and device.type == "cpu"


def _join(views: list[torch.Tensor], dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    shape = list(views[0].shape)
    shape[dim] = sum(view.shape[dim] for view in views)
    joined, filled = torch.empty(shape, dtype=dtype, device=device), 0
    for view in views:
        joined.narrow(dim, filled, view.shape[dim]).copy_(view)
        filled += view.shape[dim]
        _advise(view, _DONTNEED)
    return joined


_libc = ctypes.CDLL(None) if sys.platform in ("linux", "darwin") else None
_WILLNEED, _DONTNEED = 3, 4


def _advise(view: torch.Tensor, advice: int) -> None:
    """Tell the system about the mapped pages under a view: to read them ahead, or that they are needed no longer. These
    stay in the page cache, but would count as ours until the last tensor of the shard is gone, and so double the peak."""
    if _libc is None or view.numel() == 0:
        return
    begin = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    strides = zip(view.shape, view.stride(), strict=True)
    end = view.data_ptr() + (1 + sum((size - 1) * stride for size, stride in strides)) * view.element_size()
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
