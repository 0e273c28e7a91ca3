"""`python -m llama chat`: a conversation in the terminal."""

import argparse
import contextlib

from ..distributed.agreement import run_on_rank0
from ..errors import InputError
from .conversation import Conversation, check_message
from .model_options import build_model, call_options
from .terminal import Terminal


def run_chat(args: argparse.Namespace) -> None:
    """Read the user's lines and answer them, until /exit or the end of the input."""
    if args.system is not None:
        check_message("system", args.system)
    options = call_options(args)
    llama = build_model(args, max_batch_size=1)
    with Terminal() as terminal:
        conversation = Conversation(llama, terminal.print_status, args.system, **options)
        if terminal.prompt:
            terminal.print_status("Ctrl-C ends an answer, Ctrl-D leaves, /help lists all commands.")
        while not conversation.done and (line := run_on_rank0(terminal.read)) is not None:
            try:
                answer = conversation.respond(line)
            except InputError as e:
                terminal.print_status(str(e))
                continue
            if answer is None:
                continue
            with contextlib.closing(answer):
                for chunk in answer:
                    terminal.write(chunk)
                    if run_on_rank0(terminal.interrupted):
                        break
            terminal.write("\n")
            if conversation.cut_off:
                terminal.print_status(f"the answer is cut off: {conversation.cut_off}")
