"""Run under torchrun with 4 ranks: two replicas of two ranks each, or with 2: one model.

agreement_worker.py OUT CKPT TOKENIZER: each rank leaves what it got and what was refused in OUT.RANK.json.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from llama import Llama, LlamaError

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1
PROMPTS = [[1, 5], [1, *range(20, 40)], [1, 9, 30], [1, *range(40, 60)], [1, 7]]  # a long one after each short one
TEXTS = ["The fox", "a", "sea shells", "He said", "no"]


def refused(call: Callable[[], Any]) -> str:
    try:
        return f"not refused: {call()}"
    except LlamaError as e:
        return f"{type(e).__name__}: {e}"


def answers(llama: Llama) -> dict[str, Any]:
    """What must be the same on every rank, and on one."""
    found: dict[str, Any] = {}
    found["greedy"] = llama.generate(PROMPTS, 6, temperature=0)[0]
    found["scored"] = [[round(x, 3) for x in row] for row in llama.generate(PROMPTS, 4, 0, logprobs=True, echo=True)[1] or []]
    found["seeded"] = llama.text_completion(TEXTS, 1.0, max_gen_len=6, seed=range(5), stop=["e"], details=True)
    tags = [[{"role": "user", "content": text}] for text in ("hi", "[INST]", "sea")]
    found["dialogs"] = llama.chat_completion(tags, 0, max_gen_len=4, details=True)
    found["score"] = [round(score.total, 2) for score in llama.score(TEXTS, [" jumps"] * 5)]
    found["none"] = [llama.generate([], 4), llama.score([], [])]
    with llama.text_completion_stream("The", 1.0, max_gen_len=6, seed=4) as stream:
        found["stream"] = "".join(stream)
    found["tokens"] = [token.token for token in llama.generate_stream(PROMPTS[:2], 4, temperature=0)]
    return found


def of_several(llama: Llama, build: Callable[..., Llama], folder: str) -> dict[str, Any]:
    mine = 5 if RANK == LAST else 6
    torch.manual_seed(RANK)  # rank 0's draws are everyone's
    found: dict[str, Any] = {"drawn": llama.generate([[1, 5]] * 6, 8, temperature=1.0)[0]}
    found["drawn in a stream"] = [token.token for token in llama.generate_stream([[1, 5]], 8, temperature=1.0)]
    found["refused"] = [
        refused(lambda: llama.generate([[1, mine]], 4)),
        refused(lambda: llama.generate([[1, 5]], mine)),
        refused(lambda: llama.text_completion(["a"], temperature=mine / 10)),
        refused(lambda: llama.text_completion(["a"], stop="x" * mine)),
        refused(lambda: llama.score(["a"], ["b" * mine])),
        refused(lambda: llama.text_completion_stream("a", seed=mine)),
        refused(lambda: llama.generate([[1, 5]], 4) if RANK == LAST else llama.text_completion(["a"])),
        refused(lambda: llama.text_completion([mine if RANK == LAST else "a"])),  # type: ignore[list-item]
        refused(lambda: build(folder, max_seq_len=30 + mine)),
        refused(lambda: build(folder if RANK < LAST else "/no/such/folder")),
        refused(lambda: llama.generate([[1, 5000]], 4)),  # on all: each has its own error
    ]
    return found


def main(out: str, folder: str, tokenizer_path: str) -> None:
    def build(folder: str, max_seq_len: int = 48) -> Llama:
        return Llama.build(folder, tokenizer_path, max_seq_len, 4, model_parallel_size=min(2, LAST + 1), device="cpu")

    if LAST:  # before there are groups of ranks that share a model
        sizes = refused(lambda: Llama.build(folder, tokenizer_path, model_parallel_size=1 if RANK == LAST else 2, device="cpu"))
        sizes_wrong = refused(lambda: Llama.build(folder, tokenizer_path, model_parallel_size=3 if RANK == LAST else 1))
    llama = build(folder)
    found = answers(llama)
    if LAST:
        found["sizes"], found["wrong sizes"] = [sizes], sizes_wrong
        found |= of_several(llama, build, folder)
        found["afterwards"] = llama.generate(PROMPTS, 6, temperature=0)[0]
    with open(f"{out}.{RANK}.json", "w") as f:
        json.dump(found, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
