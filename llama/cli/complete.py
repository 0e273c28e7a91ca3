"""`python -m llama complete`: continue texts from the command line, standard input or JSON lines."""

import argparse
import json
import sys

from ..distributed.agreement import run_on_rank0
from ..distributed.groups import replica
from ..distributed.setup import initialize
from ..errors import InputError, describe
from ..tokenizer import check_text
from .model_options import build_model, call_options
from .terminal import Terminal, configure_stream

CHUNK_BATCHES = 16  # batches per call, if the prompts are divided among several calls


def run_complete(args: argparse.Namespace) -> None:
    """Continue one text as a stream, or several as a batch."""
    options = call_options(args)
    initialize(args.device, args.model_parallel_size)
    terminal = Terminal()
    configure_stream(sys.stdout, errors="replace")
    prompts, labels = run_on_rank0(lambda: _given_prompts(args.prompts) if args.prompts else read_prompts(args.jsonl))
    llama = build_model(args, min(max(len(prompts), 1), args.max_batch_size))
    if len(prompts) == 1 and not args.jsonl:
        with llama.text_completion_stream(prompts[0], **options) as stream:
            terminal.write(f"{prompts[0]}\n> ")
            for chunk in stream:
                terminal.write(chunk)
                if run_on_rank0(terminal.interrupted):
                    break
        terminal.write("\n")
        return
    for prompt, label in zip(prompts, labels, strict=True):  # check all prompts before the first is answered
        n_tokens = len(llama.tokenizer.encode(prompt, bos=True, eos=False))
        if n_tokens > args.max_seq_len:
            raise InputError(
                f"{label} has {n_tokens} tokens, more than max_seq_len={args.max_seq_len}; "
                "shorten it, or build with a larger max_seq_len"
            )
    # On a terminal, and with replicas (which return results only when a call ends), divide the texts among several calls, so
    # that the first results appear before all texts are finished.
    in_chunks = sys.stdout.isatty() or replica()[1] > 1
    size = CHUNK_BATCHES * args.max_batch_size * replica()[1] if in_chunks else len(prompts)
    for i in range(0, len(prompts), max(size, 1)):
        part = prompts[i : i + size]
        for prompt, result in zip(part, llama.iter_text_completion(part, **options), strict=True):
            if args.jsonl:
                terminal.write(json.dumps({"prompt": prompt, **result}, ensure_ascii=False) + "\n")
            else:
                terminal.write(f"{prompt}\n> {result['generation']}\n\n")


def _given_prompts(prompts: list[str]) -> tuple[list[str], list[str]]:
    labels = [f"prompt {i}" for i in range(len(prompts))]
    for prompt, label in zip(prompts, labels, strict=True):
        check_text(prompt, label)
    return prompts, labels


def read_prompts(jsonl: bool) -> tuple[list[str], list[str]]:
    """Read prompts from standard input: with `jsonl`, a JSON object on each line; otherwise the whole input is one prompt.

    Returns the prompts, and a label for each that error messages use.
    """
    if sys.stdin.isatty():
        print("reading the text from the keyboard; Ctrl-D ends it", file=sys.stderr)
    configure_stream(sys.stdin, encoding="utf-8-sig", errors="surrogateescape")
    if not jsonl:
        text = sys.stdin.read().removesuffix("\n")
        if not text:
            raise InputError("standard input contains no text to continue; give a text there, or as an argument")
        check_text(text, "standard input")
        return [text], ["standard input"]
    prompts, labels = [], []
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"line {number} is {describe(line.strip())}: not JSON ({e})") from e
        if not isinstance(record, dict) or list(record) != ["prompt"]:
            raise InputError(f'line {number} is {describe(record)}; it must be {{"prompt": TEXT}}, and nothing else')
        labels.append(f"line {number}: its prompt")
        check_text(record["prompt"], labels[-1])
        prompts.append(record["prompt"])
    return prompts, labels
