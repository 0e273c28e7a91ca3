"""Hostile files, as plain data: sound ones damaged, or saved with other contents; and whether what loads is right."""

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
FOLDERS = {  # what is in each, and how it is built
    "one": ([FIRST, "params.json", "tokenizer.model"], None),
    "two": ([FIRST, SECOND, "params.json", "tokenizer.model"], None),
    "int8": (["int8.safetensors", "params.json", "tokenizer.model"], "int8"),
    "int4": ([FIRST, "int4.safetensors", "params.json", "tokenizer.model"], "int4"),
}
Edit = tuple[Any, ...]


class Wrong(Exception):
    """A case that ended in neither an error of ours nor a right answer."""


# --- the sound model ---------------------------------------------------------------------------------------------------


@functools.lru_cache
def home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="llama-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache
def sound(which: str) -> dict[str, bytes]:
    """The files of a sound model, by name."""
    folder, (names, kind) = home() / which, FOLDERS[which]
    weights = {name: w.bfloat16() for name, w in random_weights(PARAMS, VOCAB, HIDDEN).items()}
    write_shards(folder, PARAMS, weights, 2 if which == "two" else 1)
    train_tokenizer(folder / "tokenizer.model", VOCAB)
    if kind:
        packed_file.save_packed_file(folder, kind)
    return {name: (folder / name).read_bytes() for name in names}


def opened(folder: Path, which: str) -> shards.Shards:
    kind = FOLDERS[which][1]
    return (packed_file.open_packed_file(folder, kind) if kind else None) or shards.open_shards(folder)


@functools.lru_cache
def sound_tensors(which: str) -> shards.Shards:
    return {
        file: {n: t.clone() for n, t in tensors.items()} for file, tensors in opened(put(which, sound(which)), which).items()
    }


def put(which: str, files: dict[str, bytes]) -> Path:
    """A new folder of these files: those of the case before may still be mapped."""
    folder = home() / f"case-{next(cases)}"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


cases = itertools.count()


def build(folder: Path, which: str = "one") -> Llama:
    quantize = FOLDERS[which][1]
    return Llama.build(folder, folder / "tokenizer.model", max_seq_len=32, max_batch_size=2, device="cpu", quantize=quantize)


@functools.lru_cache
def sound_llama(which: str = "one") -> Llama:
    return build(put(which, sound(which)), which)


def answer(llama: Llama) -> list[list[int]]:
    return llama.generate(PROBE, 6, temperature=0)[0]


@functools.lru_cache
def sound_answer(which: str = "one") -> list[list[int]]:
    return answer(sound_llama(which))


@functools.lru_cache
def payloads(which: str, file: str) -> dict[str, tuple[int, int]]:
    """Where a file has numbers, by tensor; all the rest is its frame."""
    data = sound(which)[file]
    if file not in sound_tensors(which):
        return {}
    if file.endswith(".pth"):
        return {name: _find(data, tensor) for name, tensor in sound_tensors(which)[file].items()}
    if file.endswith(".safetensors"):
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        return {n: tuple(begin + i for i in e["data_offsets"]) for n, e in header.items() if n != "__metadata__"}
    return {}


def _find(data: bytes, tensor: torch.Tensor) -> tuple[int, int]:
    numbers = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data.index(numbers), data.index(numbers) + len(numbers)


# --- bytes -------------------------------------------------------------------------------------------------------------


def edited(data: bytes, edits: Sequence[Edit], frame: Sequence[int] = ()) -> bytes:
    """Each edit has a name, a place, and more. Places are (where, n): anywhere, counted from the end, or in the frame."""
    new = bytearray(data)
    for how, (where, n), *more in edits:
        if not new:
            break
        at = {"any": n, "end": -1 - n % 400, "frame": frame[n % len(frame)] if frame else n}[where] % len(new)
        if how == "cut":
            del new[at:]
        elif how == "flip":
            new[at] ^= 1 << more[0]
        elif how == "set":
            new[at : at + len(more[0])] = more[0][: len(new) - at]
        elif how == "insert":
            new[at:at] = more[0]
        elif how == "delete":
            del new[at : at + more[0]]
        elif how == "copy":
            source = more[0] % len(new)
            block = new[source : source + more[1]][: len(new) - at]
            new[at : at + len(block)] = block
        elif how == "swap":
            other = (at + more[0]) % len(new)
            for i in range(min(more[0], len(new) - max(at, other))):
                new[at + i], new[other + i] = new[other + i], new[at + i]
    return bytes(new)


@functools.lru_cache
def frame_of(which: str, file: str) -> list[int]:
    spans = payloads(which, file).values()
    return [i for i in range(len(sound(which)[file])) if not any(a <= i < b for a, b in spans)] if spans else []


def play_bytes(which: str, file: int, edits: Sequence[Edit]) -> None:
    """A file of a sound model, damaged."""
    files = dict(sound(which))
    name = list(files)[file % len(files)]
    before, after = files[name], edited(files[name], edits, frame_of(which, name))
    folder = put(which, files | {name: after})
    llama, got, whole = build(folder, which), opened(folder, which), sound_tensors(which)
    intact = name != "tokenizer.model" and (name != "params.json" or _json(before) == _json(after))
    for file_name, tensors in got.items():
        for tensor, value in tensors.items():
            span = slice(*payloads(which, file_name).get(tensor, (0, 0)))
            moved = len(after) != len(before) and before[span] in after
            if file_name == name and after[span] != before[span] and not moved:
                intact = False
            elif tensor not in whole[file_name] or not _same(value, whole[file_name][tensor]):
                raise Wrong(f"{tensor} has other numbers, though its bytes are as they were")
    ids = answer(llama)
    if intact and ids != sound_answer(which):
        raise Wrong(f"{ids} instead of {sound_answer(which)}")
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
    """It may be another language's, but must do what it does without harm."""
    for text in ("The quick brown fox", "\0 é 🙂\n  two  spaces ", "<s></s><0x0A>▁"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        if not all(0 <= i < tokenizer.n_words for i in ids):
            raise Wrong(f"{ids} for {tokenizer.n_words} pieces")
        tokenizer.decode(ids)
        for id_ in range(0, tokenizer.n_words, 7):
            tokenizer.decode([id_])


# --- contents ----------------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed": lambda t: t.T.contiguous().T,
    "turned": lambda t: t.T.contiguous(),
    "flat": lambda t: t.flatten(),
    "stepped": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced": lambda t: torch.cat([t, t])[: len(t)],
    "expanded": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape),
    "terabytes": lambda t: torch.ones((), dtype=t.dtype).expand(1 << 20, 1 << 20),
    "windows": lambda t: t.flatten().as_strided(t.shape, [1] * t.ndim),
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
    """A sound model's tensors, altered, and saved by torch.save."""
    which = "two" if n_shards == 2 else "one"
    files = {f: dict(tensors) for f, tensors in sound_tensors(which).items()}
    altered: set[tuple[int, str]] = set()
    for shard, how, at, more in changes:
        tensors = files[list(files)[shard % len(files)]]
        names = sorted(map(str, tensors))
        name = names[at % len(names)] if names else "x"
        if how == "drop":
            tensors.pop(name, None)
        elif how == "rename":
            tensors[more] = tensors.pop(name, None)
        elif how == "add":
            tensors[more] = torch.ones(3)
        elif how in ("exchange", "share"):
            other = names[(at + 1 + len(str(more))) % len(names)] if names else "x"
            one, two = tensors.get(name), tensors.get(other)
            tensors[name], tensors[other] = (two, one) if how == "exchange" else (one, one)
        elif (shard % len(files), name) not in altered and isinstance(tensors.get(name), torch.Tensor):
            altered.add((shard % len(files), name))
            with contextlib.suppress(RuntimeError, IndexError, ValueError):  # of what was altered, and then shared
                tensors[name] = OTHERS[how](tensors[name])
    folder = put(which, sound(which))
    named = list(files.items())
    for (file, _), (_, tensors) in zip(named, named[order % len(named) :] + named[: order % len(named)], strict=True):
        (folder / file).unlink()
        torch.save(tensors, folder / file)
    llama = build(folder)
    stored = [tensors for _, tensors in (named[order % len(named) :] + named[: order % len(named)])]
    for name, weight in llama.model.state_dict().items():
        dim = shards.split_dim(name)
        parts = [t[name] for t in stored][: None if dim is not None else 1]
        whole = torch.cat([p.detach() for p in parts], dim=dim or 0).to(weight.dtype)
        if not torch.equal(weight, whole) or not whole.isfinite().all():
            raise Wrong(f"{name} was loaded as other numbers")
    answer(llama)


def play_params(params: Any) -> None:
    """params.json: bytes as they are; a dict in place of some of the sound one's values; else any JSON."""
    values = PARAMS | params if isinstance(params, dict) else params
    text = params if isinstance(params, bytes) else json.dumps(values).encode()
    llama = build(put("one", sound("one") | {"params.json": text}))
    same = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
    if {k: _json(text).get(k) for k in same} == {k: PARAMS.get(k) for k in same} and answer(llama) != sound_answer():
        raise Wrong("another answer")
    answer(llama)


def play_header(which: str, changes: Sequence[Edit]) -> None:
    """The header of a file of quantized weights: any JSON in it."""
    (name,) = (n for n in sound(which) if n.endswith(".safetensors"))
    data = sound(which)[name]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for at, key, value in changes:
        entry = list(header)[at % len(header)]
        if key == "name":
            header[str(value)] = header.pop(entry)
        elif key == "entry" or not isinstance(header[entry], dict):
            header[entry] = value
        else:
            header[entry][key] = value
    text = json.dumps(header).encode()
    files = sound(which) | {name: len(text).to_bytes(8, "little") + text + data[8 + length :]}
    if which == "int8":
        files.pop(FIRST, None)
    answer(build(put(which, files), which))
