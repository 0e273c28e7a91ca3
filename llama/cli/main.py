"""The command line: parse the arguments, run a command, and return the exit code.

python -m llama chat --ckpt_dir llama-2-7b-chat --tokenizer_path tokenizer.model
python -m llama complete --ckpt_dir llama-2-7b --tokenizer_path tokenizer.model "Once upon a time"
torchrun --nproc_per_node 2 -m llama chat --ckpt_dir llama-2-13b-chat --tokenizer_path tokenizer.model
python -m llama quantize --ckpt_dir llama-2-7b int8
python -m llama plan --model 70B --max_seq_len 4096
python -m llama info
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence

from .. import info, save_packed_file
from ..distributed.groups import global_rank, world_size
from ..errors import LlamaError, format_bytes
from ..planning import GPUS, MODELS, model_size, plan
from .chat import run_chat
from .complete import run_complete
from .model_options import DTYPES, QUANTIZE_FORMATS, model_parser
from .terminal import Terminal


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser for all commands."""
    model = model_parser()
    parser = argparse.ArgumentParser("python -m llama", description="Llama 2 in the terminal.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="chat | complete | quantize | plan | info")
    chat = commands.add_parser(
        "chat",
        parents=[model],
        allow_abbrev=False,
        help="talk with a chat model, or ask it one question",
        description="Talk with a chat model. With a question, or if standard input is no terminal, print one answer.",
    )
    chat.add_argument("question", nargs="*", metavar="QUESTION", help="question to answer, after standard input if it is piped")
    chat.add_argument(
        "--max_gen_len", type=int, metavar="N", help="maximum new tokens of an answer; default: the rest of the context"
    )
    chat.add_argument("--system", metavar="TEXT", help="system text, which tells the model how to answer")
    chat.add_argument("--lines", action="store_true", help="answer each line of standard input, in one conversation")
    chat.add_argument("--verbose", action="store_true", help="print tokens and speed after each answer, on stderr")
    chat.add_argument("--no_history", dest="history", action="store_false", help="neither read nor write the history file")
    chat.set_defaults(run=run_chat, max_seq_len=None)

    complete = commands.add_parser(
        "complete",
        parents=[model],
        allow_abbrev=False,
        help="continue texts",
        description="Continue texts. Each is printed, and its continuation after '> '; a single one is streamed.",
    )
    complete.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; without any, standard input")
    complete.add_argument(
        "--max_gen_len", type=int, default=64, metavar="N", help="maximum new tokens of a continuation; default: 64"
    )
    complete.add_argument("--max_batch_size", type=int, default=4, metavar="N", help="texts at a time; default: 4")
    complete.add_argument("--jsonl", action="store_true", help='read {"prompt": TEXT} lines, write one JSON object each')
    complete.set_defaults(run=run_complete)

    quantize = commands.add_parser(
        "quantize",
        allow_abbrev=False,
        help="save packed weights beside a model, in 8 or 4 bit or as they are, for faster loading",
        description="Save a model's weights, packed for the CPU's kernels, in a file beside it, which is loaded from then on.",
    )
    quantize.add_argument("--ckpt_dir", metavar="DIR", required=True, help="folder with consolidated.NN.pth and params.json")
    quantize.add_argument("format", choices=("bfloat16", *QUANTIZE_FORMATS), metavar="FORMAT", help="int8, int4 or bfloat16")
    quantize.set_defaults(run=run_quantize)

    planning = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="show which machines hold a model, and a bound of its speed there",
        description="Compute a model's memory on each rank, and the tokens/s that reading it allows.",
    )
    which = planning.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=model_size, choices=MODELS, help="Meta's 7B, 13B or 70B; -chat is the same")
    which.add_argument("--ckpt_dir", metavar="DIR", help="folder with params.json, and shards if they are there")
    planning.add_argument(
        "--ranks", type=int, nargs="+", default=[], metavar="N", help="numbers of ranks; default: all possible up to 16"
    )
    planning.add_argument("--max_seq_len", type=int, default=4096, metavar="N", help="context length; default: 4096")
    planning.add_argument("--max_batch_size", type=int, default=1, metavar="N", help="rows of the batch; default: 1")
    planning.add_argument("--dtype", choices=DTYPES, help="default: the stored one, bfloat16 for Meta's models")
    planning.add_argument("--quantize", choices=QUANTIZE_FORMATS, help="store the weight matrices in 8 or 4 bit")
    planning.add_argument("--gpu", type=str.upper, choices=GPUS, metavar="NAME", help=f"one of {', '.join(GPUS)}")
    planning.add_argument("--memory", type=float, metavar="GB", help="device memory in GB, for any other machine")
    planning.add_argument("--bandwidth", type=float, metavar="GB/s", help="bandwidth of that memory in GB/s")
    planning.set_defaults(run=run_plan)

    about = commands.add_parser(
        "info",
        allow_abbrev=False,
        help="show how this machine runs a model, and why not faster",
        description="Print versions, device, compiled code and backends, each with the reason why it cannot be used.",
    )
    about.add_argument("--ckpt_dir", metavar="DIR", help="also show how decode steps of this checkpoint would run")
    about.add_argument("--device", help="cpu, cuda or mps; default: the fastest available")
    about.set_defaults(run=lambda args: Terminal().write(f"{info(args.ckpt_dir, args.device)}\n"))
    return parser


def run_quantize(args: argparse.Namespace) -> None:
    path = save_packed_file(args.ckpt_dir, args.format)
    Terminal().write(f"{path}: {format_bytes(path.stat().st_size)}\n")


def run_plan(args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    report = plan(**options)
    if global_rank() == 0:
        Terminal().write(f"{report}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 after success, 1 after an error, 130 after Ctrl-C.

    For a wrong flag, argparse exits with 2.
    """
    rank = global_rank()
    for name in ("stdin", "stdout", "stderr"):  # a stream is None if the parent process has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    silence = contextlib.ExitStack()
    with silence:
        if rank:  # only rank 0 prints help and errors of the command line
            devnull = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(devnull))
            silence.enter_context(contextlib.redirect_stderr(devnull))
        args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except (LlamaError, OSError) as e:
        if rank:
            time.sleep(2)  # torchrun ends this rank meanwhile, so that only rank 0 prints the error
        print(f"llama: {f'rank {rank}: ' if rank else ''}{e}", file=sys.stderr)
        if isinstance(e, OSError):  # standard output may be broken, and would fail again at exit
            sys.stdout = open(os.devnull, "w")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run() -> None:
    """Run the command line as a program, and exit with its exit code."""
    # The handler makes SIGTERM run `finally` blocks. With several ranks, no handler is set here, because a handler in Python
    # would wait for the end of a collective.
    if world_size() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
