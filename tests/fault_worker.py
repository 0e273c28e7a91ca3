"""Run under torchrun: answer once, then let something go wrong on one rank.

fault_worker.py RANK CKPT TOKENIZER DOOMED FAULT [FAULT ...], where DOOMED is a checkpoint that may be destroyed, and a FAULT
is what happens and where, as in kill@decode. A rank that gets an error says so on stderr, and goes on as if it could.
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

MOST = 40  # ids of an answer
# Where: the function, and how often it has been called by then. The model has two layers.
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


def plant(what: str, where: str) -> Callable[[], None]:
    """Let it happen on this rank, once; the call returned takes it away."""
    owner, name, count = PLACES[where]
    plain, calls = getattr(owner, name), 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = plain(*args)
        if calls != count:
            return result
        tell(f"now: {what}@{where}")
        return globals()[what](result)

    setattr(owner, name, wrapped)
    return lambda: setattr(owner, name, plain)


def tell(text: str) -> None:
    sys.stderr.write(f"rank {os.environ['RANK']}: {text}\n")  # at once, so that ranks do not write into each other's lines


if __name__ == "__main__":
    rank, folder, tokenizer_path, doomed, *faults = sys.argv[1:]
    here = os.environ["RANK"] == rank
    llama = Llama.build(folder, tokenizer_path, 64, 2, device="cpu")
    print(llama.generate([[1, 5, 9]], MOST, temperature=0)[0], flush=True)
    for fault in faults:
        what, _, where = fault.partition("@")
        undo = plant(what, where) if here and where != "call" else lambda: None
        try:
            if where == "load":
                Llama.build(doomed, tokenizer_path, 64, 2, device="cpu")
            elif where == "score":
                llama.score(["The fox"], [" jumps"])
            else:
                if here and where == "call":
                    tell(f"now: {fault}")
                llama.generate([[1, 5, -7 if here and what == "input" else 9]], MOST, temperature=0)
            tell(f"{fault}: nothing was noticed")
        except (Exception, KeyboardInterrupt) as e:
            tell(f"{fault}: {type(e).__name__}: {e}")
        undo()
    if here:
        time.sleep(600)  # a program that caught its error, and does something else
    sys.exit(3)
