"""Quality: what 8 and 4 bit cost, against float32, on text that the model was not trained on.

    python benchmarks/quality.py [--ckpt_dir FOLDER --tokenizer_path FILE [--text FILE]] [--json FILE]
    python benchmarks/quality.py --smollm2 FOLDER [--ids FILE] [--json FILE]

Without arguments the demo model, on its answers to questions in held-out wordings (only the answers count). With a model,
on the text of a file, in pieces of 256 tokens; without one, on stories of demo/corpus.py, which is no other model's text.

--smollm2 measures a real chat model, which it downloads into the folder if it is not there (smollm2.py): on the passages of
texts/, and on its own greedy answers in float32 to a dozen questions. llama.cpp quantizes the same weights beside it and
goes through the same tokens; for other models it does so where --llama_cpp says in which folder its files may be written.
--ids measures on tokens instead: {"texts": [[...]], "questions": [[...]], "answers": [[...]]}, each text after BOS.

    KL          mean divergence of the next token's distribution from float32's, in nats
    top-1       how often the likeliest token is float32's
    perplexity  and by how much it is worse than bfloat16's
    same        greedy answers that are float32's, token by token
    facts       greedy answers that have the word which float32's answer has
    weights     MB of all matrices that a step reads, which the embedding is not unless it is the output layer, too; with
                their scales, as they lie in memory or in llama.cpp's file
    file        MB of that file, which has no vocabulary
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from peers import Job, convert  # noqa: E402
from smollm2 import QUESTIONS, SmolLM2, holds, prepare  # noqa: E402

from demo import evaluate  # noqa: E402
from demo.corpus import Writer  # noqa: E402
from demo.kinds import KINDS  # noqa: E402
from llama import Llama, Tokenizer, Transformer  # noqa: E402
from llama.chat import encode_dialog  # noqa: E402
from llama.engine.kv_cache import RaggedBatch  # noqa: E402
from llama.kernels import blocked_linear, packing  # noqa: E402
from llama.kernels.packed_weight import PackedWeight  # noqa: E402
from llama.quantization import weight as quantized_weight  # noqa: E402

PIECE, STORIES, WINDOW, NEW = 256, 60, 1024, 64
Sequence = tuple[list[int], int]  # tokens, and how many of them are not scored
# This library: build's options, and what is set otherwise than in the library.
WAYS: dict[str, tuple[dict[str, Any], dict[tuple[Any, str], Any]]] = {
    "bfloat16": ({}, {}),
    "int8": ({"quantize": "int8"}, {}),
    "int8, activations of 8 bits": ({"quantize": "int8"}, {(blocked_linear, "NARROW_DIGITS"): 1}),  # as in wide rows
    "int4": ({"quantize": "int4"}, {}),
    "int4, output layer in 4 bit": ({"quantize": "int4"}, {(quantized_weight, "OUTPUT_FORMAT"): "int4"}),
    "int4, groups of 64": ({"quantize": "int4"}, {(packing, "group_size"): lambda width, format: 64}),
}
LLAMA_CPP = "BF16", "Q8_0", "Q4_0", "Q4_K_M"
OF_BFLOAT16 = "of bfloat16's"


class Model(Protocol):
    weights: int  # bytes, as said above
    file: int | None

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return float32 (S, vocab)."""

    def answer(self, question: list[int]) -> list[int]:
        """Continue greedily, to before EOS or for NEW tokens."""


class Ours:
    def __init__(self, ckpt_dir: Path, tokenizer_path: Path, **options: Any) -> None:
        self.llama = Llama.build(ckpt_dir, tokenizer_path, WINDOW, 1, **options)
        self.weights, self.file = held(self.llama.model), None

    def logits(self, tokens: list[int]) -> torch.Tensor:
        forward = self.llama.engine.forward()
        with torch.inference_mode():
            batch = RaggedBatch.from_segments([(0, 0, len(tokens))], forward.device)
            hidden = forward.hidden_states(torch.tensor(tokens, device=forward.device), batch, use_cache=False)
            return forward.logits(hidden).cpu()

    def answer(self, question: list[int]) -> list[int]:
        return self.llama.generate([question], NEW, temperature=0)[0][0]


class LlamaCpp:
    def __init__(self, ckpt_dir: Path, folder: Path, variant: str, eos: int) -> None:
        from peers import llamacpp

        weights, args = convert.read(ckpt_dir)
        if torch.equal(weights["tok_embeddings.weight"], weights["output.weight"]):
            del weights["output.weight"]  # tied, as its users' files of such a model are
        peer = "llama.cpp" if variant == "BF16" else f"llama.cpp:{variant}"
        begin, threads = folder.resolve() / ckpt_dir.resolve().name, torch.get_num_threads()
        job = Job(peer, str(ckpt_dir), "", str(begin), "bfloat16", "cpu", threads, 1, WINDOW)
        folder.mkdir(parents=True, exist_ok=True)
        llamacpp.be_quiet()
        convert.convert(job, weights, args)
        self.peer, self.eos = llamacpp.LlamaCpp(job), eos
        self.weights, self.file = convert.matrix_bytes(job.gguf), Path(job.gguf).stat().st_size

    def logits(self, tokens: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.peer.logits(tokens))

    def answer(self, question: list[int]) -> list[int]:
        answer = self.peer.generate([question], NEW).ids[0]
        return answer[: answer.index(self.eos)] if self.eos in answer else answer


def held(model: Transformer) -> int:
    """Return the bytes of all matrices but the embedding, with what lies beside them, in whatever form a kernel holds them."""
    seen: dict[Any, Any] = {}  # what it holds stays alive, so that no other object gets its id
    found = 0

    def visit(value: Any) -> None:
        nonlocal found
        strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
        key = ("address", value.data_ptr()) if strided else id(value)
        if key in seen:
            return
        seen[key] = value
        if isinstance(value, torch.Tensor):
            found += value.nbytes
        elif isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                visit(each)
        elif type(value).__module__.startswith("llama."):
            visit(getattr(value, "__dict__", {}))

    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name != "tok_embeddings.weight":
            visit(weight.shared.kernel if isinstance(weight, PackedWeight) else weight)
    return found


def held_out_answers(tokenizer: Tokenizer) -> Iterator[Sequence]:
    for name in KINDS:
        for dialog, answer in evaluate.fact_cases(name, 1)[:60]:
            question = encode_dialog(tokenizer, dialog)
            yield question + tokenizer.encode(answer, bos=False, eos=True), len(question)


def pieces(tokenizer: Tokenizer, text: Path | None) -> Iterator[Sequence]:
    if text is None:
        writer = Writer(77)
        for _ in range(STORIES):
            yield tokenizer.encode(writer.story(), bos=True, eos=False)[:PIECE], 1
        return
    ids = tokenizer.encode(text.read_text(), bos=False, eos=False)
    for i in range(0, len(ids), PIECE - 1):
        yield [tokenizer.bos_id, *ids[i : i + PIECE - 1]], 1


def log_probabilities(model: Model, tokens: list[int], given: int) -> torch.Tensor:
    """Return those of each token after the given ones: (N, vocab)."""
    return model.logits(tokens[:-1])[given - 1 :].log_softmax(-1)


def likelihood(found: torch.Tensor, tokens: list[int], given: int) -> float:
    """Return the sum of the tokens' own log probabilities."""
    return found.gather(1, torch.tensor(tokens[given:]).unsqueeze(1)).double().sum().item()


class Scored:
    """Sequences, and float32's distributions of the next token at the positions that count."""

    def __init__(self, sequences: list[Sequence], plain: Model) -> None:
        self.sequences = sequences
        self.exact = [log_probabilities(plain, *each) for each in sequences]
        self.positions = sum(map(len, self.exact))
        likelihoods = [likelihood(exact, *each) for exact, each in zip(self.exact, sequences, strict=True)]
        self.perplexity = math.exp(-sum(likelihoods) / self.positions)

    def measure(self, model: Model) -> dict[str, float]:
        divergence = same = likely = 0.0
        for each, exact in zip(self.sequences, self.exact, strict=True):
            found = log_probabilities(model, *each)
            divergence += (exact.exp() * (exact - found)).sum(-1).double().sum().item()
            same += (exact.argmax(-1) == found.argmax(-1)).sum().item()
            likely += likelihood(found, *each)
        n = self.positions
        return {"kl": divergence / n, "top-1": same / n, "perplexity": math.exp(-likely / n)}


class Chat:
    """Questions, their facts, and the answers that others are compared with."""

    def __init__(self, questions: list[list[int]], facts: list[str], decode: Callable[[list[int]], str] | None) -> None:
        self.questions, self.facts, self.decode = questions, facts, decode
        self.answers: list[list[int]] = []

    def ask(self, model: Model) -> dict[str, Any]:
        """Return how many answers are as the first model's, and what they say."""
        answers = [model.answer(question) for question in self.questions]
        self.answers = self.answers or answers
        found: dict[str, Any] = {"same": sum(map(list.__eq__, answers, self.answers))}
        if self.decode:
            texts, first = ([self.decode(answer) for answer in each] for each in (answers, self.answers))
            cases = zip(self.facts, texts, first, strict=True)
            found["facts"] = sum(holds(text, fact) and holds(as_first, fact) for fact, text, as_first in cases)
            found["texts"] = texts
        return found


def load(a: argparse.Namespace, plain: Ours) -> tuple[dict[str, Scored], Chat | None]:
    """Return what is measured, by name, and the chat, if there is one: of "answers" to its questions, besides "text"."""
    tokenizer, chat = plain.llama.tokenizer, None
    if a.ids:
        given = json.loads(a.ids.read_text())
        chat, answers = Chat(given["questions"], [], None), given["answers"]
        first = [(tokens, 1) for tokens in given["texts"]]
        chat.ask(plain)
    elif a.smollm2:
        text = SmolLM2(a.ckpt_dir)
        chat = Chat(text.questions(), list(QUESTIONS.values()), text.decode)
        first = [(tokens, 1) for tokens in text.passages(WINDOW)]
        chat.ask(plain)
        answers = [answer + [tokenizer.eos_id] * (len(answer) < NEW) for answer in chat.answers]
    else:
        first = list(held_out_answers(tokenizer) if a.ckpt_dir == ROOT / "demo/model" else pieces(tokenizer, a.text))
    scored = {"text": Scored(first, plain)}
    if chat:
        both = zip(chat.questions, answers, strict=True)
        scored["answers"] = Scored([(question + answer, len(question)) for question, answer in both], plain)
    return scored, chat


def models(a: argparse.Namespace, eos: int) -> Iterator[tuple[str, Callable[[], Model], dict[tuple[Any, str], Any]]]:
    """Yield the name of each row, what loads it, and what is to be changed meanwhile."""
    for name, (options, changes) in WAYS.items():
        yield name, partial(Ours, a.ckpt_dir, a.tokenizer_path, dtype="bfloat16", **options), changes
    for variant in LLAMA_CPP if a.llama_cpp else ():
        yield f"llama.cpp {variant}", partial(LlamaCpp, a.ckpt_dir, a.llama_cpp, variant, eos), {}


def head(chat: Chat | None) -> str:
    columns = f"{'':28}{'KL':>9}{'top-1':>9}{'perplexity':>12}{'':9}"
    if chat:
        columns += f"{'KL':>9}{'top-1':>9}{'same':>6}" + f"{'facts':>7}" * bool(chat.facts)
    return columns + f"{'weights':>10}{'file':>8}"


def line(name: str, r: dict[str, Any]) -> str:
    columns = f"{name:28}{r['kl']:9.5f}{r['top-1']:9.2%}{r['perplexity']:12.4f}{r[OF_BFLOAT16] - 1:+9.2%}"
    if answers := r.get("answers"):
        columns += f"{answers['kl']:9.5f}{answers['top-1']:9.2%}{answers['same']:6}"
        columns += f"{answers['facts']:7}" if "facts" in answers else ""
    return columns + f"{r['weights'] / 1e6:10.2f}" + (f"{r['file'] / 1e6:8.2f}" if r["file"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--tokenizer_path", type=Path, default=ROOT / "demo/tokenizer.model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--llama_cpp", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.smollm2:
        a.ckpt_dir = prepare(a.smollm2)
        a.tokenizer_path, a.llama_cpp = a.ckpt_dir / "tokenizer.model", a.llama_cpp or a.ckpt_dir / "llama.cpp"
    if a.llama_cpp and not importlib.util.find_spec("llama_cpp"):
        print("llama.cpp is not installed, and not measured: pip install -e '.[bench]'", file=sys.stderr)
        a.llama_cpp = None

    plain = Ours(a.ckpt_dir, a.tokenizer_path, dtype="float32")
    scored, chat = load(a, plain)
    found: dict[str, Any] = {"model": a.ckpt_dir.name, "positions": scored["text"].positions, "ways": {}}
    print(f"{a.ckpt_dir.name}, {found['positions']:,} positions; float32: perplexity {scored['text'].perplexity:.4f}", end="")
    if chat:
        found["answers"] = {"count": len(chat.questions), "positions": scored["answers"].positions}
        print(f"; then {len(chat.questions)} answers, {scored['answers'].positions:,} positions", end="")
    print(f"\n\n{head(chat)}")
    ways = found["ways"]
    for name, make, changes in models(a, plain.llama.tokenizer.eos_id):
        with ExitStack() as stack:
            for (module, attribute), value in changes.items():
                stack.enter_context(patch.object(module, attribute, value))
            model = make()
            r = ways[name] = scored["text"].measure(model)
            r[OF_BFLOAT16] = r["perplexity"] / ways["bfloat16"]["perplexity"]
            r |= {"weights": model.weights, "file": model.file}
            if chat:
                r["answers"] = scored["answers"].measure(model) | chat.ask(model)
        print(line(name, r), flush=True)
        del model  # before the next is loaded
    if chat and chat.decode:
        print_answers(chat, {name: way["answers"]["texts"] for name, way in ways.items()})
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")


def print_answers(chat: Chat, texts: dict[str, list[str]]) -> None:
    """Print float32's answers, and below each those of others that lack the fact."""
    for i, (question, fact) in enumerate(QUESTIONS.items()):
        print(f"\n{question} ({fact})")
        lacking = {name: of[i] for name, of in texts.items() if not holds(of[i], fact)}
        for name, text in {"float32": chat.decode(chat.answers[i]), **lacking}.items():
            print(f"    {name:28}{' '.join(text.split())[:90]}")


if __name__ == "__main__":
    main()
