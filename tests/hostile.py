"""Damage the files of a sound model or save its tensors with altered contents; load the files and check the loaded values."""

import atexit
import contextlib
import functools
import itertools
import json
import math
import operator
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llama import Llama, Tokenizer
from llama.checkpoint import packed_file, shards

from .support import random_weights, train_tokenizer, write_shards

PARAMS = dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, multiple_of=16, norm_eps=1e-5, vocab_size=-1)
VOCAB, HIDDEN, PROBE = 384, 96, [[1, 5, 9], [1, 7]]
FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
FOLDERS = {  # for each checkpoint folder: its files, and the `quantize` argument of `Llama.build`
    "one": ([FIRST, "params.json", "tokenizer.model"], None),
    "two": ([FIRST, SECOND, "params.json", "tokenizer.model"], None),
    "int8": (["int8.safetensors", "params.json", "tokenizer.model"], "int8"),
    "int4": ([FIRST, "int4.safetensors", "params.json", "tokenizer.model"], "int4"),
}
Edit = tuple[Any, ...]


class BrokenPromise(Exception):
    """Raised when a case gives a wrong answer or a huge error message, runs code, or needs too much time or memory."""


# --- the sound model ---------------------------------------------------------------------------------------------------


@functools.lru_cache
def temporary_folder() -> Path:
    """Create and return the folder for the files of all cases. It is removed when the interpreter exits."""
    folder = Path(tempfile.mkdtemp(prefix="llama-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache
def sound(variant: str) -> dict[str, bytes]:
    """Return the contents of a sound model's files, by file name."""
    folder, (names, format) = temporary_folder() / variant, FOLDERS[variant]
    weights = {name: w.bfloat16() for name, w in random_weights(PARAMS, VOCAB, HIDDEN).items()}
    write_shards(folder, PARAMS, weights, 2 if variant == "two" else 1)
    train_tokenizer(folder / "tokenizer.model", VOCAB)
    if format:
        packed_file.save_packed_file(folder, format)
    return {name: (folder / name).read_bytes() for name in names}


def open_tensors(folder: Path, variant: str) -> shards.Shards:
    format = FOLDERS[variant][1]
    return (packed_file.open_packed_file(folder, format) if format else None) or shards.open_shards(folder)


@functools.lru_cache
def sound_tensors(variant: str) -> shards.Shards:
    return {
        file: {n: t.clone() for n, t in tensors.items()}
        for file, tensors in open_tensors(write_case(variant, sound(variant)), variant).items()
    }


def write_case(variant: str, files: dict[str, bytes]) -> Path:
    """Write the files of a case into a new folder; return the folder.

    No folder is used twice, because the files of an earlier case may still be memory-mapped.
    """
    folder = temporary_folder() / f"case-{next(cases)}"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


cases = itertools.count()


def build(folder: Path, variant: str = "one") -> Llama:
    quantize = FOLDERS[variant][1]
    return Llama.build(folder, folder / "tokenizer.model", max_seq_len=32, max_batch_size=2, device="cpu", quantize=quantize)


@functools.lru_cache
def sound_llama(variant: str = "one") -> Llama:
    return build(write_case(variant, sound(variant)), variant)


def answer(llama: Llama) -> list[list[int]]:
    return llama.generate(PROBE, 6, temperature=0)[0]


@functools.lru_cache
def sound_answer(variant: str = "one") -> list[list[int]]:
    return answer(sound_llama(variant))


@functools.lru_cache
def payloads(variant: str, file: str) -> dict[str, tuple[int, int]]:
    """Return the start and end offset of each tensor's values in a file. All other bytes are called the frame of the file."""
    data = sound(variant)[file]
    if file not in sound_tensors(variant):
        return {}
    if file.endswith(".pth"):
        return {name: _find_values(data, tensor) for name, tensor in sound_tensors(variant)[file].items()}
    if file.endswith(".safetensors"):
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        return {n: tuple(begin + i for i in e["data_offsets"]) for n, e in header.items() if n != "__metadata__"}
    return {}


def _find_values(data: bytes, tensor: torch.Tensor) -> tuple[int, int]:
    values = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data.index(values), data.index(values) + len(values)


# --- bytes -------------------------------------------------------------------------------------------------------------


def edited(data: bytes, edits: Sequence[Edit], frame: Sequence[int] = ()) -> bytes:
    """Apply edits to the data and return the result. An edit is (action, place, *arguments).

    A place is ("any", n) for byte n from the start, ("end", n) for byte n from the end, or ("frame", n) for the n-th byte
    outside of the tensors' values.
    """
    new = bytearray(data)
    for action, (where, n), *arguments in edits:
        if not new:
            break
        position = {"any": n, "end": -1 - n % 400, "frame": frame[n % len(frame)] if frame else n}[where] % len(new)
        if action == "cut":
            del new[position:]
        elif action == "flip":
            new[position] ^= 1 << arguments[0]
        elif action == "set":
            new[position : position + len(arguments[0])] = arguments[0][: len(new) - position]
        elif action == "insert":
            new[position:position] = arguments[0]
        elif action == "delete":
            del new[position : position + arguments[0]]
        elif action == "copy":
            source = arguments[0] % len(new)
            block = new[source : source + arguments[1]][: len(new) - position]
            new[position : position + len(block)] = block
        elif action == "swap":
            other = (position + arguments[0]) % len(new)
            for i in range(min(arguments[0], len(new) - max(position, other))):
                new[position + i], new[other + i] = new[other + i], new[position + i]
    return bytes(new)


@functools.lru_cache
def frame_of(variant: str, file: str) -> list[int]:
    """Return the positions of the bytes of a file that are not values of tensors."""
    spans = payloads(variant, file).values()
    return [i for i in range(len(sound(variant)[file])) if not any(a <= i < b for a, b in spans)] if spans else []


def play_bytes(variant: str, file: int, edits: Sequence[Edit]) -> None:
    """Damage one file of a sound model, build the model, and check its weights and answers."""
    files = dict(sound(variant))
    name = list(files)[file % len(files)]
    before, after = files[name], edited(files[name], edits, frame_of(variant, name))
    folder = write_case(variant, files | {name: after})
    llama, loaded, original = build(folder, variant), open_tensors(folder, variant), sound_tensors(variant)
    intact = name != "tokenizer.model" and (name != "params.json" or _json(before) == _json(after))
    for file_name, tensors in loaded.items():
        for tensor, value in tensors.items():
            span = slice(*payloads(variant, file_name).get(tensor, (0, 0)))
            moved = len(after) != len(before) and before[span] in after
            if file_name == name and after[span] != before[span] and not moved:
                intact = False
            elif tensor not in original[file_name] or not _same(value, original[file_name][tensor]):
                raise BrokenPromise(f"{tensor} has other values, although its bytes are undamaged")
    tokens = answer(llama)
    if intact and tokens != sound_answer(variant):
        raise BrokenPromise(f"{tokens} instead of {sound_answer(variant)}")
    if name == "tokenizer.model":
        use_tokenizer(llama.tokenizer)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    """Encode and decode with a damaged tokenizer. Its tokens may be wrong, but must be within the vocabulary."""
    for text in ("The quick brown fox", "\0 é 🙂\n  two  spaces ", "<s></s><0x0A>▁"):
        tokens = tokenizer.encode(text, bos=True, eos=True)
        if not all(0 <= token < tokenizer.n_words for token in tokens):
            raise BrokenPromise(f"{tokens} for a vocabulary of {tokenizer.n_words}")
        tokenizer.decode(tokens)
        for token in range(0, tokenizer.n_words, 7):
            tokenizer.decode([token])


# --- contents ----------------------------------------------------------------------------------------------------------

REPLACEMENTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed": lambda t: t.T.contiguous().T,
    "transposed copy": lambda t: t.T.contiguous(),
    "flat": lambda t: t.flatten(),
    "stepped": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced": lambda t: torch.cat([t, t])[: len(t)],
    "expanded": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape),
    "terabytes": lambda t: torch.ones((), dtype=t.dtype).expand(1 << 20, 1 << 20),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, [1] * t.ndim),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.flatten()[0],
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "grad": lambda t: t.clone().requires_grad_(),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.float().to_sparse_csr() if t.ndim == 2 else t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.clone()]),
    "complex": lambda t: torch.complex(t.float(), t.float()),
    "conj": lambda t: torch.complex(t.float(), t.float()).conj(),
    "negative": lambda t: torch.complex(t.float(), t.float()).conj().imag,
    "meta": lambda t: t.to("meta"),
    "buffer": lambda t: torch.nn.Buffer(t.clone()),
    "numpy": lambda t: t.float().numpy(),
    "list": lambda t: t.tolist(),
    "none": lambda t: None,
    "nan": lambda t: t.clone().index_fill_(0, torch.tensor([0]), math.nan),
    "inf": lambda t: t.clone().index_fill_(0, torch.tensor([0]), -math.inf),
    "largest": lambda t: torch.full_like(t, torch.finfo(torch.bfloat16).max),
    "zero": lambda t: torch.zeros_like(t),
    "tiny": lambda t: torch.full_like(t, 1e-40),
    **{name: operator.methodcaller("to", getattr(torch, name)) for name in
       ("float32", "float64", "float16", "int8", "uint8", "int64", "bool", "float8_e4m3fn")},
}  # fmt: skip


def play_contents(n_shards: int, changes: Sequence[Edit], order: int = 0) -> None:
    """Alter tensors of a sound model, save them with torch.save, build the model, and check its weights against the file."""
    variant = "two" if n_shards == 2 else "one"
    files = {f: dict(tensors) for f, tensors in sound_tensors(variant).items()}
    altered: set[tuple[int, str]] = set()
    for shard, action, index, new_name in changes:
        tensors = files[list(files)[shard % len(files)]]
        names = sorted(map(str, tensors))
        name = names[index % len(names)] if names else "x"
        if action == "drop":
            tensors.pop(name, None)
        elif action == "rename":
            tensors[new_name] = tensors.pop(name, None)
        elif action == "add":
            tensors[new_name] = torch.ones(3)
        elif action in ("exchange", "share"):
            other = names[(index + 1 + len(str(new_name))) % len(names)] if names else "x"
            one, two = tensors.get(name), tensors.get(other)
            tensors[name], tensors[other] = (two, one) if action == "exchange" else (one, one)
        elif (shard % len(files), name) not in altered and isinstance(tensors.get(name), torch.Tensor):
            altered.add((shard % len(files), name))
            # A tensor that is already altered, for example a sparse one, may not support a second change.
            with contextlib.suppress(RuntimeError, IndexError, ValueError):
                tensors[name] = REPLACEMENTS[action](tensors[name])
    folder = write_case(variant, sound(variant))
    by_file = list(files.items())
    for (file, _), (_, tensors) in zip(by_file, by_file[order % len(by_file) :] + by_file[: order % len(by_file)], strict=True):
        (folder / file).unlink()
        torch.save(tensors, folder / file)
    llama = build(folder)
    stored = [tensors for _, tensors in (by_file[order % len(by_file) :] + by_file[: order % len(by_file)])]
    for name, weight in llama.model.state_dict().items():
        dim = shards.split_dim(name)
        parts = [tensors[name] for tensors in stored][: None if dim is not None else 1]
        expected = torch.cat([p.detach() for p in parts], dim=dim or 0).to(weight.dtype)
        if not torch.equal(weight, expected) or not expected.isfinite().all():
            raise BrokenPromise(f"{name} was loaded with other values than the file contains")
    answer(llama)


def play_params(params: Any) -> None:
    """Build a model with another params.json: `params` is a dict of values to replace, the file as bytes, or any other JSON."""
    values = PARAMS | params if isinstance(params, dict) else params
    text = params if isinstance(params, bytes) else json.dumps(values).encode()
    llama = build(write_case("one", sound("one") | {"params.json": text}))
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
    if {k: _json(text).get(k) for k in keys} == {k: PARAMS.get(k) for k in keys} and answer(llama) != sound_answer():
        raise BrokenPromise("the model has the same parameters, but another answer")
    answer(llama)


def play_header(variant: str, changes: Sequence[Edit]) -> None:
    """Change the header of a file of quantized weights to other JSON, and build the model."""
    (name,) = (n for n in sound(variant) if n.endswith(".safetensors"))
    data = sound(variant)[name]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for index, key, value in changes:
        entry = list(header)[index % len(header)]
        if key == "name":
            header[str(value)] = header.pop(entry)
        elif key == "entry" or not isinstance(header[entry], dict):
            header[entry] = value
        else:
            header[entry][key] = value
    text = json.dumps(header).encode()
    files = sound(variant) | {name: len(text).to_bytes(8, "little") + text + data[8 + length :]}
    if variant == "int8":
        files.pop(FIRST, None)
    answer(build(write_case(variant, files), variant))
