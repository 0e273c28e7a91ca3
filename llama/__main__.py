"""The command line.

python -m llama chat --ckpt_dir llama-2-7b-chat --tokenizer_path tokenizer.model
python -m llama complete --ckpt_dir llama-2-7b --tokenizer_path tokenizer.model "Once upon a time"
torchrun --nproc_per_node 2 -m llama chat --ckpt_dir llama-2-13b-chat --tokenizer_path tokenizer.model
python -m llama quantize --ckpt_dir llama-2-7b int8
python -m llama plan --model 70B --max_seq_len 4096
python -m llama info
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from . import calls, checkpoint, plan, ranks, runtime, saved
from .conversation import Conversation, checked
from .demo import given_or_demo
from .errors import InputError, LlamaError, kind
from .generation import Llama
from .info import info
from .memory import gb
from .model import ModelArgs
from .quantize import KINDS
from .sampling import Sampling
from .terminal import Terminal, reconfigure
from .text import check_stops
from .tokenizer import check_text

WRITTEN_AFTER = 16  # texts for each one at a time


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model = common.add_argument_group("the model")
    model.add_argument("--ckpt_dir", metavar="DIR", help="consolidated.NN.pth and params.json; default the demo model")
    model.add_argument("--tokenizer_path", metavar="FILE", help="Meta's tokenizer.model; default that in DIR or beside it")
    model.add_argument("--max_seq_len", type=int, default=512, metavar="N", help="ids in all; default 512, for chat 4096")
    model.add_argument("--device", help="cpu, cuda or mps; default the best there is")
    model.add_argument("--dtype", help="bfloat16, float16 or float32; default the stored one")
    model.add_argument("--quantize", choices=KINDS, help="hold the matrices in 8 or 4 bit")
    model.add_argument("--compile", action="store_true", help="on CUDA, faster steps after a slower start")
    model.add_argument("--model_parallel_size", type=int, metavar="N", help="ranks that share a model; default all of them")
    model.add_argument("--seed", type=int, default=1, metavar="N", help="of all draws; default 1")
    draw = common.add_argument_group("the choice of ids")
    draw.add_argument("--temperature", type=float, default=0.6, metavar="X", help="0: the likeliest id; default 0.6")
    draw.add_argument("--top_p", type=float, default=0.9, metavar="X", help="default 0.9")
    draw.add_argument("--top_k", type=int, default=0, metavar="N", help="0: any number; default 0")
    draw.add_argument("--min_p", type=float, default=0.0, metavar="X", help="default 0")
    draw.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="1: none; default 1")
    draw.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")

    main = argparse.ArgumentParser("python -m llama", description="Llama 2 in the terminal.", allow_abbrev=False)
    commands = main.add_subparsers(dest="command", required=True, metavar="chat | complete | quantize | plan | info")
    chat = commands.add_parser(
        "chat", parents=[common], allow_abbrev=False, help="talk with a chat model", description="Talk with a chat model."
    )
    chat.add_argument("--max_gen_len", type=int, metavar="N", help="most ids of an answer; default what the window holds")
    chat.add_argument("--system", metavar="TEXT", help="how to answer, said before the first question")
    chat.set_defaults(run=run_chat, max_seq_len=None)
    complete = commands.add_parser(
        "complete",
        parents=[common],
        allow_abbrev=False,
        help="continue texts",
        description="Continue texts. Each is printed, and after '> ' what follows; a single one as it comes.",
    )
    complete.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text; without any, standard input is the text")
    complete.add_argument("--max_gen_len", type=int, default=64, metavar="N", help="most ids of a continuation; default 64")
    complete.add_argument("--max_batch_size", type=int, default=4, metavar="N", help="texts at a time; default 4")
    complete.add_argument("--jsonl", action="store_true", help='one JSON object a line: {"prompt": TEXT} in, results out')
    complete.set_defaults(run=run_complete)
    quantize = commands.add_parser(
        "quantize",
        allow_abbrev=False,
        help="save a model's weights in 8 or 4 bit, or as they are for faster loading, beside it",
        description="Write a model's weights once as the CPU reads them, into a file beside them that is loaded from then on.",
    )
    quantize.add_argument("--ckpt_dir", metavar="DIR", required=True, help="consolidated.NN.pth and params.json")
    quantize.add_argument("kind", choices=saved.SAVED, metavar="KIND", help="int8, int4, or bfloat16: as they are")
    quantize.set_defaults(run=run_quantize)
    planned = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="tell which machines hold a model, and how fast it can be there",
        description="Compute a model's memory on each rank and the most ids per second that reading it allows.",
    )
    which = planned.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=short_name, choices=plan.MODELS, help="Meta's, 7B, 13B or 70B; -chat is the same")
    which.add_argument("--ckpt_dir", metavar="DIR", help="params.json, and consolidated.NN.pth if they are there")
    planned.add_argument("--ranks", type=int, nargs="+", default=[], metavar="N", help="default all that are possible, to 16")
    planned.add_argument("--max_seq_len", type=int, default=4096, metavar="N", help="ids of prompt and answer; default 4096")
    planned.add_argument("--max_batch_size", type=int, default=1, metavar="N", help="rows at a time; default 1")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in checkpoint.DTYPES]
    planned.add_argument("--dtype", choices=dtypes, help="default the stored one; of Meta's models bfloat16")
    planned.add_argument("--quantize", choices=KINDS, help="hold the matrices in 8 or 4 bit")
    planned.add_argument("--gpu", type=str.upper, choices=plan.GPUS, metavar="KIND", help=f"one of {', '.join(plan.GPUS)}")
    planned.add_argument("--memory", type=float, metavar="GB", help="of any other machine, with its")
    planned.add_argument("--bandwidth", type=float, metavar="GB/s", help="of that memory")
    planned.set_defaults(run=run_plan)
    told = commands.add_parser(
        "info",
        allow_abbrev=False,
        help="tell how this machine runs a model, and why not faster",
        description="Print versions, device, compiled code and backends, each with the reason why it cannot be used.",
    )
    told.add_argument("--ckpt_dir", metavar="DIR", help="a checkpoint, of which it tells how decode steps go")
    told.add_argument("--device", help="cpu, cuda or mps; default the fastest there is")
    told.set_defaults(run=lambda args: Terminal().write(f"{info(args.ckpt_dir, args.device)}\n"))
    return main


def build(args: argparse.Namespace, rows: int) -> Llama:
    ckpt_dir, tokenizer_path = given_or_demo(args.ckpt_dir, args.tokenizer_path)
    if args.max_seq_len is None:
        args.max_seq_len = 4096 if args.ckpt_dir else 512  # Llama 2's own window, and the demo model's
    return Llama.build(
        ckpt_dir, tokenizer_path, args.max_seq_len, rows,
        seed=args.seed, device=args.device, dtype=args.dtype, compile=args.compile,
        quantize=args.quantize, model_parallel_size=args.model_parallel_size,
    )  # fmt: skip


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Of each call; checked now, since a model may take minutes to load."""
    drawing = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    Sampling(**drawing)
    if args.max_gen_len is not None:
        calls.check_gen_len(args.max_gen_len)
    return drawing | {"max_gen_len": args.max_gen_len, "stop": check_stops(args.stop)}


def run_chat(args: argparse.Namespace) -> None:
    if args.system is not None:
        checked("system", args.system)
    of_each_call = options(args)
    llama = build(args, rows=1)
    with Terminal() as terminal:
        talk = Conversation(llama, terminal.note, args.system, **of_each_call)
        if terminal.prompt:
            terminal.note("Ctrl-C ends an answer, Ctrl-D leaves, /help lists all commands.")
        while not talk.over and (line := ranks.on_rank0(terminal.read)) is not None:
            try:
                answer = talk.respond(line)
            except InputError as e:
                terminal.note(str(e))
                continue
            if answer is None:
                continue
            with contextlib.closing(answer):
                for piece in answer:
                    terminal.write(piece)
                    if ranks.on_rank0(terminal.interrupted):
                        break
            terminal.write("\n")
            if talk.cut_off:
                terminal.note(f"the answer is cut off: {talk.cut_off}")


def run_complete(args: argparse.Namespace) -> None:
    of_each_call = options(args)
    runtime.start(args.device, args.model_parallel_size)
    terminal = Terminal()
    reconfigure(sys.stdout, errors="replace")
    prompts, names = ranks.on_rank0(
        lambda: calls.check_texts(args.prompts, "prompts") if args.prompts else read_prompts(args.jsonl)
    )
    llama = build(args, min(max(len(prompts), 1), args.max_batch_size))
    if len(prompts) == 1 and not args.jsonl:
        with llama.text_completion_stream(prompts[0], **of_each_call) as stream:
            terminal.write(f"{prompts[0]}\n> ")
            for piece in stream:
                terminal.write(piece)
                if ranks.on_rank0(terminal.interrupted):
                    break
        terminal.write("\n")
        return
    encoded = [llama.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
    calls.check_prompts(encoded, names, llama.tokenizer, args.max_seq_len)
    # What is written is not lost when the program is stopped. On a terminal, and from replicas, it comes in parts.
    parts = sys.stdout.isatty() or ranks.replica()[1] > 1
    some = WRITTEN_AFTER * args.max_batch_size * ranks.replica()[1] if parts else len(prompts)
    stop, most = of_each_call.pop("stop"), of_each_call.pop("max_gen_len")
    sampling = Sampling(**of_each_call)
    for i in range(0, len(prompts), max(some, 1)):
        part = prompts[i : i + some]
        answers = llama.finished(lambda part=part: llama.planner.texts(part, most, None, sampling, stop))  # type: ignore[misc]
        for prompt, answer in zip(part, answers, strict=True):
            if args.jsonl:
                result = {"prompt": prompt, "generation": answer.text, **answer.details()}
                terminal.write(json.dumps(result, ensure_ascii=False) + "\n")
            else:
                terminal.write(f"{prompt}\n> {answer.text}\n\n")


def run_quantize(args: argparse.Namespace) -> None:
    path = saved.save(args.ckpt_dir, args.kind)
    Terminal().write(f"{path}: {gb(path.stat().st_size)}\n")


def run_plan(args: argparse.Namespace) -> None:
    shape, stored = (plan.MODELS[args.model], torch.bfloat16) if args.model else described(args.ckpt_dir)
    shape = replace(shape, max_seq_len=args.max_seq_len, max_batch_size=args.max_batch_size)
    dtype = getattr(torch, args.dtype) if args.dtype else stored
    machines, device = plan.machines(args.gpu, args.memory, args.bandwidth)
    found = plan.report(args.model or args.ckpt_dir, shape, args.ranks, dtype, args.quantize, machines, device)
    if ranks.global_rank() == 0:
        Terminal().write(f"{found}\n")


def short_name(model: str) -> str:
    """7B, of llama-2-7b-chat."""
    return model.upper().removeprefix("LLAMA-2-").removesuffix("-CHAT")


def described(ckpt_dir: str) -> tuple[ModelArgs, torch.dtype]:
    """A checkpoint's shape and dtype; of one that has no shards yet, as far as params.json tells."""
    params = checkpoint.read_params(ckpt_dir)
    if checkpoint.shard_paths(Path(ckpt_dir).expanduser()):
        embedding = checkpoint.open_shards(ckpt_dir).first.get("tok_embeddings.weight")
        if embedding is not None and embedding.ndim == 2:
            return ModelArgs(**{**params, "vocab_size": len(embedding)}), embedding.dtype
    declared = params.get("vocab_size", -1)
    return ModelArgs(**{**params, "vocab_size": plan.PIECES if declared == -1 else declared}), torch.bfloat16


def read_prompts(jsonl: bool) -> tuple[list[str], list[str]]:
    """The prompts on standard input, all of it or one in each line of JSON, and what errors call them."""
    if sys.stdin.isatty():
        print("reading the text from the keyboard; Ctrl-D ends it", file=sys.stderr)
    reconfigure(sys.stdin, encoding="utf-8-sig", errors="surrogateescape")
    if not jsonl:
        text = sys.stdin.read().removesuffix("\n")
        if not text:
            raise InputError("standard input holds no text to continue; give one there, or as an argument")
        return calls.check_texts([text], "prompts", "standard input")
    prompts, names = [], []
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"line {number} is {kind(line.strip())}: not JSON ({e})") from e
        if not isinstance(record, dict) or list(record) != ["prompt"]:
            raise InputError(f'line {number} is {kind(record)}; it must be {{"prompt": TEXT}}, and nothing else')
        names.append(f"line {number}: its prompt")
        check_text(record["prompt"], names[-1])
        prompts.append(record["prompt"])
    return prompts, names


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 130 after Ctrl-C. Usage errors exit with 2."""
    rank = ranks.global_rank()
    for name in ("stdin", "stdout", "stderr"):  # Python has none where they are closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    quiet = contextlib.ExitStack()
    with quiet:
        if rank:  # one rank tells what is wrong, or how to use it
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        args = parser().parse_args(argv)
    try:
        args.run(args)
    except (LlamaError, OSError) as e:
        if rank:
            time.sleep(2)  # if rank 0 has told, torchrun ends this one before it tells it again
        print(f"llama: {f'rank {rank}: ' if rank else ''}{e}", file=sys.stderr)
        if isinstance(e, OSError):  # the output cannot be written, say
            sys.stdout = open(os.devnull, "w")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if ranks.world_size() == 1:  # by way of each `finally`; a rank that waits for others would not hear it, and dies of it
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
