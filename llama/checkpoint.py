"""Meta's checkpoints: find them, and check them before anything is allocated.

Shards are memory-mapped: names and shapes are read, and only of the small tensors the numbers (loading.py checks the
others as it reads them). Nothing in a file is ever executed.
"""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from . import archive
from .errors import CheckpointError, InputError, kind, path_to, read_file, shown, what_is_it
from .model import ModelArgs, Transformer
from .quantize import KINDS
from .ranks import model_parallel
from .tokenizer import Tokenizer

# The dimension along which shards, and ranks, split a weight; None: the same in every shard.
SPLIT: dict[str, int | None] = {
    "tok_embeddings": 1,
    "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
NOT_WEIGHTS = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")  # in Meta's files; computed here
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LARGEST_PARAMS = 1 << 20  # bytes of params.json, which has about 100

NOT_FINITE = "holds NaN or infinity: the shards are damaged; compare with checklist.chk, fetch them again"
_OTHER_MODEL = "params.json and the shards are not of one model; fetch them again"
_MADE_BY = {"wk": "n_heads, n_kv_heads", "w1": "multiple_of, ffn_dim_multiplier", "norm": "dim"}  # key of a wrong shape


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype or its name, checked; None stays None."""
    if dtype is None:
        return None
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or wanted not in DTYPES:
        raise InputError(f"dtype is {kind(dtype)}; use 'bfloat16', 'float16' or 'float32', or leave it out for the stored one")
    return wanted


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
            now = stamp(path)
            if now != before:
                what = "is another file, or other contents, now" if now else "has gone"
                raise CheckpointError(f"{path} {what}, while it was being read; wait until all files are there, and try again")


def stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the same one changed, and from another in its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def split_dim(name: str) -> int | None:
    return SPLIT[re.sub(r"^layers\.\d+\.|\.weight$", "", name)]


# --- params.json -----------------------------------------------------------------------------------------------------

_COUNT = (int, lambda v: 1 <= v < 2**31, "a whole number from 1 to 2,147,483,647")
_PARAMS: dict[str, tuple[Any, Any, str]] = {
    "dim": _COUNT, "n_heads": _COUNT, "n_kv_heads": _COUNT, "multiple_of": _COUNT,
    "n_layers": (int, lambda v: 1 <= v <= 1024, "a whole number from 1 to 1,024"),
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
    text = read_file(path, LARGEST_PARAMS)
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
            raise CheckpointError(f"{path}: unknown key {key!r:.80}; a Llama 2 model has {', '.join(_PARAMS)}")
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
    for kind_ in KINDS:
        if f"{kind_}.safetensors" in names:
            return f"it holds quantized weights: build with quantize={kind_!r}"
    if "bfloat16.safetensors" in names:
        return "it holds weights saved as they are, in bfloat16: build without quantize"
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


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards in a folder: all .pth files, in the order of their names."""
    return [folder / name for name in _names(folder) if name.endswith(".pth")]


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
        raise CheckpointError(f"{folder}: no consolidated.NN.pth; {_what_instead(folder)}")
    numbers = [int(m[1]) for path in paths if (m := re.fullmatch(r"consolidated\.([0-9]{2})\.pth", path.name))]
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0)) if i not in numbers]
    if missing:
        last = f"consolidated.{max(numbers):02d}.pth"
        raise CheckpointError(
            f"{folder}: {', '.join(missing[:8])} missing; the shards here go up to {last}, and all are needed"
        )
    stamps = {path: stamp(path) for path in paths}
    return Shards({path.name: _open(path) for path in stamps}, stamps)


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
        tensors = archive.read(path)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: holds more than tensors and was not loaded, as it could run code ({e})") from e
    except Exception as e:
        found = stamp(path)
        size = f"{found[2]:,} bytes" if found else "and gone by now"
        raise CheckpointError(
            f"{path}: cut off, damaged or another kind of zip ({size}); compare with checklist.chk, fetch it again"
        ) from e
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}; Meta's shards hold tensors by name and nothing else")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or (tensor is None and not NOT_WEIGHTS.fullmatch(name)):
            raise CheckpointError(
                f"{path}: {name!r:.80} is no plain tensor; Meta's shards hold tensors by name and nothing else"
            )
    return tensors


def build_on_meta(
    params: dict[str, Any],
    shards: Shards,
    max_seq_len: int,
    max_batch_size: int,
    vocab_size: int,
) -> Transformer:
    """The Transformer of params.json, without memory."""
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
        sizes = f"max_seq_len={max_seq_len} and max_batch_size={max_batch_size}"
        raise CheckpointError(f"params.json with {sizes} describes tensors larger than any memory: {params}") from e
    return model


def expected_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """By Meta's names, of the weights whole."""
    ranks, expected = model_parallel()[1], {}
    # The last norm first, whose shape says whether `dim` is right, and so whether there are as many shards as there must be.
    for name, weight in sorted(model.state_dict().items(), key=lambda item: item[0] != "norm.weight"):
        shape, dim = list(weight.shape), split_dim(name)
        if dim is not None:
            shape[dim] *= ranks
        expected[name] = tuple(shape)
    return expected


def check(model: Transformer, shards: Shards) -> None:
    """Raise CheckpointError unless the shards hold a model's tensors, and no others, and are of one model."""
    n, expected = len(shards), expected_shapes(model)
    for file, tensors in shards.items():
        for verb, names in (
            ("lacks", expected.keys() - tensors.keys()),
            ("holds unknown", {name for name in tensors.keys() - expected.keys() if not NOT_WEIGHTS.fullmatch(name)}),
        ):
            if names:
                some = ", ".join(sorted(shown(name).strip("'") for name in names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(f"{file} {verb} {some}{more}: damaged, or not of the model that params.json describes")
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
                    raise CheckpointError(f"{file}: {name} {NOT_FINITE}")
                # Meta's are equal; derived files may differ by rounding, those of another model by far more.
                if not torch.allclose(reference[name].float(), tensors[name].float(), rtol=0.05, atol=0.02):
                    raise CheckpointError(f"{name} differs between {first} and {file}: they are shards of different models")
        row = tuple(tensors["layers.0.attention.wq.weight"][0].tolist())
        if rows.setdefault(row, file) != file and len(set(row)) > 1:
            raise CheckpointError(f"{file} holds the same numbers as {rows[row]}: a copy under another name; fetch it again")


def _why_not(name: str, tensor: torch.Tensor, whole: tuple[int, ...], n: int) -> str:
    if name == "tok_embeddings.weight" and tensor.ndim == 2 and tensor.shape[1] and whole[1] % tensor.shape[1] == 0:
        if tensor.shape[0] != whole[0]:
            return f"but the tokenizer has {whole[0]} pieces; use the model's own tokenizer.model"
        return f"one of {whole[1] // tensor.shape[1]} parts of {whole}, but there are {n} shards: some are missing, or too many"
    hint = next((f" (see {keys})" for part, keys in _MADE_BY.items() if part in name), "")
    return f"where params.json{hint} makes {whole} in {n} shard(s): {_OTHER_MODEL}"


def marks(tokenizer: Tokenizer, shards: Shards, model: Transformer, dtype: torch.dtype) -> tuple[object, ...]:
    """What tells one build from another, wherever each machine keeps its copy of the files."""
    norms = [tensors["norm.weight"].tolist() for tensors in shards.values()]
    return tokenizer.n_words, {file: len(tensors) for file, tensors in shards.items()}, norms, model.params, dtype
