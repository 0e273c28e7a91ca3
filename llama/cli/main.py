"""The command line: parse the arguments, run a command, and return the exit code.

python -m llama chat --ckpt_dir llama-2-7b-chat --tokenizer_path tokenizer.model
python -m llama complete --ckpt_dir llama-2-7b --tokenizer_path tokenizer.model "Once upon a time"
python -m llama serve --ckpt_dir llama-2-7b-chat
torchrun --nproc_per_node 2 -m llama chat --ckpt_dir llama-2-13b-chat --tokenizer_path tokenizer.model
python -m llama quantize --ckpt_dir llama-2-7b int8
python -m llama convert llama-2-7b-hf llama-2-7b --to meta
python -m llama plan --model 70B --max_seq_len 4096
python -m llama info llama-2-7b
python -m llama info
"""

import argparse
import difflib
import signal
import sys
from collections.abc import Collection, Sequence
from typing import Any

from .. import __version__, convert_checkpoint, info, save_packed_file
from ..distributed.groups import global_rank, world_size
from ..errors import InputError, format_bytes
from ..hugging_face.load import describe_template
from ..planning import GPUS, MODELS, describe_folder, model_size, plan
from .chat import run_chat
from .complete import run_complete
from .flags import normalize_flags
from .model_options import DTYPES, QUANTIZE_FORMATS, model_parser, sampling_parser
from .process import call_ckpt_dir, exit_code, open_missing_streams, silence_other_ranks
from .serve import add_flags, run_serve
from .terminal import Terminal


def make_parser() -> "tuple[argparse.ArgumentParser, argparse._SubParsersAction[Any]]":
    """Return the argument parser for all commands, and its parsers of single commands."""
    model, sampling = model_parser(), sampling_parser()
    parser = argparse.ArgumentParser("python -m llama", description="Llama 2 in the terminal.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"llama {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="chat | complete | serve | quantize | convert | plan | info"
    )
    chat = commands.add_parser(
        "chat",
        parents=[model, sampling],
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
        parents=[model, sampling],
        allow_abbrev=False,
        help="continue texts",
        description="Continue texts. Each is printed, and its continuation after '> '; a single one is streamed.",
    )
    complete.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to continue, or with --jsonl a file; without any, standard input"
    )
    complete.add_argument(
        "--max_gen_len", type=int, default=64, metavar="N", help="maximum new tokens of a continuation; default: 64"
    )
    complete.add_argument("--max_batch_size", type=int, default=4, metavar="N", help="texts at a time; default: 4")
    complete.add_argument(
        "--jsonl",
        action="store_true",
        help='read files of {"prompt": TEXT} or {"messages": [...]} lines; write each line with its answer added',
    )
    complete.set_defaults(run=run_complete)

    serve = commands.add_parser(
        "serve",
        parents=[model],
        allow_abbrev=False,
        help="answer HTTP requests in OpenAI's format",
        description="Answer HTTP requests in OpenAI's format, and show a page for a chat. docs/serving.md describes it.",
    )
    add_flags(serve)
    serve.set_defaults(run=run_serve, max_seq_len=None)

    quantize = commands.add_parser(
        "quantize",
        allow_abbrev=False,
        help="save packed weights beside a model, in 8 or 4 bit or as they are, for faster loading",
        description="Save a model's weights, packed for the CPU's kernels, in a file beside it, which is loaded from then on.",
    )
    quantize.add_argument("--ckpt_dir", metavar="DIR", required=True, help="folder with a model")
    quantize.add_argument("format", choices=("bfloat16", *QUANTIZE_FORMATS), metavar="FORMAT", help="int8, int4 or bfloat16")
    quantize.set_defaults(run=run_quantize)

    convert = commands.add_parser(
        "convert",
        allow_abbrev=False,
        help="write a model in Meta's or Hugging Face's layout, or in another number of files",
        description="Write a model into a new folder, in Meta's or Hugging Face's layout. "
        "Without --dtype and --adapter, the values are unchanged.",
    )
    convert.add_argument("source", metavar="SRC", help="folder with a model, in either layout")
    convert.add_argument("target", metavar="DST", help="folder to write, which must not exist")
    convert.add_argument("--to", choices=("meta", "hf"), required=True, help="the layout to write")
    convert.add_argument("--shards", type=int, default=1, metavar="N", help="number of files of weights; default: 1")
    convert.add_argument("--dtype", help=f"{DTYPES}; default: the stored one")
    convert.add_argument("--adapter", metavar="DIR", help="folder with a LoRA adapter, which is merged into the weights")
    convert.set_defaults(run=run_convert)

    planning = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="show which machines hold a model, and a bound of its speed there",
        description="Compute a model's memory on each rank, and the tokens/s that reading it allows.",
    )
    which = planning.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=model_size, choices=MODELS, help="Meta's 7B, 13B or 70B; -chat is the same")
    which.add_argument(
        "--ckpt_dir", metavar="DIR", help="folder with params.json or config.json, and weights if they are there"
    )
    planning.add_argument(
        "--ranks", type=int, nargs="+", default=[], metavar="N", help="numbers of ranks; default: all possible up to 16"
    )
    planning.add_argument("--max_seq_len", type=int, default=4096, metavar="N", help="context length; default: 4096")
    planning.add_argument("--max_batch_size", type=int, default=1, metavar="N", help="rows of the batch; default: 1")
    planning.add_argument("--dtype", help=f"{DTYPES}; default: the stored one, bfloat16 for Meta's models")
    planning.add_argument("--quantize", choices=QUANTIZE_FORMATS, help="store the weight matrices in 8 or 4 bit")
    planning.add_argument("--gpu", type=str.upper, choices=GPUS, metavar="NAME", help=f"one of {', '.join(GPUS)}")
    planning.add_argument("--memory", type=float, metavar="GB", help="device memory in GB, for any other machine")
    planning.add_argument("--bandwidth", type=float, metavar="GB/s", help="bandwidth of that memory in GB/s")
    planning.set_defaults(run=run_plan)

    about = commands.add_parser(
        "info",
        allow_abbrev=False,
        help="show how this machine runs a model, and why not faster, or what a folder contains",
        description="Print versions, device, compiled code and backends, each with the reason why it cannot be used. With DIR, "
        "print what this folder contains instead.",
    )
    about.add_argument("folder", nargs="?", metavar="DIR", help="show what this folder contains: a model or an adapter")
    about.add_argument("--ckpt_dir", metavar="DIR", help="show how decode steps of this model would run here")
    about.add_argument("--device", help="cpu, cuda or mps (untested); default: cuda if available, else cpu")
    about.set_defaults(run=run_info)
    return parser, commands


def run_quantize(args: argparse.Namespace) -> None:
    path = save_packed_file(args.ckpt_dir, args.format)
    Terminal().write(f"{path}: {format_bytes(path.stat().st_size)}\n")


def run_convert(args: argparse.Namespace) -> None:
    with call_ckpt_dir("SRC"):
        path = convert_checkpoint(args.source, args.target, args.to, args.shards, args.dtype, args.adapter)
    size = sum(file.stat().st_size for file in path.iterdir())
    Terminal().write(f"{path}: {format_bytes(size)}\n")


def run_info(args: argparse.Namespace) -> None:
    if args.folder is not None and (args.ckpt_dir, args.device) != (None, None):
        raise InputError(f"DIR is {args.folder!r}, so neither --ckpt_dir nor --device can be given; run info twice")
    if args.folder is None:
        report = info(args.ckpt_dir, args.device)
    else:
        with call_ckpt_dir("DIR"):
            report = describe_folder(args.folder, describe_template)
    Terminal().write(f"{report}\n")


def run_plan(args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    report = plan(**options)
    if global_rank() == 0:
        Terminal().write(f"{report}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 after success, 1 after an error, 130 after Ctrl-C.

    For a wrong flag, argparse exits with 2.
    """
    open_missing_streams()
    with silence_other_ranks():
        args = parse(sys.argv[1:] if argv is None else list(argv))
    return exit_code(lambda: args.run(args), vars(args))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line. Exit with 0 after help, and with 2 for a wrong argument."""
    parser, commands = make_parser()
    if not argv:
        parser.print_help()
        sys.exit(0)
    if argv[0] in ("-h", "--help", "--version"):
        parser.parse_args(argv)  # exits
    if (command := commands.choices.get(argv[0])) is None:
        parser.exit(2, f"{parser.prog}: {_explain_command(argv[0], commands.choices)}\n")
    flags = {name.removeprefix("--"): action for name, action in command._option_string_actions.items()}
    with_value = [name for name, action in flags.items() if action.nargs != 0]
    try:
        return parser.parse_args([argv[0], *normalize_flags(argv[1:], flags, with_value)])
    except InputError as e:
        return command.exit(2, f"{command.prog}: {e}\n")


def _explain_command(name: str, commands: Collection[str]) -> str:
    """Return the error for a first argument that is not a command."""
    listed = ", ".join(commands)
    if name.startswith("-"):
        return f"the command must come first, before {name}: one of {listed}"
    close = difflib.get_close_matches(name, commands, n=1)
    return f"{name!r} is not a command; " + (f"did you mean {close[0]}?" if close else f"the commands are {listed}")


def run() -> None:
    """Run the command line as a program, and exit with its exit code."""
    # The handler makes SIGTERM run `finally` blocks. With several ranks, no handler is set here, because a handler in Python
    # would wait for the end of a collective.
    if world_size() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
