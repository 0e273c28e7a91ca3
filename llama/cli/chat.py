"""`python -m llama chat`: a conversation in the terminal, or the answer to one question."""

import argparse
import contextlib
import re
import sys
from collections.abc import Generator
from pathlib import Path

from ..chat import ChatFormat
from ..distributed.agreement import run_on_rank0
from ..distributed.setup import initialize
from ..errors import InputError
from ..hugging_face.load import find_chat_format
from .commands import complete, respond
from .conversation import Conversation, check_message
from .model_options import build_model, call_options
from .terminal import Terminal, configure_stream

BASE_MODEL = re.compile(r"llama-2-\d+b|code-?llama-\d+b(-python)?", re.IGNORECASE)  # Meta's names of models without chat


def run_chat(args: argparse.Namespace) -> None:
    """Answer one question that is given, or talk: read messages and answer them, until /exit or the end of the input."""
    chat_format = find_chat_format(args.ckpt_dir, args.tokenizer_path)
    if args.system is not None:
        check_message("system", args.system, chat_format)
    options = call_options(args)
    initialize(args.device, args.model_parallel_size)
    question = run_on_rank0(lambda: given_question(args, chat_format))
    llama = build_model(args, max_batch_size=1)
    terminal = Terminal(question is None, complete, args.history)
    conversation = Conversation(llama, terminal.print_status, args.system, verbose=args.verbose, **options)
    if args.ckpt_dir and BASE_MODEL.fullmatch(name := Path(args.ckpt_dir).resolve().name):
        terminal.print_status(f"{name} is a base model by its name, and not trained to answer; `complete` is for base models")
    with terminal:
        if question is not None:
            print_answer(terminal, conversation, conversation.ask(question))
            return
        if terminal.has_prompt:
            terminal.print_status("Ctrl-C ends an answer, Ctrl-D leaves, /help lists all commands.")
        n_refused = 0
        while not conversation.done and (entry := run_on_rank0(terminal.read)) is not None:
            try:
                answer = respond(conversation, entry)
            except InputError as e:
                terminal.print_status(str(e))
                n_refused += 1
                continue
            if answer is not None:
                print_answer(terminal, conversation, answer)
        if args.lines and n_refused:  # exit with an error, since there are fewer answers than lines
            raise InputError(f"{n_refused} line(s) were refused, for the reasons above; correct these lines")


def given_question(args: argparse.Namespace, chat_format: ChatFormat) -> str | None:
    """Return the one question to answer: standard input, then the arguments; None if messages are typed or given as lines."""
    piped = ""
    if not sys.stdin.isatty():
        configure_stream(sys.stdin, encoding="utf-8-sig", errors="surrogateescape")
        piped = "" if args.lines else sys.stdin.read().strip("\n")
    given = " ".join(args.question)
    if args.lines and args.question:
        raise InputError(f"--lines reads the questions from standard input; leave out --lines, or {given!r:.60}")
    if args.lines or (sys.stdin.isatty() and not args.question):
        return None
    question = check_message("user", "\n\n".join(text for text in (piped, given) if text), chat_format)
    if not question.strip():
        raise InputError("the question is empty; give it as an argument or on standard input, or start chat in a terminal")
    return question


def print_answer(terminal: Terminal, conversation: Conversation, answer: Generator[str, None, None]) -> None:
    """Print an answer chunk by chunk, until it ends or the user ends it; then what is to be said about it."""
    with contextlib.closing(answer):
        try:
            for chunk in answer:
                terminal.write(chunk)
                if run_on_rank0(terminal.interrupted):
                    break
        finally:
            terminal.write("\n")
    if conversation.cut_off:
        terminal.print_status(f"the answer is cut off: {conversation.cut_off}")
    if conversation.verbose and conversation.speed:
        terminal.print_status(conversation.speed)
