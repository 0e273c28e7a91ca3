"""Compare this library in lm-evaluation-harness with the harness's `hf`, request by request, in float32 on the same weights.

    pip install lm_eval transformers sentencepiece protobuf
    python benchmarks/equal_to_hf.py [FOLDER ...] [--size 1] [--max_seq_len 256]

FOLDER: a checkpoint, with its tokenizer in the folder or in its parent; default: the demo model. One in Meta's layout is
converted to Hugging Face's for `hf`. The tasks are of each kind that the harness has, made of the passages in texts/. Dialogs
have the folder's chat template, or Llama 2's. Prints for each kind the number of requests, the largest difference between two
log likelihoods, how many other results differ (texts, and whether greedy sampling would generate the choice), and the largest
relative difference between two metrics. Exits with 1 if a log likelihood differs by more than 1e-3, or anything else differs.

Two differences that are not errors are taken out, see docs/evaluation.md: `hf` gets a space before each choice in Llama 2's
format, and no BOS in rolling tasks, where the harness puts one itself.
"""

import argparse
import os
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT

from llama import Llama, convert_checkpoint
from llama.chat import LLAMA_2

LIMIT = 1e-3  # of a difference between two log likelihoods
LLAMA_2_TEMPLATE = """\
{% for m in messages %}
{%- set begin = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if messages[0].role == 'system' and loop.index == 2 %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + (begin or '') + m.content.strip() + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity"),
    "generate_until": ("exact_match",),
}
DIALOGS = {"apply_chat_template": True}
TURNS = DIALOGS | {"fewshot_as_multiturn": True, "system_instruction": "Choose the best ending."}
KINDS: tuple[tuple[str, str, int, tuple[int, int], int, dict[str, Any]], ...] = (
    # name, the harness's type, number of questions, shortest and longest question in words, examples, options of the evaluation
    ("choices", "multiple_choice", 120, (5, 40), 0, {}),
    ("choices after 3 examples", "multiple_choice", 40, (5, 40), 3, {}),
    ("choices, too long", "multiple_choice", 12, (300, 420), 0, {}),  # contexts lose their first tokens
    ("choices in dialogs", "multiple_choice", 60, (5, 40), 0, DIALOGS),
    ("choices after 2 turns", "multiple_choice", 20, (5, 40), 2, TURNS),
    ("last words", "loglikelihood", 100, (8, 40), 0, {}),
    ("last words in dialogs", "loglikelihood", 40, (8, 40), 0, DIALOGS),
    ("whole texts", "loglikelihood_rolling", 20, (40, 300), 0, {}),
    ("answers", "generate_until", 60, (3, 25), 0, {}),
    ("answers in dialogs", "generate_until", 60, (3, 25), 0, DIALOGS),
)


def make_task(name: str, kind: str, n: int, lengths: tuple[int, int], shots: int) -> Any:
    """Return a task of the harness. lengths: those of the questions, in words."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rng = random.Random(5)
    words = " ".join(path.read_text() for path in sorted((ROOT / "benchmarks/texts").glob("*.txt"))).split()

    def passage(shortest: int, longest: int) -> str:
        length = rng.randint(shortest, longest)
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    docs = [
        {"text": passage(*lengths), "choices": [passage(1, 8) for _ in range(4)], "label": rng.randrange(4)} for _ in range(n)
    ]
    config = dict(
        task=name, custom_dataset=lambda **_: {"test": Dataset.from_list(docs)}, test_split="test", fewshot_split="test",
        output_type=kind, num_fewshot=shots, doc_to_text="{{text}}", doc_to_target=" {{choices[0]}}",
        metric_list=[{"metric": metric} for metric in METRICS[kind]],
    )  # fmt: skip
    if kind == "multiple_choice":
        config |= {"doc_to_choice": "choices", "doc_to_target": "label"}
    elif kind == "loglikelihood_rolling":
        config |= {"doc_to_text": "", "doc_to_target": "{{text}}"}
    elif kind == "generate_until":
        config["generation_kwargs"] = {"until": ["\n\n", ". "], "max_gen_toks": 24, "do_sample": False}
    return ConfigurableTask(config=config)


def evaluate(model: Any, task: Any, options: dict[str, Any]) -> tuple[list[Any], dict[str, float]]:
    """Return the results of all requests, and the metrics."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    no_tasks = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=no_tasks, bootstrap_iters=0, **options)
    (samples,), (metrics,) = results["samples"].values(), results["results"].values()
    responses = [response[0] for sample in samples for response in sample["resps"]]
    return responses, {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def compare(theirs: Any, ours: Any) -> tuple[float, bool]:
    """Return how much two log likelihoods differ, and whether the rest of two results differs."""
    if isinstance(theirs, str):
        return 0.0, theirs != ours
    (x, x_is_greedy), (y, y_is_greedy) = (each if isinstance(each, (tuple, list)) else (each, None) for each in (theirs, ours))
    return abs(float(x) - float(y)), x_is_greedy != y_is_greedy


def measure(folder: Path, work: Path, size: float, max_seq_len: int) -> bool:
    """Print a line for each kind of task; return True if all results are equal."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama.integrations.lm_eval import LlamaMeta

    class WithSpace(HFLM):
        """The harness's `hf`, which puts a space before each choice in a dialog."""

        def _encode_pair(self, context: str, continuation: str) -> Any:
            return super()._encode_pair(context, continuation if continuation.startswith(" ") else " " + continuation)

    llama = Llama.build(folder, None, max_seq_len, 8, device="cpu", dtype="float32")
    in_hf = folder if (folder / "config.json").exists() else convert_checkpoint(folder, work / "hf", "hf")
    peer, tokenizer = AutoModelForCausalLM.from_pretrained(in_hf, dtype=torch.float32), AutoTokenizer.from_pretrained(in_hf)
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    is_llama_2 = llama.chat_format is LLAMA_2
    if is_llama_2:
        tokenizer.chat_template = LLAMA_2_TEMPLATE
    begins_with_bos = getattr(llama.tokenizer, "begins_with_bos", True)
    all_equal = True
    print(f"{folder!s:<28}{'requests':>10}{'log likelihood':>16}{'others':>8}{'metrics':>10}", flush=True)
    for name, kind, n, lengths, shots, options in KINDS:
        task = make_task(re.sub(r"\W+", "_", name), kind, max(shots + 1, int(n * size)), lengths, shots)
        hf = (WithSpace if is_llama_2 and options else HFLM)(
            peer, tokenizer=tokenizer, batch_size=8, device="cpu", max_length=max_seq_len,
            add_bos_token=begins_with_bos and kind != "loglikelihood_rolling",
        )  # fmt: skip
        (theirs, their_metrics), (ours, metrics) = evaluate(hf, task, options), evaluate(LlamaMeta(llama=llama), task, options)
        pairs = [compare(*pair) for pair in zip(theirs, ours, strict=True)]
        difference, others = max(d for d, _ in pairs), sum(differs for _, differs in pairs)
        relative = max(
            abs(value / their_metrics[key] - 1) if their_metrics[key] else abs(value) for key, value in metrics.items()
        )
        print(f"{name:<28}{len(pairs):>10}{difference:>16.2g}{others:>8}{relative:>10.1g}", flush=True)
        all_equal &= difference <= LIMIT and not others
    return all_equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="*", default=[Path("demo/model")])
    parser.add_argument("--size", type=float, default=1.0, help="multiplies the number of questions; default: 1")
    parser.add_argument("--max_seq_len", type=int, default=256, help="default: 256")
    a = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    equal = []
    for folder in a.folders:
        with tempfile.TemporaryDirectory() as work:
            equal.append(measure(folder, Path(work), a.size, a.max_seq_len))
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
