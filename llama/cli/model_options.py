"""Flags that several commands share: which model to load (chat, complete, serve), and how to sample (chat, complete)."""

import argparse
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import Llama, SamplingParams, resolve_model_paths, validate_options
from ..errors import CheckpointError, InputError, LlamaError
from ..planning import is_adapter
from .process import call_ckpt_dir

# Repeated here, because the command line imports neither `quantization` nor `checkpoint`; `build` checks these values again.
QUANTIZE_FORMATS = ("int8", "int4")
DTYPES = "bfloat16, float16 or float32 (bf16, fp16, fp32)"


def model_parser() -> argparse.ArgumentParser:
    """Return a parser with the flags for `Llama.build`. The parsers of chat, complete and serve extend it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt_dir", metavar="DIR", help="folder with a model, in Meta's or Hugging Face's layout; default: the demo model"
    )
    model.add_argument(
        "--tokenizer_path",
        metavar="FILE",
        help="default: tokenizer.model or tokenizer.json in DIR, or tokenizer.model in its parent folder",
    )
    model.add_argument(
        "--max_seq_len",
        type=int,
        default=512,
        metavar="N",
        help="context length in tokens; default: 512, for chat and serve 4096",
    )
    model.add_argument("--device", help="cpu, cuda or mps (untested); default: cuda if available, else cpu")
    model.add_argument("--dtype", help=f"{DTYPES}; default: the stored one")
    model.add_argument("--quantize", choices=QUANTIZE_FORMATS, help="store the weight matrices in 8 or 4 bit")
    model.add_argument("--adapter", metavar="DIR", help="folder with a LoRA adapter, which is merged into the weights")
    model.add_argument("--speculate", choices=("prompt",), help="guess tokens from those before, for faster decoding")
    model.add_argument(
        "--draft_dir", metavar="DIR", help="folder with a smaller model of the same tokenizer, which guesses tokens"
    )
    model.add_argument("--compile", action="store_true", help="use torch.compile (CUDA): faster decoding after a slower start")
    model.add_argument("--model_parallel_size", type=int, metavar="N", help="ranks that share one model; default: all")
    model.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the random numbers; default: 1")
    return parser


def sampling_parser() -> argparse.ArgumentParser:
    """Return a parser with the flags for sampling. The parsers of chat and complete extend it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=float, default=0.6, metavar="X", help="0 takes the likeliest token; default: 0.6"
    )
    sampling.add_argument("--top_p", type=float, default=0.9, metavar="X", help="probability of the nucleus; default: 0.9")
    sampling.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens; default: 0, all"
    )
    sampling.add_argument(
        "--min_p", type=float, default=0.0, metavar="X", help="least probability, relative to the likeliest token's; default: 0"
    )
    sampling.add_argument(
        "--typical_p", type=float, default=1.0, metavar="X", help="probability of the most typical tokens; default: 1, all"
    )
    sampling.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="default: 1, none")
    sampling.add_argument("--frequency_penalty", type=float, default=0.0, metavar="X", help="-2 to 2; default: 0, none")
    sampling.add_argument("--presence_penalty", type=float, default=0.0, metavar="X", help="-2 to 2; default: 0, none")
    sampling.add_argument(
        "--stop",
        action="append",
        default=[],
        type=unescape,
        metavar="TEXT",
        help="end the answer before this text, in which \\n, \\r, \\t and \\\\ are escapes; may be repeated",
    )
    return parser


def unescape(text: str) -> str:
    r"""Return a text with its escapes \n, \r, \t and \\ replaced, since shells pass them as typed. Other backslashes stay."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[match[1]], text)


def build_model(args: argparse.Namespace, max_batch_size: int) -> Llama:
    """Load the model that the flags specify, after its draft if there is one."""
    if args.speculate is not None and args.draft_dir is not None:
        raise InputError(f"speculate={args.speculate!r} and draft_dir are two ways to guess tokens; give one of them")
    ckpt_dir, tokenizer_path = resolve_model_paths(args.ckpt_dir, args.tokenizer_path)
    if args.max_seq_len is None:
        args.max_seq_len = 4096 if args.ckpt_dir else 512  # the context lengths of Llama 2 (4096) and of the demo model (512)
    sizes = args.max_seq_len, max_batch_size
    names = "seed", "device", "dtype", "compile", "quantize", "model_parallel_size"
    options = {name: getattr(args, name) for name in names}
    draft = None if args.draft_dir is None else build_draft(args.draft_dir, args.tokenizer_path, *sizes, **options)
    return Llama.build(
        ckpt_dir, tokenizer_path, *sizes, adapter=args.adapter, speculate=args.speculate, draft=draft, **options
    )  # fmt: skip


def build_draft(draft_dir: str, tokenizer_path: str | None, *sizes: int, **options: Any) -> Llama:
    """Load a draft. Errors call its folder draft_dir. sizes, options: the arguments of `Llama.build` for the large model."""
    if os.path.isdir(draft_dir) and is_adapter(Path(draft_dir)):
        raise CheckpointError(
            f"draft_dir is {draft_dir!r}: it contains an adapter, not a model: merge it into its model with "
            "python -m llama convert --adapter, and give the result as draft_dir"
        )
    try:
        with call_ckpt_dir("draft_dir"):
            return Llama.build(*resolve_model_paths(draft_dir, tokenizer_path), *sizes, **options)
    except LlamaError as e:
        is_clear = "draft_dir" in str(e) or isinstance(e, InputError)  # other arguments are those of the large model, too
        raise type(e)(str(e) if is_clear else f"the draft in draft_dir: {e}") from None


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options for text generation from the flags. Invalid options raise now, before a model is loaded."""
    names = [field.name for field in fields(SamplingParams) if field.name != "logit_bias"]  # tokens have no flags
    options = {name: getattr(args, name) for name in names}
    options |= {"max_gen_len": args.max_gen_len, "stop": tuple(args.stop)}
    validate_options(**options)
    return options
