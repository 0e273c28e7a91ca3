"""Tell what a folder contains: a model in Meta's or Hugging Face's layout, packed weights, or an adapter."""

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint import hugging_face_config, layouts, packed_file
from ..checkpoint.adapter_config import read_adapter_config
from ..checkpoint.hugging_face import expected_tensors
from ..checkpoint.layouts import is_adapter
from ..checkpoint.params import check_folder, list_folder
from ..checkpoint.paths import find_tokenizer
from ..errors import CheckpointError, format_bytes, short_repr
from ..model import ModelArgs
from ..quantization.weight import FORMATS
from .estimate import memory_required
from .machines import describe_checkpoint

LONGEST_CONTEXT = 4096  # tokens of context for which memory is estimated; fewer if the training had fewer


def describe_folder(ckpt_dir: str | os.PathLike[str], describe_template: Callable[[Path], str]) -> str:
    """Return a report of what a folder contains. Raises CheckpointError if it contains neither a model nor an adapter.

    describe_template: a function from the folder to a few words about its chat template, such as `hugging_face.load` has.
    """
    folder = check_folder(ckpt_dir)
    lines = _describe_adapter(folder) if is_adapter(folder) else _describe_model(folder, describe_template)
    return "\n".join(f"{label:<24}{text}" for label, text in lines)


def _describe_adapter(folder: Path) -> list[tuple[str, str]]:
    """Return what an adapter is for. Raise CheckpointError if it is of a kind that is not merged here."""
    config = read_adapter_config(folder)
    base, modules = config.get("base_model_name_or_path") or "a model that it does not name", config.get("target_modules", [])
    names = sorted({name.rpartition(".")[2] for name in modules}) if isinstance(modules, list) else [modules]
    return [
        ("adapter", f"LoRA for {short_repr(base)}: give this folder to build(adapter=), or to --adapter"),
        ("rank and alpha", f"{config['r']}, {config['lora_alpha']}{', rank-stabilised' if config.get('use_rslora') else ''}"),
        ("modules", f"{', '.join(names):.200}"),
    ]


def _describe_model(folder: Path, describe_template: Callable[[Path], str]) -> list[tuple[str, str]]:
    args, paths = describe_checkpoint(folder)[0], layouts.weight_paths(folder)
    packed = [format for format in packed_file.PACKED_FORMATS if f"{format}.safetensors" in list_folder(folder)]
    if not paths and packed and (tensors := packed_file.open_packed_file(folder, packed[0])):
        args = replace(args, vocab_size=len(tensors.first["tok_embeddings.weight"]))
    theirs = layouts.uses_hugging_face(folder)
    stored = layouts.open_weights(folder, values=False) if paths else {}
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for tensors in stored.values() for t in tensors.values()})
    size = sum(path.stat().st_size for path in paths)
    first = next(iter(stored.values()), {})
    is_tied = bool(first) and first.get("output.weight") is first.get("tok_embeddings.weight")
    files = f"{len(paths)} file{'s' if len(paths) > 1 else ''}, {format_bytes(size)}, {' and '.join(dtypes)}"
    n_parameters = sum(math.prod(shape) for _, shape in expected_tensors(args).values())
    n_parameters -= args.vocab_size * args.dim if is_tied else 0
    context = hugging_face_config.trained_context(folder) if theirs else None
    rope = hugging_face_config.describe_rope(folder) if theirs else f"theta {args.rope_theta:g}"
    return [
        ("layout", "Hugging Face's" if theirs else "Meta's"),
        ("weights", files if paths else "none but the packed ones"),
        ("saved packed weights", ", ".join(f"{format}.safetensors" for format in packed) or "none"),
        ("parameters", f"{n_parameters:,}{'; the output layer is the embedding' if is_tied else ''}"),
        ("vocabulary", f"{args.vocab_size:,} tokens"),
        ("context", f"{context:,} tokens" if context else "4,096 tokens in Llama 2; Meta's files do not say"),
        ("rotary embedding", rope),
        ("tokenizer", _describe_tokenizer(folder)),
        ("chat template", describe_template(folder)),
        ("memory, one rank", _describe_memory(args, min(context or LONGEST_CONTEXT, LONGEST_CONTEXT))),
    ]


def _describe_tokenizer(folder: Path) -> str:
    with contextlib.suppress(CheckpointError):
        path = find_tokenizer(folder)
        where = "" if path.parent == folder else ", in the parent folder"
        return f"{path.name} ({'SentencePiece' if path.suffix == '.model' else 'tokenizers'}){where}"
    return "none: give tokenizer_path"


def _describe_memory(args: ModelArgs, context: int) -> str:
    args = replace(args, max_seq_len=context, max_batch_size=1)
    needs = [
        f"{format or 'bfloat16'} {format_bytes(memory_required(args, 1, torch.bfloat16, format).total)}"
        for format in (None, *FORMATS)
    ]
    return f"{', '.join(needs)} (with a KV cache of 1 x {context:,} tokens)"
