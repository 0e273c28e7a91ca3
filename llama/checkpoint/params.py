"""Read and check `params.json`. For error messages, describe what a folder contains if it is not a checkpoint."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError, check_path, describe, explain_system_error, identify_format, read_file
from ..model import ModelArgs
from ..quantization.weight import FORMATS

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MAX_PARAMS_BYTES = 1 << 20  # size limit of params.json; Meta's files have about 100 bytes


def parse_dtype(
    dtype: str | torch.dtype | None, way_out: str = "for quantized weights, use quantize={!r}"
) -> torch.dtype | None:
    """Return the torch.dtype for a dtype or its name; None for None. Raise InputError for an unsupported dtype.

    The name may be bfloat16, float16 or float32, or its short form, bf16, fp16 or fp32. way_out: what the error for int8 and
    int4 advises; {!r} is replaced by the given name.
    """
    if dtype is None:
        return None
    parsed = getattr(torch, _DTYPE_ALIASES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or parsed not in SUPPORTED_DTYPES:
        hint = f"; {way_out.format(dtype)}" if dtype in FORMATS else ""
        raise InputError(
            f"dtype is {describe(dtype)}; use 'bfloat16', 'float16' or 'float32', or leave it out for the stored one{hint}"
        )
    return parsed


LLAMA_3_VOCAB_SIZE = 128256
LLAMA_3 = "is of Llama 3; supported are Llama 2, Code Llama and LLaMA 1: give the folder of one of these"
# For each key of params.json: the type of its value, a test of the value, and the test in words.
_COUNT = (int, lambda v: 1 <= v < 2**31, "a whole number from 1 to 2,147,483,647")
_PARAMS: dict[str, tuple[Any, Any, str]] = {
    "dim": _COUNT, "n_heads": _COUNT, "n_kv_heads": _COUNT, "multiple_of": _COUNT,
    "n_layers": (int, lambda v: 1 <= v <= 1024, "a whole number from 1 to 1,024"),
    "vocab_size": (int, lambda v: v == -1 or 1 <= v < 2**31, "-1 (the tokenizer's) or a whole number, 1 or more"),
    "ffn_dim_multiplier": ((int, float), lambda v: 0 < v <= 1000, "a number above 0, at most 1000"),
    "norm_eps": ((int, float), lambda v: 0 < v < 1, "a number between 0 and 1"),
    "rope_theta": ((int, float), lambda v: 1 <= v <= 1e18, "a number from 1 to 1e18"),
}  # fmt: skip
MERGE_WITH_PEFT = "merge the adapter with PEFT's merge_and_unload(), save_pretrained() the result, and give its folder"
# Arguments of ModelArgs that only models in Hugging Face's layout have.
_OTHER_PARAMS: dict[str, tuple[Any, Any, str]] = {
    "attention_head_dim": (int, lambda v: 2 <= v <= 1 << 16 and v % 2 == 0, "an even number from 2 to 65,536"),
    "rope_scale": ((int, float), lambda v: 1 <= v <= 1e6, "a number from 1 to 1,000,000"),
}
_OPTIONAL_PARAMS = ("n_kv_heads", "ffn_dim_multiplier")  # for these keys, null means the same as a missing key


def read_params(ckpt_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of a folder's `params.json` as arguments of ModelArgs. Raise CheckpointError for any bad value."""
    folder = check_folder(ckpt_dir)
    if "params.json" not in list_folder(folder):
        raise CheckpointError(f"{folder}: no params.json; {describe_folder(folder)}")
    path = folder / "params.json"
    params = read_json(path, MAX_PARAMS_BYTES)
    if "use_scaled_rope" in params or params.get("vocab_size") == LLAMA_3_VOCAB_SIZE:
        raise CheckpointError(f"{path} {LLAMA_3}")
    params = {k: v for k, v in params.items() if not (v is None and k in _OPTIONAL_PARAMS)}
    for key, value in params.items():
        if key not in _PARAMS:
            raise CheckpointError(f"{path}: unknown key {key!r:.80}; a Llama 2 model has {', '.join(_PARAMS)}")
        check_value(path, key, key, value)
    check_heads(path, params)
    return params


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the object that a JSON file contains. Raise CheckpointError if it is none, or larger than max_bytes."""
    text = read_file(path, max_bytes)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = str(e) if text[:1] == b"{" else identify_format(text[:64])
        raise CheckpointError(f"{path}: not JSON ({reason}); fetch it again") from e
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: contains {describe(values)}, not an object of names and values; fetch it again")
    return values


def check_value(path: Path, key: str, name: str, value: Any) -> None:
    """Raise CheckpointError unless a value is allowed for a key. name: the key of params.json that has the same meaning."""
    types, is_valid, requirement = _PARAMS.get(name) or _OTHER_PARAMS[name]
    if isinstance(value, bool) or not isinstance(value, types) or not is_valid(value):
        raise CheckpointError(f"{path}: {key} is {value!r:.80}; it must be {requirement}")


def check_heads(path: Path, params: dict[str, Any]) -> None:
    """Raise CheckpointError unless the model's width can be divided into its heads."""
    args = ModelArgs(**params)
    if args.dim % args.n_heads or args.head_dim % 2:
        raise CheckpointError(f"{path}: dim={args.dim} cannot be divided into n_heads={args.n_heads} heads of even width")
    if args.n_heads % args.kv_heads:
        raise CheckpointError(f"{path}: n_heads={args.n_heads} is no multiple of n_kv_heads={args.n_kv_heads}")


def check_folder(ckpt_dir: str | os.PathLike[str]) -> Path:
    """Return ckpt_dir as a path. Raise CheckpointError unless it is an existing folder."""
    what = "a model's folder, with consolidated.NN.pth and params.json, or in Hugging Face's layout"
    # The name of a repository has one slash, and its owner is not a folder here.
    match = re.fullmatch(r"([\w-]+)/[\w.-]+", ckpt_dir) if isinstance(ckpt_dir, str) else None
    if match and not os.path.exists(match[1]):
        what += "; if this is a repository on Hugging Face, download its files, and give their folder"
    return check_path(ckpt_dir, "ckpt_dir", what, folder=True)


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names of the files in a folder. Raise CheckpointError if the folder cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        raise CheckpointError(f"{folder}: {explain_system_error(e) or f'cannot be read: {e.strerror}'}") from e


def describe_folder(folder: Path) -> str:
    """Return text for an error about a folder without shards: what the folder contains, and what the user can do."""
    names = list_folder(folder)
    if not names:
        return "the folder is empty"
    for format in FORMATS:
        if f"{format}.safetensors" in names:
            return f"it contains quantized weights: build with quantize={format!r}"
    if "bfloat16.safetensors" in names:
        return "it contains packed weights in bfloat16: build without quantize"
    models = [n for n in names if os.path.isfile(folder / n / "params.json")]
    if models:
        if len(models) == 1:
            return f"it contains a model's folder; give {folder / models[0]} as ckpt_dir"
        return f"it contains model folders; give one of them as ckpt_dir: {', '.join(str(folder / n) for n in models[:8])}"
    if any(n.endswith(".safetensors") or n.startswith("pytorch_model") for n in names) and "config.json" not in names:
        return "it contains weights in Hugging Face's layout, but no config.json; fetch this file, too"
    if "config.json" in names:
        return (
            "it contains config.json, but no weights in Hugging Face's layout: no model.safetensors, no pytorch_model.bin, and "
            f"none of their indexes; it contains {_list_names(names)}"
        )
    return f"it contains {_list_names(names)}"


def _list_names(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{' and more' if len(names) > 8 else ''}"
