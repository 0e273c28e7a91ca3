"""Write a checkpoint in another layout, or in another number of files, tensor by tensor.

The new folder appears once all its files are complete. Unless another dtype is chosen, or an adapter merged, the stored values
and dtypes are unchanged: converting there and back gives the same bits. Memory is needed for one tensor.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import skip_data

from ..distributed.groups import world_size
from ..distributed.progress import progress
from ..errors import CheckpointError, DeviceError, InputError, check_count, describe, explain_system_error, format_bytes
from ..kernels.host_memory import DONTNEED, madvise
from ..model import ModelArgs
from .adapter import open_adapter
from .hugging_face import expected_tensors, in_hugging_faces_order
from .hugging_face_settings import FILES
from .layouts import open_weights, read_params, uses_hugging_face
from .loading import check_finite
from .params import MAX_PARAMS_BYTES, check_folder, parse_dtype, read_json
from .paths import find_tokenizer
from .resharding import shard_parts
from .safetensors_file import FileLayout, encode_header
from .shards import Shards, split_dim
from .torch_file import zip_records
from .validate import build_on_meta, check_shards

LAYOUTS = ("meta", "hf")
# Small files that are copied from one folder in Hugging Face's layout to another.
_COPIED = re.compile(r"(?!.*\.index\.json$).*\.json|chat_template\.jinja")
# With this file, transformers reads tokenizer.model as Llama's tokenizer.
_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
    "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True,
}  # fmt: skip
Spans = dict[str, tuple[int, int]]  # name of a tensor -> the range of its bytes in the file


def convert_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    target: str | os.PathLike[str],
    layout: str,
    shards: int = 1,
    dtype: str | torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a checkpoint into the new folder `target`, in Meta's layout ("meta") or Hugging Face's ("hf"); return its path.

    ckpt_dir: a folder in either layout. shards: the number of files of weights. dtype: that of all written weights; by default
    each keeps its own. adapter: a folder with a LoRA adapter, which is merged into the weights.
    Raises InputError for wrong arguments, CheckpointError for a damaged checkpoint, values too large for `dtype`, a target that
    exists, a full disk, and a model that Meta's layout cannot describe, and DeviceError on several ranks.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {describe(layout)}; it must be one of {', '.join(map(repr, LAYOUTS))}")
    check_count(shards, "shards")
    chosen_dtype = parse_dtype(dtype, "for packed weights, run python -m llama quantize on the result")
    if world_size() > 1:
        raise DeviceError(f"converting takes one process, and this job has {world_size()}: run it without torchrun")
    source, new = check_folder(ckpt_dir).resolve(), _check_target(target)
    params, weights = read_params(source), open_weights(source)
    model = build_on_meta(params, weights, 1, 1, None)
    check_shards(model, weights)
    args = model.params
    if adapter is not None:
        weights.adapter = open_adapter(adapter, args, weights)
    stored = {name: chosen_dtype or _dtype_of(name, weights) for name, _ in expected_tensors(args).values()}
    (_check_for_meta if layout == "meta" else _check_for_hugging_face)(args, shards)
    size = sum(math.prod(shape) * stored[name].itemsize for name, shape in expected_tensors(args).values())
    temporary = new.with_name(f"{new.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        if (free := shutil.disk_usage(temporary).free) < size:
            raise CheckpointError(f"{new} would take {format_bytes(size)}, but {format_bytes(free)} are free there; make room")
        if layout == "meta":
            _write_meta(temporary, weights, args, shards, stored)
        else:
            _write_hugging_face(temporary, weights, args, shards, stored)
            _write_settings(temporary, args, stored, source, chosen_dtype)
        with contextlib.suppress(CheckpointError):  # a folder without a tokenizer can be converted, too
            tokenizer = find_tokenizer(source)
            shutil.copyfile(tokenizer, temporary / tokenizer.name)
        if layout == "meta" or not uses_hugging_face(source):
            _copy_settings_of_texts(source, temporary)
        weights.check_unchanged()
        os.replace(temporary, new)
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f"{new}: cannot be written: {explain_system_error(e) or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return new


def _copy_settings_of_texts(source: Path, target: Path) -> None:
    """Copy the small files that describe texts. What begins and ends texts by config.json goes to generation_config.json."""
    for name in ("tokenizer.json", *FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not uses_hugging_face(source):
        return
    path, config = target / "generation_config.json", read_json(source / "config.json", MAX_PARAMS_BYTES)
    stored = read_json(path, MAX_PARAMS_BYTES) if path.is_file() else {}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    if values := ids | {key: value for key, value in stored.items() if value is not None or key not in ids}:
        path.write_text(json.dumps(values, indent=1))


def _check_target(target: str | os.PathLike[str]) -> Path:
    """Return the path of the new folder. Raise CheckpointError if it exists already, unless it is an empty folder."""
    try:
        new = Path(target).expanduser().absolute()
        is_free = not new.exists() or (new.is_dir() and not any(new.iterdir()))
    except (TypeError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"target is {describe(target)}: {e}; it must be the path of a new folder") from e
    if not is_free or not str(target):
        raise CheckpointError(f"target is {str(target)!r:.200}, which exists already; give the path of a new folder")
    return new


def _check_for_meta(args: ModelArgs, shards: int) -> None:
    """Raise CheckpointError if Meta's layout cannot describe a model, InputError if it cannot be cut into so many shards."""
    if args.rope_scale != 1 or args.head_dim != args.dim // args.n_heads:
        setting = f"rope_scaling by {args.rope_scale}" if args.rope_scale != 1 else f"head_dim={args.head_dim}"
        raise CheckpointError(f"the model has {setting}, which Meta's params.json cannot describe; keep Hugging Face's layout")
    possible = [n for n in range(1, min(args.kv_heads, 1024) + 1) if all(w % n == 0 for w in _divided_widths(args))]
    if shards not in possible:
        raise InputError(f"shards is {shards}; this model can be cut into {', '.join(map(str, possible))} shards")


def _divided_widths(args: ModelArgs) -> tuple[int, ...]:
    return args.kv_heads, args.ffn_width, args.vocab_size, args.dim


def _check_for_hugging_face(args: ModelArgs, shards: int) -> None:
    if shards > args.n_layers:
        raise InputError(f"shards is {shards}, and the model has {args.n_layers} layers; give at most one for each layer")


def _whole_weights(weights: Shards, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight as a whole, (out, in), in its dtype, with its rows in Meta's order, and show the progress.

    dtypes: the dtype of each weight to yield. Raises CheckpointError if a weight is not finite, or if a file has changed.
    """
    sizes = {name: sum(part.nbytes for part in shard_parts(name, weights)) for name in dtypes}
    for name in progress([*dtypes], lambda name: sizes[name], "converting"):
        weights.check_unchanged()
        parts = values = shard_parts(name, weights)
        if weights.adapter is not None:
            values = weights.adapter.merge(name, parts, dtypes[name])
        values = [part.to(dtypes[name]) for part in values]
        for part in values:
            check_finite(part, [name], weights)
        rows = [weights.in_metas_order(name, part) for part in values]
        yield name, rows[0] if len(rows) == 1 else torch.cat(rows, dim=split_dim(name) or 0)
        for part in parts:
            madvise(part, DONTNEED)


def _dtype_of(name: str, weights: Shards) -> torch.dtype:
    """Return the dtype that holds all values of a weight's parts."""
    dtypes = [part.dtype for part in shard_parts(name, weights)]
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def _write_values(f: BinaryIO, span: tuple[int, int], values: torch.Tensor) -> None:
    """Write a tensor's values to a range of bytes of a file."""
    values = values.contiguous()
    assert values.nbytes == span[1] - span[0]
    f.seek(span[0])
    f.write(memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B"))


def _write_meta(folder: Path, weights: Shards, args: ModelArgs, n: int, dtypes: dict[str, torch.dtype]) -> None:
    """Write params.json, consolidated.NN.pth and checklist.chk. dtypes: the dtype of each weight."""
    params: dict[str, Any] = {
        "dim": args.dim, "multiple_of": args.multiple_of, "n_heads": args.n_heads, "n_layers": args.n_layers,
        "norm_eps": args.norm_eps, "vocab_size": args.vocab_size,
    }  # fmt: skip
    for name, default in (("n_kv_heads", None), ("ffn_dim_multiplier", None), ("rope_theta", 10000.0)):
        if (value := getattr(args, name)) != default:
            params[name] = value
    (folder / "params.json").write_text(json.dumps(params))
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(n)]
    shapes = {name: shape for name, shape in expected_tensors(args).values()}
    layout: FileLayout = {}
    for name, dtype in dtypes.items():
        shape, dim = list(shapes[name]), split_dim(name)
        if dim is not None:
            shape[dim] //= n
        layout[name] = dtype, tuple(shape)
    spans = [_write_empty_shard(path, layout) for path in paths]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("r+b")) for path in paths]
        for name, whole in _whole_weights(weights, dtypes):
            dim = split_dim(name)
            parts = [whole] * n if dim is None else whole.chunk(n, dim)
            for f, span, part in zip(files, spans, parts, strict=True):
                _write_values(f, span[name], part)
        for f in files:
            f.flush()
            os.fsync(f.fileno())
    lines = [f"{_md5(path)}  {path.name}\n" for path in [*paths, folder / "params.json"]]
    (folder / "checklist.chk").write_text("".join(lines))


def _write_empty_shard(path: Path, layout: FileLayout) -> Spans:
    """Write a file as torch.save does, but with holes in place of the values; return where the values must be written."""
    tensors = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, (dtype, shape) in layout.items()}
    with skip_data():
        torch.save(tensors, path)  # the empty tensors take no memory, because nothing is ever written to their pages
    with path.open("rb") as f:
        records = zip_records(f)
    # torch.save numbers the storages in the order of the tensors.
    values = [records[f"{path.stem}/data/{i}"] for i in range(len(tensors))]
    return {name: (record.offset, record.offset + record.size) for name, record in zip(tensors, values, strict=True)}


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _write_hugging_face(folder: Path, weights: Shards, args: ModelArgs, n: int, dtypes: dict[str, torch.dtype]) -> None:
    """Write the weights, and with several files their index. dtypes: the dtype of each weight."""
    theirs = {metas: (name, shape) for name, (metas, shape) in expected_tensors(args).items()}
    index: dict[str, str] = {}
    size = 0
    for i in range(n):
        name = f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"
        here = {metas: dtype for metas, dtype in dtypes.items() if _file_number(metas, args.n_layers, n) == i}
        layout: FileLayout = {theirs[metas][0]: (dtype, theirs[metas][1]) for metas, dtype in here.items()}
        header, spans = encode_header(layout, {"format": "pt"})
        with (folder / name).open("wb") as f:
            f.write(header)
            for metas, whole in _whole_weights(weights, here):
                _write_values(f, spans[theirs[metas][0]], in_hugging_faces_order(metas, whole, args.head_dim))
            f.flush()
            os.fsync(f.fileno())
        index |= dict.fromkeys(layout, name)
        size += sum(end - begin for begin, end in spans.values())
    if n > 1:
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text)


def _write_settings(
    folder: Path, args: ModelArgs, dtypes: dict[str, torch.dtype], source: Path, dtype: torch.dtype | None
) -> None:
    """Write config.json and tokenizer_config.json, or copy all settings if the source is in Hugging Face's layout.

    dtypes: the dtype of each weight. dtype: that of all weights, if the caller has chosen it.
    """
    if not uses_hugging_face(source):
        name = str(dtypes["tok_embeddings.weight"]).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(_config(args, name), indent=1))
        (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=1))
        return
    for file in os.listdir(source):
        if _COPIED.fullmatch(file) and (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    if dtype is not None:
        config = read_json(source / "config.json", MAX_PARAMS_BYTES)
        key = "dtype" if "dtype" in config else "torch_dtype"  # the names since and before transformers 5
        config[key] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=1))


def _file_number(name: str, n_layers: int, n: int) -> int:
    """Return the number of the file, of n files, that contains a weight: the layers are divided evenly."""
    if layer := re.match(r"layers\.(\d+)\.", name):
        return int(layer[1]) * n // n_layers
    return 0 if name == "tok_embeddings.weight" else n - 1


def _config(args: ModelArgs, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model in Meta's layout. dtype: the name of the weights' dtype."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": args.dim,
        "intermediate_size": args.ffn_width, "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads, "rms_norm_eps": args.norm_eps, "rope_theta": args.rope_theta,
        "vocab_size": args.vocab_size, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        # Meta's params.json does not contain the context length of the training: that of Code Llama and of Llama 2.
        "max_position_embeddings": 16384 if args.rope_theta == 1e6 else 4096,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip
