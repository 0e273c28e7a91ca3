"""Measure the quality of 8-bit and 4-bit weights against float32, on text that the model was not trained on.

    python benchmarks/quality.py [--ckpt_dir FOLDER --tokenizer_path FILE [--text FILE]] [--json FILE]
    python benchmarks/quality.py --smollm2 FOLDER [--tokens FILE] [--json FILE]

Without arguments, the demo model is scored on the answers to questions in wordings that its training did not contain. Another
model (--ckpt_dir) is scored on a text file (--text) in segments of 256 tokens, or without --text on stories of demo/corpus.py.

--smollm2 scores a real chat model, which smollm2.py downloads into the folder if needed. The scored tokens are the passages of
texts/, and the model's greedy answers in float32 to a dozen questions. llama.cpp quantizes the same weights and is scored on
the same tokens. For any other model, --llama_cpp adds llama.cpp, whose files are written to the given folder.
--tokens scores tokens instead of text, from a JSON file {"texts": [[...]], "questions": [[...]], "answers": [[...]]}, where
each text and each question begins with BOS.

    KL          mean KL divergence of the distribution of the next token from that in float32, in nats
    top-1       share of positions where the likeliest token is the same as in float32
    perplexity  perplexity, and its relative difference from the perplexity in bfloat16
    same        number of greedy answers that equal the float32 answers in every token
    facts       number of greedy answers with the expected word; counts only questions whose float32 answer contains the word
    weights     MB of all matrices that a decode step reads, with their scales, as stored in memory or in llama.cpp's file; the
                embedding counts only if it is also the output layer
    file        MB of llama.cpp's file, which contains no vocabulary
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
from smollm2 import QUESTIONS, SmolLM2, contains_word, prepare  # noqa: E402

from demo import evaluate  # noqa: E402
from demo.corpus import Writer  # noqa: E402
from demo.kinds import KINDS  # noqa: E402
from llama import Llama, Tokenizer, Transformer  # noqa: E402
from llama.chat import encode_dialog  # noqa: E402
from llama.engine.kv_cache import RaggedBatch  # noqa: E402
from llama.kernels import blocked_linear, packing  # noqa: E402
from llama.kernels.packed_weight import PackedWeight  # noqa: E402
from llama.quantization import weight as quantized_weight  # noqa: E402

SEGMENT_TOKENS = 256
N_STORIES = 60
CONTEXT = 1024  # context length in tokens
MAX_NEW_TOKENS = 64
Sequence = tuple[list[int], int]  # tokens, and how many of the first tokens are context that is not scored
# For each name: options of Llama.build, and constants of the library to replace while the model is loaded and scored.
VARIANTS: dict[str, tuple[dict[str, Any], dict[tuple[Any, str], Any]]] = {
    "bfloat16": ({}, {}),
    "int8": ({"quantize": "int8"}, {}),
    # By default, an activation of a narrow matrix is stored as two int8 values.
    "int8, activations of 8 bits": ({"quantize": "int8"}, {(blocked_linear, "NARROW_INT8_PER_ACTIVATION"): 1}),
    "int4": ({"quantize": "int4"}, {}),
    "int4, output layer in 4 bit": ({"quantize": "int4"}, {(quantized_weight, "OUTPUT_FORMAT"): "int4"}),
    "int4, groups of 64": ({"quantize": "int4"}, {(packing, "group_size"): lambda width, format: 64}),
}
LLAMA_CPP_VARIANTS = "BF16", "Q8_0", "Q4_0", "Q4_K_M"
RATIO_KEY = "of bfloat16's"  # key in the results: the perplexity divided by the perplexity in bfloat16


class Model(Protocol):
    weights: int  # bytes of the matrices that a decode step reads
    file: int | None  # bytes of llama.cpp's file; None for this library

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return float32 logits (S, vocab) at all positions of S tokens."""

    def answer(self, question: list[int]) -> list[int]:
        """Return a greedy answer of at most MAX_NEW_TOKENS tokens, without EOS."""


class Ours:
    def __init__(self, ckpt_dir: Path, tokenizer_path: Path, **options: Any) -> None:
        self.llama = Llama.build(ckpt_dir, tokenizer_path, CONTEXT, 1, **options)
        self.weights, self.file = matrix_bytes(self.llama.model), None

    def logits(self, tokens: list[int]) -> torch.Tensor:
        forward = self.llama.engine.forward()
        with torch.inference_mode():
            batch = RaggedBatch.from_segments([(0, 0, len(tokens))], forward.device)
            hidden = forward.hidden_states(torch.tensor(tokens, device=forward.device), batch, use_cache=False)
            return forward.logits(hidden).cpu()

    def answer(self, question: list[int]) -> list[int]:
        return self.llama.generate([question], MAX_NEW_TOKENS, temperature=0)[0][0]


class LlamaCpp:
    def __init__(self, ckpt_dir: Path, folder: Path, variant: str, eos_id: int) -> None:
        from peers import llamacpp

        weights, args = convert.read_checkpoint(ckpt_dir)
        if torch.equal(weights["tok_embeddings.weight"], weights["output.weight"]):
            del weights["output.weight"]  # the GGUF file of a model with tied embeddings has no output layer
        peer = "llama.cpp" if variant == "BF16" else f"llama.cpp:{variant}"
        prefix, threads = folder.resolve() / ckpt_dir.resolve().name, torch.get_num_threads()
        job = Job(peer, str(ckpt_dir), "", str(prefix), "bfloat16", "cpu", threads, 1, CONTEXT)
        folder.mkdir(parents=True, exist_ok=True)
        llamacpp.silence_log()
        convert.convert(job, weights, args)
        self.peer, self.eos_id = llamacpp.LlamaCpp(job), eos_id
        self.weights, self.file = convert.gguf_matrix_bytes(job.gguf), Path(job.gguf).stat().st_size

    def logits(self, tokens: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.peer.logits(tokens))

    def answer(self, question: list[int]) -> list[int]:
        answer = self.peer.generate([question], MAX_NEW_TOKENS).tokens[0]
        return answer[: answer.index(self.eos_id)] if self.eos_id in answer else answer


def matrix_bytes(model: Transformer) -> int:
    """Return the total size, in bytes, of all matrices except the embedding, as kernels store them, with their scales."""
    seen: dict[Any, Any] = {}  # keeps visited objects alive, because Python reuses the id() of a deleted object
    total = 0

    def visit(value: Any) -> None:
        nonlocal total
        strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
        key = ("address", value.data_ptr()) if strided else id(value)
        if key in seen:
            return
        seen[key] = value
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)
        elif type(value).__module__.startswith("llama."):
            visit(getattr(value, "__dict__", {}))

    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name != "tok_embeddings.weight":
            visit(weight.shared.kernel if isinstance(weight, PackedWeight) else weight)
    return total


def held_out_answers(tokenizer: Tokenizer) -> Iterator[Sequence]:
    """Yield questions for the demo model, in wordings that its training did not contain, each with the expected answer."""
    for name in KINDS:
        for dialog, answer in evaluate.fact_cases(name, 1)[:60]:
            question = encode_dialog(tokenizer, dialog)
            yield question + tokenizer.encode(answer, bos=False, eos=True), len(question)


def text_segments(tokenizer: Tokenizer, text: Path | None) -> Iterator[Sequence]:
    """Yield segments of a text file, each after BOS; without a file, yield the beginnings of stories of demo/corpus.py."""
    if text is None:
        writer = Writer(77)
        for _ in range(N_STORIES):
            yield tokenizer.encode(writer.story(), bos=True, eos=False)[:SEGMENT_TOKENS], 1
        return
    tokens = tokenizer.encode(text.read_text(), bos=False, eos=False)
    for i in range(0, len(tokens), SEGMENT_TOKENS - 1):
        yield [tokenizer.bos_id, *tokens[i : i + SEGMENT_TOKENS - 1]], 1


def next_token_logprobs(model: Model, tokens: list[int], n_context: int) -> torch.Tensor:
    """Return the log probabilities (N, vocab) of the next token at the N positions that are scored."""
    return model.logits(tokens[:-1])[n_context - 1 :].log_softmax(-1)


def sequence_logprob(logprobs: torch.Tensor, tokens: list[int], n_context: int) -> float:
    """Return the sum of the log probabilities of the scored tokens of one sequence."""
    return logprobs.gather(1, torch.tensor(tokens[n_context:]).unsqueeze(1)).double().sum().item()


class Scored:
    """Sequences to score, with the float32 model's log probabilities at each scored position."""

    def __init__(self, sequences: list[Sequence], float32: Model) -> None:
        self.sequences = sequences
        self.expected = [next_token_logprobs(float32, *sequence) for sequence in sequences]
        self.positions = sum(map(len, self.expected))
        totals = [sequence_logprob(logprobs, *sequence) for logprobs, sequence in zip(self.expected, sequences, strict=True)]
        self.perplexity = math.exp(-sum(totals) / self.positions)

    def measure(self, model: Model) -> dict[str, float]:
        divergence = same = total = 0.0
        for sequence, expected in zip(self.sequences, self.expected, strict=True):
            logprobs = next_token_logprobs(model, *sequence)
            divergence += (expected.exp() * (expected - logprobs)).sum(-1).double().sum().item()
            same += (expected.argmax(-1) == logprobs.argmax(-1)).sum().item()
            total += sequence_logprob(logprobs, *sequence)
        n = self.positions
        return {"kl": divergence / n, "top-1": same / n, "perplexity": math.exp(-total / n)}


class Chat:
    """Questions, the word that each answer must contain, and the answers of the float32 model, which is asked first."""

    def __init__(self, questions: list[list[int]], facts: list[str], decode: Callable[[list[int]], str] | None) -> None:
        self.questions, self.facts, self.decode = questions, facts, decode
        self.answers: list[list[int]] = []

    def ask(self, model: Model) -> dict[str, Any]:
        """Ask a model all questions, and return its results.

        "same" counts answers that equal the float32 model's. "facts" counts answers that contain the expected word,
        among the questions where the answer of the float32 model contains it. "texts" contains the decoded answers.
        """
        answers = [model.answer(question) for question in self.questions]
        self.answers = self.answers or answers
        result: dict[str, Any] = {"same": sum(map(list.__eq__, answers, self.answers))}
        if self.decode:
            texts, first_texts = ([self.decode(answer) for answer in group] for group in (answers, self.answers))
            cases = zip(self.facts, texts, first_texts, strict=True)
            result["facts"] = sum(contains_word(text, fact) and contains_word(first, fact) for fact, text, first in cases)
            result["texts"] = texts
        return result


def load_sequences(a: argparse.Namespace, float32: Ours) -> tuple[dict[str, Scored], Chat | None]:
    """Return the sequences to score, by name, and the `Chat` of a chat model, or None for any other model.

    The sequences are "text", and for a chat model also "answers".
    """
    tokenizer, chat = float32.llama.tokenizer, None
    if a.tokens:
        data = json.loads(a.tokens.read_text())
        chat, answers = Chat(data["questions"], [], None), data["answers"]
        sequences = [(tokens, 1) for tokens in data["texts"]]
        chat.ask(float32)
    elif a.smollm2:
        text = SmolLM2(a.ckpt_dir)
        chat = Chat(text.questions(), list(QUESTIONS.values()), text.decode)
        sequences = [(tokens, 1) for tokens in text.passages(CONTEXT)]
        chat.ask(float32)
        answers = [answer + [tokenizer.eos_id] * (len(answer) < MAX_NEW_TOKENS) for answer in chat.answers]
    elif a.ckpt_dir == ROOT / "demo/model":
        sequences = list(held_out_answers(tokenizer))
    else:
        sequences = list(text_segments(tokenizer, a.text))
    scored = {"text": Scored(sequences, float32)}
    if chat:
        pairs = zip(chat.questions, answers, strict=True)
        scored["answers"] = Scored([(question + answer, len(question)) for question, answer in pairs], float32)
    return scored, chat


def models(a: argparse.Namespace, eos_id: int) -> Iterator[tuple[str, Callable[[], Model], dict[tuple[Any, str], Any]]]:
    """Yield each model: its name, a function that loads it, and the library constants to replace while it is scored."""
    for name, (options, replacements) in VARIANTS.items():
        yield name, partial(Ours, a.ckpt_dir, a.tokenizer_path, dtype="bfloat16", **options), replacements
    for variant in LLAMA_CPP_VARIANTS if a.llama_cpp else ():
        yield f"llama.cpp {variant}", partial(LlamaCpp, a.ckpt_dir, a.llama_cpp, variant, eos_id), {}


def format_header(chat: Chat | None) -> str:
    columns = f"{'':28}{'KL':>9}{'top-1':>9}{'perplexity':>12}{'':9}"
    if chat:
        columns += f"{'KL':>9}{'top-1':>9}{'same':>6}" + f"{'facts':>7}" * bool(chat.facts)
    return columns + f"{'weights':>10}{'file':>8}"


def format_line(name: str, r: dict[str, Any]) -> str:
    columns = f"{name:28}{r['kl']:9.5f}{r['top-1']:9.2%}{r['perplexity']:12.4f}{r[RATIO_KEY] - 1:+9.2%}"
    if answers := r.get("answers"):
        columns += f"{answers['kl']:9.5f}{answers['top-1']:9.2%}{answers['same']:6}"
        columns += f"{answers['facts']:7}" if "facts" in answers else ""
    return columns + f"{r['weights'] / 1e6:10.2f}" + (f"{r['file'] / 1e6:8.2f}" if r["file"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo_model, demo_tokenizer = ROOT / "demo/model", ROOT / "demo/tokenizer.model"
    parser.add_argument("--ckpt_dir", type=Path, default=demo_model, help="default: the demo model")
    parser.add_argument("--tokenizer_path", type=Path, default=demo_tokenizer, help="default: the demo model's")
    parser.add_argument("--text", type=Path, help="text file to score; default: stories of demo/corpus.py")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="score SmolLM2-135M-Instruct, downloaded to this folder")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="JSON file with the tokens to score")
    parser.add_argument("--llama_cpp", type=Path, metavar="FOLDER", help="score llama.cpp too, and write its files here")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    if a.smollm2:
        a.ckpt_dir = prepare(a.smollm2)
        a.tokenizer_path, a.llama_cpp = a.ckpt_dir / "tokenizer.model", a.llama_cpp or a.ckpt_dir / "llama.cpp"
    if a.llama_cpp and not importlib.util.find_spec("llama_cpp"):
        print("llama.cpp is not measured, because it is not installed: pip install -e '.[bench]'", file=sys.stderr)
        a.llama_cpp = None

    float32 = Ours(a.ckpt_dir, a.tokenizer_path, dtype="float32")
    scored, chat = load_sequences(a, float32)
    results: dict[str, Any] = {"model": a.ckpt_dir.name, "positions": scored["text"].positions, "ways": {}}
    perplexity = scored["text"].perplexity
    print(f"{a.ckpt_dir.name}, {results['positions']:,} positions; float32: perplexity {perplexity:.4f}", end="")
    if chat:
        results["answers"] = {"count": len(chat.questions), "positions": scored["answers"].positions}
        print(f"; then {len(chat.questions)} answers, {scored['answers'].positions:,} positions", end="")
    print(f"\n\n{format_header(chat)}")
    by_name = results["ways"]
    for name, load_model, replacements in models(a, float32.llama.tokenizer.eos_id):
        with ExitStack() as stack:
            for (module, attribute), value in replacements.items():
                stack.enter_context(patch.object(module, attribute, value))
            model = load_model()
            r = by_name[name] = scored["text"].measure(model)
            r[RATIO_KEY] = r["perplexity"] / by_name["bfloat16"]["perplexity"]
            r |= {"weights": model.weights, "file": model.file}
            if chat:
                r["answers"] = scored["answers"].measure(model) | chat.ask(model)
        print(format_line(name, r), flush=True)
        del model  # free the memory of this model before the next one is loaded
    if chat and chat.decode:
        print_answers(chat, {name: result["answers"]["texts"] for name, result in by_name.items()})
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")


def print_answers(chat: Chat, texts: dict[str, list[str]]) -> None:
    """Print the float32 model's answer to each question, then all answers of other models that lack the expected word."""
    for i, (question, fact) in enumerate(QUESTIONS.items()):
        print(f"\n{question} ({fact})")
        wrong = {name: answers[i] for name, answers in texts.items() if not contains_word(answers[i], fact)}
        for name, text in {"float32": chat.decode(chat.answers[i]), **wrong}.items():
            print(f"    {name:28}{' '.join(text.split())[:90]}")


if __name__ == "__main__":
    main()
