"""Generate one answer, then inject faults on one rank. test_faults.py runs this script with torchrun.

fault_worker.py RANK CKPT TOKENIZER DOOMED FAULT [FAULT ...]: DOOMED is a checkpoint that may be destroyed; a FAULT names an
action and a place, as in kill@decode. A rank that catches an error prints it on stderr and continues with the next fault.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama import Llama
from llama.engine.decode_state import DecodeState
from llama.engine.forward import EngineLayer
from llama.kernels import packed_weight

MAX_NEW_TOKENS = 40
# For each place: the class or module and the name of a function, and the number of the call that triggers the fault.
# Methods of EngineLayer are called twice per forward pass: the model has two layers.
PLACES: dict[str, tuple[Any, str, int]] = {
    "load": (packed_weight, "make_parameters", 2),
    "prefill": (EngineLayer, "swiglu", 2),
    "decode": (EngineLayer, "swiglu", 12),
    "score": (EngineLayer, "swiglu", 2),
    "start": (DecodeState, "__init__", 1),
    "call": (EngineLayer, "swiglu", 0),
}


def kill(result: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def memory(result: Any) -> None:
    raise torch.OutOfMemoryError("planted: no memory is left")


def interrupt(result: Any) -> None:
    raise KeyboardInterrupt("planted")


def nan(result: Any) -> Any:
    return torch.full_like(result, float("nan"))


def pause(result: Any) -> Any:
    time.sleep(3)
    return result


def unlink(result: Any) -> Any:
    (Path(doomed) / "consolidated.00.pth").unlink()
    return result


def inject(action: str, place: str) -> Callable[[], None]:
    """Patch the function that PLACES names, so that one call of it runs the action; return a function that undoes the patch."""
    owner, name, count = PLACES[place]
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args)
        if calls != count:
            return result
        log(f"now: {action}@{place}")
        return globals()[action](result)

    setattr(owner, name, wrapped)
    return lambda: setattr(owner, name, original)


def log(text: str) -> None:
    """Print the text on stderr with this rank's number, in one write, so that lines of different ranks do not mix."""
    sys.stderr.write(f"rank {os.environ['RANK']}: {text}\n")


if __name__ == "__main__":
    rank, folder, tokenizer_path, doomed, *faults = sys.argv[1:]
    is_faulty_rank = os.environ["RANK"] == rank
    llama = Llama.build(folder, tokenizer_path, 64, 2, device="cpu")
    print(llama.generate([[1, 5, 9]], MAX_NEW_TOKENS, temperature=0)[0], flush=True)
    for fault in faults:
        action, _, place = fault.partition("@")
        undo = inject(action, place) if is_faulty_rank and place != "call" else lambda: None
        try:
            if place == "load":
                Llama.build(doomed, tokenizer_path, 64, 2, device="cpu")
            elif place == "score":
                llama.score(["The fox"], [" jumps"])
            else:
                if is_faulty_rank and place == "call":
                    log(f"now: {fault}")
                llama.generate([[1, 5, -7 if is_faulty_rank and action == "input" else 9]], MAX_NEW_TOKENS, temperature=0)
            log(f"{fault}: nothing was noticed")
        except (Exception, KeyboardInterrupt) as e:
            log(f"{fault}: {type(e).__name__}: {e}")
        undo()
    if is_faulty_rank:
        time.sleep(600)  # simulates a program that catches the error and continues with other work
    sys.exit(3)
