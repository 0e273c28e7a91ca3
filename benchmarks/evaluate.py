"""Measure multiple-choice evaluation in lm-evaluation-harness: this library beside the harness's `hf`, on the same weights.

    pip install lm_eval transformers
    python benchmarks/evaluate.py [--shape 1.1B] [--requests 500] [--shots 0,5] [--dtypes float32,bfloat16] [--batch 8]
        [--runs 3] [--work FOLDER] [--json FILE]

The questions have 20 to 60 words of one token each, and four answers of 2 to 8 words; the weights and the words are random.
Every question has its own examples, as is usual in the harness. Both models run in turns in one process, through
`lm_eval.simple_evaluate`. --batch: the batch size of `hf`, and the rows of our KV cache. The script also compares all log
likelihoods.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import make_checkpoint, make_tokenizer
from peers.convert import read_checkpoint, write_hf, write_once

from llama import Llama, Tokenizer

CHOICES = 4


def make_questions(tokenizer: Tokenizer, n: int) -> list[dict[str, Any]]:
    """Return n questions, each with a text, answers and the number of the right answer."""
    rng, pieces = random.Random(0), tokenizer.sp_model
    words = [pieces.id_to_piece(token).lstrip("▁") for token in range(3, tokenizer.n_words)]

    def text(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

    return [
        {"question": text(20, 60), "choices": [text(2, 8) for _ in range(CHOICES)], "label": rng.randrange(CHOICES)}
        for _ in range(n)
    ]


def make_task(questions: list[dict[str, Any]], shots: int) -> Any:
    """Return a task of lm-evaluation-harness that asks these questions, each after `shots` others."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = dict(
        task="choices", custom_dataset=lambda **_: {"test": Dataset.from_list(questions)}, test_split="test",
        fewshot_split="test", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="choices",
        doc_to_target="label", num_fewshot=shots, metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    return ConfigurableTask(config=config)


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return a tokenizer of transformers that gives the tokens of ours for words of `make_tokenizer` between spaces."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {tokenizer.sp_model.id_to_piece(token).lstrip("▁"): token for token in range(tokenizer.n_words)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def evaluate(model: Any, task: Any) -> tuple[float, list[float]]:
    """Return the seconds that the harness takes for a task, and the log likelihood of each request."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    no_tasks = TaskManager(include_defaults=False)  # the harness's own are 14,000 files, whose reading takes 9 s of CPU time
    start = time.perf_counter()
    results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=no_tasks, bootstrap_iters=0)
    seconds = time.perf_counter() - start
    return seconds, [response[0] for sample in results["samples"]["choices"] for response in sample["filtered_resps"]]


def measure(work: Path, a: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """Measure both models in one dtype. Return the figures of each number of shots."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from llama.integrations.lm_eval import LlamaMeta

    ckpt, tokenizer_path = make_checkpoint(work, a.shape), make_tokenizer(work)
    folder = f"{ckpt}-{dtype}-hf"
    write_once(folder, lambda part: write_hf(*read_checkpoint(ckpt), getattr(torch, dtype), part))
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    llama = Llama.build(ckpt, tokenizer_path, 1024, a.batch, device="cpu", dtype=dtype)
    tokenizer = hugging_face_tokenizer(llama.tokenizer)
    models = {
        "hf": HFLM(peer, tokenizer=tokenizer, batch_size=a.batch, add_bos_token=True, device="cpu"),
        "ours": LlamaMeta(llama=llama),
    }
    results = []
    for shots in map(int, a.shots.split(",")):
        questions = make_questions(llama.tokenizer, max(shots + 1, a.requests // CHOICES))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        values: dict[str, list[float]] = {}
        for model in models.values():
            evaluate(model, make_task(questions[: shots + 2], shots))  # a warm-up
        for _ in range(a.runs):
            for name, model in models.items():
                took, values[name] = evaluate(model, make_task(questions, shots))
                seconds[name].append(took)
        ratio = statistics.median(b / c for b, c in zip(seconds["hf"], seconds["ours"], strict=True))
        difference = max(abs(x - y) for x, y in zip(values["hf"], values["ours"], strict=True))
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        row = f"{dtype:<10}{shots:>6}{len(values['ours']):>10}{medians['hf']:>9.2f}{medians['ours']:>9.2f}"
        print(f"{row}{ratio:>9.2f}x{difference:>14.2g}", flush=True)
        results.append(
            {"dtype": dtype, "shots": shots, "requests": len(values["ours"]), "seconds": seconds, "difference": difference}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--requests", type=int, default=500, help="number of answers to score; default: 500")
    parser.add_argument("--shots", default="0,5", help="numbers of examples before a question; default: 0,5")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: float32,bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="batch size of hf, and our max_batch_size; default: 8")
    parser.add_argument("--runs", type=int, default=3, help="default: 3")
    parser.add_argument("--work", type=Path, help="folder that keeps the models; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    print(f"{'dtype':<10}{'shots':>6}{'requests':>10}{'hf, s':>9}{'ours, s':>9}{'ratio':>10}{'difference':>14}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        results = [row for dtype in a.dtypes.split(",") for row in measure(a.work or Path(temporary), a, dtype)]
    if a.json:
        a.json.write_text(json.dumps({"shape": a.shape, "batch": a.batch, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
