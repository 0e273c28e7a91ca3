"""`python -m llama complete`: continue texts from the command line or standard input, or answer the lines of JSON files."""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from ..chat import LLAMA_2, ChatFormat, is_unsafe
from ..distributed.agreement import run_on_rank0
from ..distributed.groups import replica
from ..distributed.setup import initialize
from ..errors import InputError, describe
from ..generation import Llama
from ..hugging_face.load import find_chat_format
from ..tokenizer import check_text, encode_prompt
from .model_options import build_model, call_options
from .terminal import Terminal, configure_stream

CHUNK_BATCHES = 16  # batches per call, if the prompts are divided among several calls
# The keys that an answer adds to a JSON object; the last two if tokens are guessed.
RESULT_KEYS = ("generation", "finish_reason", "prompt_tokens", "new_tokens", "guessed_tokens", "accepted_tokens")

Record = dict[str, Any]  # {"prompt": TEXT} or {"messages": DIALOG}; from a JSON line, with any other keys of the line


def run_complete(args: argparse.Namespace) -> None:
    """Continue one text as a stream, or several as a batch; with --jsonl, also answer dialogs."""
    options = call_options(args)
    initialize(args.device, args.model_parallel_size)
    terminal = Terminal()
    configure_stream(sys.stdout, errors="replace", **({"encoding": "utf-8"} if args.jsonl else {}))
    records, labels = run_on_rank0(
        lambda: (
            read_json_lines(
                args.prompts or ["-"], [*options, "seed", "speculate"], find_chat_format(args.ckpt_dir, args.tokenizer_path)
            )
            if args.jsonl
            else read_texts(args.prompts)
        )
    )
    llama = build_model(args, min(max(len(records), 1), args.max_batch_size))
    if len(records) == 1 and not args.jsonl:
        prompt = records[0]["prompt"]
        with llama.text_completion_stream(prompt, **options) as stream:
            terminal.write(f"{prompt}\n> ")
            for chunk in stream:
                terminal.write(chunk)
                if run_on_rank0(terminal.interrupted):
                    break
        terminal.write("\n")
        return
    check_lengths(llama, records, labels, args.max_seq_len)  # of all, before the first is answered
    # On a terminal, and with replicas (which return results only when a call ends), divide the texts among several calls, so
    # that the first results appear before all texts are finished.
    in_chunks = sys.stdout.isatty() or replica()[1] > 1
    size = CHUNK_BATCHES * args.max_batch_size * replica()[1] if in_chunks else len(records)
    for i in range(0, len(records), max(size, 1)):
        part = records[i : i + size]
        results: Iterable[Any]
        if "messages" in part[0]:
            dialogs = [record["messages"] for record in part]
            results = llama.iter_chat_completion(dialogs, continue_answer=True, **options)
        else:
            results = llama.iter_text_completion([record["prompt"] for record in part], **options)
        for record, result in zip(part, results, strict=True):
            if args.jsonl:
                terminal.write(json.dumps({**record, **result}, ensure_ascii=False) + "\n")
            else:
                terminal.write(f"{record['prompt']}\n> {result['generation']}\n\n")


def check_lengths(llama: Llama, records: list[Record], labels: list[str], max_seq_len: int) -> None:
    """Raise InputError on all ranks if a prompt or dialog has more than max_seq_len tokens on rank 0."""

    def check() -> None:
        for record, label in zip(records, labels, strict=True):
            n_tokens = count_tokens(llama, record, label)
            if n_tokens > max_seq_len:
                raise InputError(
                    f"{label} has {n_tokens} tokens, more than max_seq_len={max_seq_len}; "
                    "shorten it, or build with a larger max_seq_len"
                )

    run_on_rank0(check)  # a template may give each rank another number of tokens


def count_tokens(llama: Llama, record: Record, label: str) -> int:
    """Return the number of tokens of a prompt or dialog. label: what an error calls it.

    A dialog with special tags has none: it is refused, not computed.
    """
    if "prompt" in record:
        return len(encode_prompt(llama.tokenizer, record["prompt"]))
    dialog, chat_format = record["messages"], llama.chat_format
    return 0 if is_unsafe(dialog, chat_format.tags) else len(chat_format.encode(llama.tokenizer, dialog, label))


def read_texts(prompts: list[str]) -> tuple[list[Record], list[str]]:
    """Return a record for each prompt, and a label for each, for errors. Without prompts, standard input is the prompt."""
    labels = [f"prompt {i}" for i in range(len(prompts))]
    if not prompts:
        _prepare_stdin()
        prompts, labels = [sys.stdin.read().removesuffix("\n")], ["standard input"]
        if not prompts[0]:
            raise InputError("standard input contains no text to continue; give a text there, or as an argument")
    for prompt, label in zip(prompts, labels, strict=True):
        check_text(prompt, label)
    return [{"prompt": prompt} for prompt in prompts], labels


def read_json_lines(
    names: list[str], option_names: list[str], chat_format: ChatFormat = LLAMA_2
) -> tuple[list[Record], list[str]]:
    """Read files of JSON lines; "-" is standard input. Return the object of each line, and a label for each, for errors.

    Each line is an object with a "prompt" or with "messages". All lines have the same of the two. option_names: keys that are
    refused, because options apply to all lines. chat_format: checks dialogs.
    """
    records: list[Record] = []
    labels: list[str] = []
    kinds: dict[str, str] = {}  # maps "prompt" and "messages" to the first line that has this key
    if names.count("-") > 1:
        raise InputError('"-", standard input, is given more than once; it can be read only once')
    for name in names:
        for number, line in enumerate(_read_lines(name), 1):
            if not line.strip():
                continue
            where = f"line {number}" if name == "-" else f"{name}, line {number}"
            record = parse_json_line(line, where, option_names, chat_format)
            kind = "prompt" if "prompt" in record else "messages"
            kinds.setdefault(kind, where)
            if len(kinds) > 1:
                one, other = kinds
                raise InputError(
                    f'{kinds[one]} has "{one}", but {kinds[other]} has "{other}"; put texts and dialogs into separate files'
                )
            records.append(record)
            labels.append(f"{where}: its {'prompt' if kind == 'prompt' else 'dialog'}")
    return records, labels


def check_utf8(line: str) -> None:
    """Raise InputError if a line, read with surrogateescape, contains bytes that are not UTF-8."""
    if byte := next((ord(char) & 0xFF for char in line if 0xDC80 <= ord(char) <= 0xDCFF), 0):
        raise InputError(f"byte {byte:#x} is not UTF-8; convert the file to UTF-8")


def parse_json_line(line: str, where: str, option_names: list[str], chat_format: ChatFormat = LLAMA_2) -> Record:
    """Return the object of a JSON line. Raise InputError, which names the line, for anything that cannot be answered."""
    try:
        record = json.loads(
            line.rstrip(), object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_number
        )
        if isinstance(record, dict):
            check_utf8(line)
            check_text(json.dumps(record, ensure_ascii=False), "it")  # for escapes such as \ud800
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
        raise InputError(f"{where} is {describe(line.strip())}: not JSON ({reason})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError(f'{where} is {describe(record)}; it must be {{"prompt": TEXT}} or {{"messages": [...]}}')
    for key in record:
        if key in RESULT_KEYS:
            raise InputError(f'{where} has "{key}", a key that the answer adds; rename or remove it')
        if key in option_names:
            raise InputError(f'{where} has "{key}", but options apply to all lines; give --{key}, or rename the key')
    if "prompt" in record:
        check_text(record["prompt"], f"{where}: its prompt")
    elif isinstance(record["messages"], list):
        chat_format.check(record["messages"], f"{where}: its dialog", continue_answer=True)
    else:
        raise InputError(f"{where}: its messages are {describe(record['messages'])}; they must be a list")
    return record


def _read_lines(name: str) -> list[str]:
    if name == "-":
        _prepare_stdin()
        return sys.stdin.readlines()
    try:
        with Path(name).open(encoding="utf-8-sig", errors="surrogateescape") as f:
            return f.readlines()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f'{name!r:.200}: {reason}; with --jsonl, arguments are files, and "-" is standard input') from None


def _prepare_stdin() -> None:
    if sys.stdin.isatty():
        print("reading the text from the keyboard; Ctrl-D ends it", file=sys.stderr)
    configure_stream(sys.stdin, encoding="utf-8-sig", errors="surrogateescape")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InputError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object; remove one")
    return unique


def _finite_number(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise InputError(f"the number {text:.60} is not finite, so it is not JSON; write null or a string")
