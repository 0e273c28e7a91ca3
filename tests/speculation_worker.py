"""Answer prompts with guesses, on all ranks together and led by rank 0. test_speculation.py runs this script on 2 ranks.

speculation_worker.py OUT CKPT TOKENIZER: rank 0 writes the answers, and the numbers of accepted tokens, to OUT.
"""

import json
import sys
from pathlib import Path
from typing import Any

from llama import Llama
from llama.distributed.groups import global_rank
from llama.engine.draft import DraftGuesser
from llama.engine.step_costs import StepCosts

PROMPTS = [[1, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7], [1, 40, 41, 40, 41, 40, 41], [1, 7], [1, 9, 8, 7, 6]]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.0, "repetition_penalty": 0.2},
]


def answers(llama: Llama, **options: Any) -> list[Any]:
    """Return the tokens of answers in several ways, and the number of accepted tokens."""
    found: list[Any] = [0]
    for way in WAYS:
        for result in llama.text_completion(PROMPTS, max_gen_len=24, logprobs=True, details=True, **way, **options):
            found[0] += result.get("accepted_tokens", 0)
            found.append((result["tokens"], result["finish_reason"]))
    return found


def main() -> None:
    out, ckpt_dir, tokenizer_path = map(Path, sys.argv[1:])
    draft = Llama.build(ckpt_dir, tokenizer_path, 64, 4, device="cpu", quantize="int8")
    llama = Llama.build(ckpt_dir, tokenizer_path, 64, 4, device="cpu", draft=draft)
    # By the times of rank 0 any guess pays, by those of the other ranks none. Rank 0 decides.
    StepCosts.known = lambda self, n: True  # type: ignore[method-assign]
    StepCosts.seconds = lambda self, n: float(n) if global_rank() else 1.0  # type: ignore[method-assign]
    DraftGuesser.seconds = lambda self, n: 0.0  # type: ignore[method-assign]
    together = {kind: answers(llama, speculate=kind) for kind in ("prompt", "draft")}
    led = llama.lead(lambda: {kind: answers(llama, speculate=kind) for kind in ("prompt", "draft")})
    if global_rank() == 0:
        out.write_text(json.dumps({"together": together, "led": led}))


if __name__ == "__main__":
    main()
