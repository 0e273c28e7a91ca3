"""Quality: what 8 and 4 bit cost, against float32, on text that the model was not trained on.

    python benchmarks/quality.py [--ckpt_dir FOLDER --tokenizer_path FILE [--text FILE]] [--json FILE]

Without arguments the demo model, on its answers to questions in held-out wordings (only the answers count). With a model,
on the text of a file, in pieces of 256 ids; without one, on stories of demo/corpus.py, which is no other model's text.

    KL          mean divergence of the next id's distribution from float32's, in nats
    top-1       how often the likeliest id is float32's
    perplexity  of the text, and by how much it is worse than bfloat16's
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from demo import evaluate  # noqa: E402
from demo.corpus import Writer  # noqa: E402
from demo.kinds import KINDS  # noqa: E402
from llama import Llama, Tokenizer, quantize  # noqa: E402
from llama.cache import Batch  # noqa: E402
from llama.chat import encode_dialog  # noqa: E402

PIECE, STORIES, ROWS = 256, 60, 512
Sequence = tuple[list[int], int]  # ids, and how many of them are not scored
# What is measured: build's options, and what is set otherwise than in the library.
WAYS = {
    "bfloat16": ({}, {}),
    "int8": ({"quantize": "int8"}, {}),
    "int4": ({"quantize": "int4"}, {}),
    "int4, output layer in 4 bit": ({"quantize": "int4"}, {(quantize, "HEAD"): "int4"}),
    "int4, groups of 64": ({"quantize": "int4"}, {(quantize, "group_of"): lambda width: 64}),
}


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


@torch.inference_mode()
def log_probabilities(llama: Llama, sequences: list[Sequence]) -> torch.Tensor:
    """Of the next id, at every position that is scored: (N, vocab)."""
    found = []
    for ids, given in sequences:
        batch = Batch.of([(0, 0, len(ids) - 1)], llama.model.device)
        hidden = llama.model.hidden(torch.tensor(ids[:-1], device=llama.model.device), batch, keep=False)
        found.append(llama.model.logits(hidden[given - 1 :]).log_softmax(-1).cpu())
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--tokenizer_path", type=Path, default=ROOT / "demo/tokenizer.model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()

    def build(**options: object) -> Llama:
        return Llama.build(a.ckpt_dir, a.tokenizer_path, ROWS, 1, **options)

    plain = build(dtype="float32")
    demo = a.ckpt_dir == ROOT / "demo/model"
    sequences = list(held_out_answers(plain.tokenizer) if demo else pieces(plain.tokenizer, a.text))
    wanted = torch.tensor([id_ for ids, given in sequences for id_ in ids[given:]]).unsqueeze(1)
    exact = log_probabilities(plain, sequences)
    results: dict[str, dict[str, float]] = {}
    print(
        f"{a.ckpt_dir.name}, {len(wanted):,} positions; float32: perplexity {exact.gather(1, wanted).mean().neg().exp():.4f}\n"
    )
    print(f"{'':32}{'KL':>9}{'top-1':>9}{'perplexity':>12}")
    for name, (options, changes) in WAYS.items():
        with ExitStack() as stack:
            for (module, attribute), value in changes.items():
                stack.enter_context(patch.object(module, attribute, value))
            found = log_probabilities(build(dtype="bfloat16", **options), sequences)
        perplexity = found.gather(1, wanted).mean().neg().exp().item()
        results[name] = {
            "kl": (exact.exp() * (exact - found)).sum(-1).mean().item(),
            "top-1": (exact.argmax(-1) == found.argmax(-1)).float().mean().item(),
            "perplexity": perplexity,
            "of bfloat16's": perplexity / results.get("bfloat16", {}).get("perplexity", perplexity),
        }
        r = results[name]
        print(f"{name:32}{r['kl']:9.5f}{r['top-1']:9.2%}{perplexity:12.4f}{r['of bfloat16' + chr(39) + 's'] - 1:+9.2%}")
    if a.json:
        a.json.write_text(json.dumps({"model": a.ckpt_dir.name, "positions": len(wanted), "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
