"""Measure speculation: guesses that are all right or all wrong, a draft model, texts that repeat, and a real model.

    python benchmarks/speculate.py [costs] [draft] [demo] [real] [--shape 1.1B] [--quantize int8] [--runs 3] [--work FOLDER]

costs  one row of --shape with random weights: tokens/s with 1 to 7 guesses that are always right, against what the times of
       steps predict; with guesses that are always wrong; and with prompt lookup in a random text
draft  a model of 7B (--target) with a draft of 160M, whose guesses are made right with a probability of 0.6, 0.7 and 0.8
demo   the demo model on texts that repeat their prompts, beside prompt lookup of transformers and of llama.cpp, if installed
real   SmolLM2-135M-Instruct (--smollm2 DIR, which is downloaded if missing): questions about a text, a summary, an edit

All speeds are medians of --runs turns, in which the ways to decode alternate. Answers are compared with those without guesses.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from common import SHAPES, make_checkpoint, make_tokenizer

from llama import Llama
from llama.engine import speculation
from llama.engine.draft import DraftGuesser
from llama.engine.prompt_lookup import Chance
from llama.engine.requests import Request

SHAPES["160M"] = dict(dim=768, n_layers=12, n_heads=12, multiple_of=256, norm_eps=1e-5, vocab_size=-1)
NEW = 128  # tokens of an answer


class Oracle:
    """Guess `n` tokens that are known to be right, or wrong. Stands in for `LookupGuesser`."""

    answer: ClassVar[list[int]] = []
    n, is_right = 7, True

    def __init__(self) -> None:
        self.n_new = 0

    def admit(self, row: int, request: Request) -> None:
        self.n_new = 0

    def release(self, row: int) -> None: ...

    def append(self, row: int, token: int) -> None:
        self.n_new += 1

    def expected(self, row: int, limit: int) -> list[float]:
        return [1.0] * min(self.n, limit)

    def is_ready(self) -> bool:
        return True

    def seconds(self, n: int) -> float:
        return 0.0

    def first_seconds(self, row: int) -> float:
        return 0.0

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        right = self.answer[self.n_new : self.n_new + min(self.n, counts[0])]
        return {0: right if self.is_right else [token ^ 1 for token in right]}


class HalfRightDraft(DraftGuesser):
    """Guess with the draft model, and replace each guess by a token that is right with the probability `chance`."""

    answer: ClassVar[list[int]] = []
    chance, rng = 0.7, random.Random(0)

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        guesses = super().guess(counts)
        row = self.rows[0]
        n_new = len(row.tokens) - len(row.request.prompt)
        right = self.answer[n_new : n_new + len(guesses[0])]
        guesses[0] = [token if self.rng.random() < self.chance else token ^ 1 for token in right]
        row.guesses = [*guesses[0]]
        row.fed[len(row.tokens) :] = guesses[0][:-1]  # as if the draft had guessed them
        return guesses


def timed(llama: Llama, prompt: list[int], new: int, **options: Any) -> tuple[list[int], float, dict[str, int]]:
    """Return the tokens of an answer, the tokens/s after the first one, and the numbers of guesses."""
    call: Any = None
    begin = type(llama.engine).begin

    def remember(self: Any, given: Any) -> Any:
        nonlocal call
        call = given
        return begin(self, given)

    tokens, times = list[int](), list[float]()
    with mock.patch.object(type(llama.engine), "begin", remember):
        for token in llama.generate_stream([prompt], new, temperature=0, **options):
            tokens.append(token.token)
            times.append(time.perf_counter())
    (request,) = call.requests
    counts = {"guessed": request.num_guessed_tokens, "accepted": request.num_accepted_tokens}
    return tokens, (len(tokens) - 1) / (times[-1] - times[0]), counts


def medians(ways: Mapping[str, Callable[[], tuple[list[int], float, dict[str, int]]]], runs: int) -> dict[str, Any]:
    """Run each way `runs` times, in turns. Return medians of tokens/s, and whether tokens equal those of the first way."""
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            results[name].append(way())
    want = next(iter(results.values()))[0][0]
    figures = {}
    plain = statistics.median(speed for _, speed, _ in next(iter(results.values())))
    for name, each in results.items():
        speed, (tokens, _, counts) = statistics.median(speed for _, speed, _ in each), each[-1]
        readings = len(tokens) - counts.get("accepted", 0)
        figures[name] = {
            "tokens/s": round(speed, 2), "ratio": round(speed / plain, 2), "equal": all(t == want for t, _, _ in each),
            "tokens": len(tokens), **counts, "tokens per reading": round(len(tokens) / readings, 2),
        }  # fmt: skip
        print(f"  {name:<26}" + " ".join(f"{key}={value}" for key, value in figures[name].items()), flush=True)
    return figures


def oracle(llama: Llama, prompt: list[int], new: int, n: int, is_right: bool = True) -> Any:
    Oracle.n, Oracle.is_right = n, is_right
    with mock.patch.object(speculation, "LookupGuesser", Oracle):
        return timed(llama, prompt, new, speculate="prompt")


def costs(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    llama = Llama.build(make_checkpoint(work, a.shape), make_tokenizer(work), 1024, 1, quantize=a.quantize)
    llama.tokenizer.eos_id = -2  # no token counts as EOS
    rng = random.Random(0)
    prompt = [1, *(rng.randrange(3, 32000) for _ in range(100))]
    Oracle.answer = timed(llama, prompt, NEW)[0]
    for n in range(8):  # measure steps of all sizes
        oracle(llama, prompt, 40, n)
    ways: dict[str, Any] = {"plain": lambda: timed(llama, prompt, NEW)}
    # Each way makes the number of guesses that it says, whatever it costs.
    for n in range(1, 8):
        ways[f"{n} right guesses"] = lambda n=n: with_all_guesses(lambda: oracle(llama, prompt, NEW, n))
    ways["wrong guesses"] = lambda: wrong(llama, prompt)
    ways["lookup in a random text"] = lambda: timed(llama, prompt, NEW, speculate="prompt")
    figures = medians(ways, a.runs)
    seconds = llama.engine.shared.step_costs.seconds
    for n in range(1, 8):
        each = figures[f"{n} right guesses"]
        cost = seconds(1 + n) / seconds(1)
        each["cost"], each["predicted"] = round(cost, 2), round((1 + n) / cost, 2)
        print(f"  {n} guesses: a step takes {cost:.2f} times as long; predicted {each['predicted']}, measured {each['ratio']}")
    return figures


def with_all_guesses(run: Callable[[], Any]) -> Any:
    def choose_all(expected: Mapping[int, list[float]], *_: Any) -> dict[int, int]:
        return {row: len(chances) for row, chances in expected.items() if chances}

    with mock.patch.object(speculation, "choose_counts", choose_all):
        return run()


def wrong(llama: Llama, prompt: list[int]) -> Any:
    """Decode with guesses that are always wrong, and that are expected to be right as often as they have been so far."""

    chance = Chance(0.65)

    def expected(self: Oracle, row: int, limit: int) -> list[float]:
        return [chance.value**n for n in range(1, min(7, limit) + 1)]

    def append(self: Oracle, row: int, token: int) -> None:
        chance.record(False)
        self.n_new += 1

    with mock.patch.object(Oracle, "expected", expected), mock.patch.object(Oracle, "append", append):
        return oracle(llama, prompt, NEW, 7, is_right=False)


def draft(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    tokenizer = make_tokenizer(work)
    target = Llama.build(make_checkpoint(work, a.target), tokenizer, 512, 1, quantize=a.quantize)
    small = Llama.build(make_checkpoint(work, "160M"), tokenizer, 512, 1, quantize=a.quantize)
    target.draft = small
    for each in (target, small):
        each.tokenizer.eos_id = -2
    prompt = [1, *range(100, 200)]
    HalfRightDraft.answer = timed(target, prompt, NEW // 2)[0]
    results: dict[str, Any] = {}
    for chance in (0.6, 0.7, 0.8):
        HalfRightDraft.chance = chance
        with mock.patch.object(speculation, "DraftGuesser", HalfRightDraft):
            timed(target, prompt, 40, speculate="draft")  # measure steps of all sizes
            ways: dict[str, Any] = {"plain": lambda: timed(target, prompt, NEW // 2)}
            ways[f"chance {chance}"] = lambda: timed(target, prompt, NEW // 2, speculate="draft")
            figures = medians(ways, a.runs)
        steps, own = target.engine.shared.step_costs.seconds, small.engine.shared.step_costs.seconds(1)
        predicted = max((1 - chance ** (n + 1)) / (1 - chance) * steps(1) / (steps(1 + n) + n * own) for n in range(8))
        figures["predicted"] = round(predicted, 2)
        print(
            f"  chance {chance}: predicted {predicted:.2f}; a step of the draft takes {own / steps(1):.2f} of one of the model"
        )
        results[str(chance)] = figures
    return results


def lookup_beside_plain(llama: Llama, prompt: list[int], new: int, runs: int) -> dict[str, Any]:
    """Measure an answer of `new` tokens without guesses and with prompt lookup."""
    timed(llama, prompt, new, speculate="prompt", ignore_eos=True)  # measures steps of all sizes
    ways: dict[str, Any] = {"plain": lambda: timed(llama, prompt, new, ignore_eos=True)}
    ways["prompt lookup"] = lambda: timed(llama, prompt, new, speculate="prompt", ignore_eos=True)
    return medians(ways, runs)


REPEATING = [
    "Repeat this: The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. Repeat this: ",
    "One, two, three, four, five, six, seven. One, two, three, four, five, six, seven. One, two,",
    "The sky is blue. The grass is green. The sky is blue. The grass is green. The sky",
]


def demo(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = Path(__file__).parents[1] / "demo" / "model"
    llama = Llama.build(folder, max_seq_len=512, max_batch_size=1, dtype="float32")
    results: dict[str, Any] = {}
    for text in REPEATING:
        prompt = llama.tokenizer.encode(text, bos=True, eos=False)
        print(f"  {text!r}")
        results[text] = lookup_beside_plain(llama, prompt, NEW, a.runs) | {"peers": peers(folder, work, prompt)}
    return results


def peers(folder: Path, work: Path, prompt: list[int]) -> dict[str, Any]:
    """Return the speeds of prompt lookup in transformers and llama.cpp against their own plain decoding, where installed."""
    from peers.convert import read_checkpoint, write_gguf, write_hf

    figures: dict[str, Any] = {}
    weights, args = read_checkpoint(folder)
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        print("  transformers is not installed")
    else:
        if not (work / "demo-hf").exists():
            (work / "demo-hf").mkdir()
            write_hf(weights, args, torch.float32, work / "demo-hf")
        model = LlamaForCausalLM.from_pretrained(work / "demo-hf")
        speeds = {}
        for name, options in (("plain", {}), ("lookup", {"prompt_lookup_num_tokens": 7})):
            for _ in range(2):
                began = time.perf_counter()
                inputs = torch.tensor([prompt])
                options |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -2}
                got = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
                speeds[name] = (got.shape[1] - len(prompt)) / (time.perf_counter() - began)
        figures["transformers"] = {**speeds, "ratio": speeds["lookup"] / speeds["plain"]}
    try:
        from llama_cpp import Llama as LlamaCpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
    except ImportError:
        print("  llama-cpp-python is not installed")
    else:
        path = work / "demo.gguf"
        if not path.exists():
            write_gguf(weights, args, torch.float32, path)
        speeds = {}
        for name, draft_model in (("plain", None), ("lookup", LlamaPromptLookupDecoding(num_pred_tokens=7))):
            options = {"n_ctx": 512, "verbose": False, "logits_all": True, "n_threads": torch.get_num_threads()}
            model = LlamaCpp(str(path), draft_model=draft_model, **options)
            for _ in range(2):
                model.reset()
                began, n = time.perf_counter(), 0
                for n, _token in enumerate(model.generate(prompt, temp=0), 1):
                    if n == NEW:
                        break
                speeds[name] = n / (time.perf_counter() - began)
        figures["llama.cpp"] = {**speeds, "ratio": speeds["lookup"] / speeds["plain"]}
    for name, each in figures.items():
        print(f"  {name:<14}plain {each['plain']:.1f} lookup {each['lookup']:.1f} tokens/s, ratio {each['ratio']:.2f}")
    return figures


TEXT = (
    "The lighthouse of Skerry Point was built in 1847 by the engineer Anna Halvorsen. It is 42 metres high and has 215 steps. "
    "Its lamp burned whale oil until 1891, when it was replaced by an electric light of 30,000 candles. The keeper, Tom Brack, "
    "lived there for 31 years with his wife Mary, four children and a goat. In 1954 the lighthouse became automatic, and today "
    "it is a museum, which 12,000 people visit every year. The museum is closed on Mondays and in January."
)
CODE = """def total_price(items, tax):
    total = 0
    for item in items:
        total = total + item.price * item.count
    total = total + total * tax
    return total


def average_price(items, tax):
    total = 0
    for item in items:
        total = total + item.price * item.count
    total = total + total * tax
    return total / len(items)
"""
TASKS = {
    "question": f"{TEXT}\n\nAnswer with sentences of the text: Who built the lighthouse, how high is it, and what is it today?",
    "summary": f"{TEXT}\n\nSummarize this text in your own words, sentence by sentence.",
    "edit": f"Rename the variable total to amount in this code, and write the whole code:\n\n```python\n{CODE}```",
}


def real(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    from smollm2 import SYSTEM, SmolLM2, prepare

    folder = prepare(a.smollm2 or work / "smollm2")
    text = SmolLM2(folder)
    results: dict[str, Any] = {}
    for quantize in (None, "int8"):
        llama = Llama.build(folder, folder / "tokenizer.model", 2048, 1, quantize=quantize)
        for name, task in TASKS.items():
            prompt = text.bpe.encode(
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n"
            ).ids
            print(f"  {quantize or 'bfloat16'}, {name}")
            results[f"{quantize or 'bfloat16'} {name}"] = lookup_beside_plain(llama, prompt, 200, a.runs)
    return results


PARTS = {"costs": costs, "draft": draft, "demo": demo, "real": real}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="costs, draft, demo, real; default: all")
    parser.add_argument("--shape", default="1.1B", help="model of `costs`; default: 1.1B")
    parser.add_argument("--target", default="7B", help="model of `draft`; default: 7B")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="of `costs` and `draft`; default: none, bfloat16")
    parser.add_argument("--runs", type=int, default=3, help="turns; default: 3")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="folder of the model of `real`; default: in --work")
    parser.add_argument("--work", type=Path, help="folder that keeps what is written; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    if unknown := set(a.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)!r}; the parts are {', '.join(PARTS)}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in a.parts or PARTS:
            print(name, flush=True)
            results[name] = PARTS[name](a, a.work or Path(temporary))
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
