"""Measure what shared beginnings of prompts save: tokens computed and seconds, with and without the prefix cache.

    python benchmarks/prefixes.py [--shape 1.1B] [--rows 8] [--scale 1.0] [--work FOLDER] [--json FILE]

dialogs    64 prompts that begin with the same 400 tokens, a system text, followed by 20 to 60 of their own; 8 new tokens each
choices    `score` of 200 questions with 4 choices each, behind the same 800 tokens, as in a 5-shot evaluation

The weights are random and the tokens are, too; only their numbers matter. The script also compares all log probabilities.
--scale: multiplies the numbers of dialogs and questions.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from common import make_checkpoint, make_tokenizer

from llama import Llama, tuning
from llama.engine import scoring
from llama.engine.forward import EngineForward

SYSTEM, HEAD = 400, 800  # tokens that all dialogs, and all questions, share


def random_tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 32000) for _ in range(n)]


def without_prefix_cache() -> Any:
    """Return a context in which no two prompts share their computation."""
    limit = 10**9
    return mock.patch.multiple(tuning, MIN_SHARED_PREFIX=limit, MIN_AWAITED_PREFIX=limit)


def measure(llama: Llama, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of `work` from an empty prefix cache, with its seconds and the tokens of all forward passes."""
    llama.clear_prefix_cache()
    n_tokens, hidden_states = 0, EngineForward.hidden_states

    def counting(self: EngineForward, tokens: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_tokens
        n_tokens += len(tokens)
        return hidden_states(self, tokens, *args, **options)

    start = time.perf_counter()
    with mock.patch.object(EngineForward, "hidden_states", counting):
        result = work()
    return result, {"tokens": n_tokens, "seconds": time.perf_counter() - start}


def dialogs(llama: Llama, n: int) -> Callable[[], Any]:
    rng = random.Random(0)
    system = [1, *random_tokens(rng, SYSTEM)]
    prompts = [system + random_tokens(rng, rng.randrange(20, 60)) for _ in range(n)]
    return lambda: llama.generate(prompts, 8, temperature=0, logprobs=True)


def choices(llama: Llama, n: int) -> Callable[[], Any]:
    rng = random.Random(1)
    head = [1, *random_tokens(rng, HEAD)]
    questions = [head + random_tokens(rng, rng.randrange(30, 80)) for _ in range(n)]
    answers = [[random_tokens(rng, rng.randrange(2, 12)) for _ in range(4)] for _ in questions]
    return lambda: llama.score(questions, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--rows", type=int, default=8, help="max_batch_size; default: 8")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of prompts; default: 1")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    results: dict[str, Any] = {"shape": a.shape, "rows": a.rows, "scale": a.scale}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        llama = Llama.build(make_checkpoint(work, a.shape), make_tokenizer(work), 1024, a.rows)
        llama.tokenizer.eos_id = -2  # no token counts as EOS, so that no answer ends early
        for name, n, make in (("dialogs", 64, dialogs), ("choices", 200, choices)):
            run = make(llama, max(1, round(n * a.scale)))
            shared, with_cache = measure(llama, run)
            with without_prefix_cache(), mock.patch.object(scoring, "shares_long_prefixes", lambda *_: False):
                whole, without = measure(llama, run)
            results[name] = {"with": with_cache, "without": without, "equal": shared == whole}
            for label, figures in (("with", with_cache), ("without", without)):
                print(f"{name:<10}{label:<9}{figures['tokens']:>9} tokens {figures['seconds']:9.1f} s", flush=True)
            ratio = without["seconds"] / with_cache["seconds"]
            equal = "equal" if shared == whole else "NOT equal"
            print(f"{name:<10}{ratio:.1f} times as fast; results bitwise {equal}", flush=True)
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
