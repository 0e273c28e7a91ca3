"""Run the same calls on every rank. test_agreement.py runs this script on 1 rank, on 2 (one model) and on 4 (two replicas).

agreement_worker.py OUT CKPT TOKENIZER: each rank writes its answers and its error messages to OUT.RANK.json.
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
PROMPTS = [[1, 5], [1, *range(20, 40)], [1, 9, 30], [1, *range(40, 60)], [1, 7]]
TEXTS = ["The fox", "a", "sea shells", "He said", "no"]


def even_only(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Ban odd tokens. On several ranks that share a model, only the first one may call this."""
    assert RANK % 2 == 0
    logits[1::2] = -torch.inf
    return logits


def broken(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise OSError("broken")


def ban_all(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.fill_(-torch.inf)


def error_of(call: Callable[[], Any]) -> str:
    """Return the name and text of the LlamaError that the call raises."""
    try:
        return f"no error: {call()}"
    except LlamaError as e:
        return f"{type(e).__name__}: {e}"


def answers(llama: Llama) -> dict[str, Any]:
    """Return the answers that must be the same on every rank and in a single process."""
    results: dict[str, Any] = {}
    results["greedy"] = llama.generate(PROMPTS, 6, temperature=0)[0]
    results["scored"] = [[round(x, 3) for x in row] for row in llama.generate(PROMPTS, 4, 0, logprobs=True, echo=True)[1] or []]
    results["seeded"] = llama.text_completion(TEXTS, 1.0, max_gen_len=6, seed=range(5), stop=["e"], details=True)
    top = llama.text_completion(TEXTS, 0, max_gen_len=3, logprobs=True, echo=True, top_logprobs=2, logit_bias={300: 100, 9: -1})
    results["top"] = [[[(text, round(x, 3)) for text, x in each] for each in result["top_logprobs"]] for result in top]
    results["biased"] = [result["generation"] for result in top]
    several: dict[str, Any] = dict(n=2, temperature=[0, 1, 1.0, 0.5, 2], max_gen_len=[3, 4, 5, 6, 7], seed=range(5))
    ends: dict[str, Any] = dict(stop_token_ids=[*range(30, 90)], min_new_tokens=2, ignore_eos=True)
    penalties: dict[str, Any] = dict(frequency_penalty=1.0, presence_penalty=[-1, 0, 1, 2, 0], typical_p=0.8)
    results["several"] = llama.text_completion(TEXTS, stop=[["e"], ["o"], [], [], []], **several, **ends, **penalties)
    results["processed"] = llama.generate(PROMPTS, 6, 1.0, seed=3, logits_processor=[even_only, None, even_only, None, None])[0]
    results["unseeded"] = [x % 2 for row in llama.generate(PROMPTS, 6, 1.0, logits_processor=even_only)[0] for x in row]
    with llama.text_completion_stream("The", 1.0, max_gen_len=6, seed=4, logits_processor=even_only) as stream:
        results["processed stream"] = "".join(stream)
    tags = [[{"role": "user", "content": text}] for text in ("hi", "[INST]", "sea")]
    results["dialogs"] = llama.chat_completion(tags, 0, max_gen_len=4, details=True)
    results["score"] = [round(score.total, 2) for score in llama.score(TEXTS, [" jumps"] * 5)]
    results["none"] = [llama.generate([], 4), llama.score([], [])]
    with llama.text_completion_stream("The", 1.0, max_gen_len=6, seed=4) as stream:
        results["stream"] = "".join(stream)
    results["tokens"] = [token.token for token in llama.generate_stream(PROMPTS[:2], 4, temperature=0)]
    return results


def results_on_several_ranks(llama: Llama, build: Callable[..., Llama], folder: str) -> dict[str, Any]:
    """Return tokens sampled without a seed, and the errors of calls in which the last rank's arguments differ."""
    number = 5 if RANK == LAST else 6
    torch.manual_seed(RANK)  # seeds each rank differently: all ranks must return the tokens that rank 0 samples
    results: dict[str, Any] = {"sampled": llama.generate([[1, 5]] * 6, 8, temperature=1.0)[0]}
    results["sampled in a stream"] = [token.token for token in llama.generate_stream([[1, 5]], 8, temperature=1.0)]
    failing = [
        error_of(lambda: llama.generate(PROMPTS, 4, logits_processor=[None, broken, None, None, None])),
        error_of(lambda: llama.generate(PROMPTS, 4, logits_processor=[None, ban_all, None, None, None])),
    ]
    results["failing"] = ["InputError: prompt 1: its logits processor has" in each for each in failing]
    with llama.text_completion_stream("The", logits_processor=broken) as stream:
        results["failing"].append("the prompt: its logits processor has failed" in error_of(lambda: next(stream)))
    results["errors"] = [
        error_of(lambda: llama.generate([[1, number]], 4)),
        error_of(lambda: llama.generate([[1, 5]], number)),
        error_of(lambda: llama.text_completion(["a"], temperature=number / 10)),
        error_of(lambda: llama.text_completion(["a"], stop="x" * number)),
        error_of(lambda: llama.text_completion(["a"], logit_bias={number: 1})),
        error_of(lambda: llama.text_completion(["a"], logprobs=True, top_logprobs=number)),
        error_of(lambda: llama.text_completion(["a"], n=number - 4)),
        error_of(lambda: llama.text_completion(["a"], stop_token_ids=[number])),
        error_of(lambda: llama.text_completion(["a"], logits_processor=even_only if number == 5 else None)),
        error_of(lambda: llama.score(["a"], ["b" * number])),
        error_of(lambda: llama.text_completion_stream("a", seed=number)),
        error_of(lambda: llama.generate([[1, 5]], 4) if RANK == LAST else llama.text_completion(["a"])),
        error_of(lambda: llama.text_completion([number if RANK == LAST else "a"])),  # type: ignore[list-item]
        error_of(lambda: build(folder, max_seq_len=30 + number)),
        error_of(lambda: build(folder if RANK < LAST else "/no/such/folder")),
        error_of(lambda: llama.generate([[1, 5000]], 4)),  # token 5000 is outside the vocabulary: all ranks raise
    ]
    return results


def main(out: str, folder: str, tokenizer_path: str) -> None:
    def build(folder: str, max_seq_len: int = 48) -> Llama:
        return Llama.build(folder, tokenizer_path, max_seq_len, 4, model_parallel_size=min(2, LAST + 1), device="cpu")

    if LAST:  # these builds must fail before the first successful build creates the process groups
        sizes = error_of(
            lambda: Llama.build(folder, tokenizer_path, model_parallel_size=1 if RANK == LAST else 2, device="cpu")
        )
        sizes_wrong = error_of(lambda: Llama.build(folder, tokenizer_path, model_parallel_size=3 if RANK == LAST else 1))
    llama = build(folder)
    results = answers(llama)
    if LAST:
        results["sizes"], results["wrong sizes"] = [sizes], sizes_wrong
        results |= results_on_several_ranks(llama, build, folder)
        results["afterwards"] = llama.generate(PROMPTS, 6, temperature=0)[0]
    with open(f"{out}.{RANK}.json", "w") as f:
        json.dump(results, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
