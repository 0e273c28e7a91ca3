"""Send mixed requests to one process for hours, and check the answers and the memory of the process.

    python benchmarks/soak.py [--minutes 120] [--formats stored,int8,int4] [--ckpt_dir FOLDER --tokenizer_path FILE]
                              [--seed 0] [--only REQUESTS] [--without REQUESTS] [--json FILE] [--plot FILE]

Each round sends every type of request (WORKLOADS) to one model, with random prompts and options, in random order. The run
fails with exit code 1 at the first broken promise:

    requests   each request is answered as the docstring of its function promises, or refused with an error of this library
    answers    after every round, a fixed set of prompts (greedy with log probabilities, and sampled with and without seeds)
               gives exactly the same answers as at the start of the run
    memory     after a warm-up of a third of the run, memory stays flat: the median of the last tenth of the remaining samples
               is at most 2% above the median of the first tenth, for resident memory and for anonymous memory

Runs on the CPU of a Linux machine. Ctrl-C ends the run early and prints the results so far.
"""

import argparse
import json
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from llama import Dialog, Llama, LlamaError, resolve_model_paths
from llama.chat import UNSAFE_ERROR, Message

HERE = Path(__file__).parent
CONTEXT, ROWS = 256, 4  # max_seq_len and max_batch_size of the models
WARM_UP = 3  # the warm-up is the first third of the memory samples
MAX_SAMPLES = 600  # approximate number of memory samples in a run
MAX_GROWTH = 0.02  # the memory may grow by 2% after the warm-up
WORDS = """what is the capital of France how do I get from Rome to Oslo my name Tom a little bear who could not sleep counted
stars and was still awake please tell me opposite hot cold bread flour water 3 + 4 = 7 naïve 你好 🐶 🚕 Привет été
letter dear grandmother birthday happy it rained all night The end""".split()
Workload = Callable[[Llama, Random], None]


class BrokenPromise(Exception):
    """Raised when the model breaks a promise that this benchmark checks."""


def check(condition: bool, promise: str) -> None:
    if not condition:
        raise BrokenPromise(promise)


# --- random prompts and options ---


def text(rng: Random, max_words: int = 24) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, max_words)))


def texts(rng: Random) -> list[str]:
    """Return random texts, short and long, up to twice as many as the model has rows."""
    return [text(rng, rng.choice([2, 8, 60])) for _ in range(rng.randint(1, 2 * ROWS))]


def dialog(rng: Random, turns: int = 3) -> Dialog:
    messages: list[Message] = [{"role": "system", "content": text(rng, 6)}] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(turns)):
        messages += [{"role": "user", "content": text(rng, 8)}, {"role": "assistant", "content": text(rng, 8)}]
    return [*messages, {"role": "user", "content": text(rng, 8)}]


def options(rng: Random) -> dict[str, Any]:
    """Return random options for one call: greedy decoding, or sampling with or without a seed."""
    sampling: dict[str, Any] = rng.choice([{"temperature": 0}, {}, {"seed": rng.randrange(2**32)}])
    if sampling.get("temperature") != 0:
        sampling |= {"temperature": rng.uniform(0.2, 1.5), "top_p": rng.uniform(0.5, 1), "top_k": rng.choice([0, 5, 40])}
        sampling |= {"min_p": rng.choice([0.0, 0.05])}
    bias = {rng.randrange(3, 300): rng.uniform(-100, 5) for _ in range(rng.choice([0, 0, 3]))}
    return sampling | {
        "logit_bias": bias,
        "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
        "max_gen_len": rng.choice([0, 1, 7, 16, 24]),
    }


# --- the types of request, each with its promise ---


def text_batches(llama: Llama, rng: Random) -> None:
    """Complete texts of different length, often more than the model has rows, with log probabilities and echo."""
    prompts, kwargs = texts(rng), options(rng)
    results = llama.text_completion(prompts, logprobs=True, echo=True, details=True, **kwargs)
    check(len(results) == len(prompts), f"{len(prompts)} prompts, {len(results)} results")
    for prompt, result in zip(prompts, results, strict=True):
        n = result["prompt_tokens"] + result["new_tokens"]
        check(n == len(result["tokens"]) == len(result["logprobs"]), "with echo, each token has a log probability")
        check(result["generation"].startswith(prompt), "with echo, the text begins with its prompt")
        check(result["new_tokens"] <= kwargs["max_gen_len"], "an answer has at most max_gen_len tokens")
        check(all(value <= 0 for value in result["logprobs"]), "log probabilities are at most 0")


def chat_batches(llama: Llama, rng: Random) -> None:
    """Answer several dialogs. One of them contains a tag of the chat format, and only this one must be refused."""
    dialogs = [dialog(rng) for _ in range(rng.randint(1, 2 * ROWS))]
    unsafe = rng.randrange(len(dialogs) + 1)
    dialogs.insert(unsafe, [{"role": "user", "content": "what [/INST] is"}])
    results = llama.chat_completion(dialogs, logprobs=rng.random() < 0.5, **options(rng))
    contents = [result["generation"]["content"] for result in results]
    refused = [i for i, content in enumerate(contents) if content == UNSAFE_ERROR]
    check(refused == [unsafe], "only the dialog with a tag is refused")


def seeds(llama: Llama, rng: Random) -> None:
    """Repeat a call with the same seeds after an unrelated call: the answers must be equal."""
    prompts = texts(rng)
    kwargs = options(rng) | {"seed": [rng.randrange(-(2**63), 2**64) for _ in prompts], "temperature": 1.0}
    answers = llama.text_completion(prompts, **kwargs)
    llama.text_completion([text(rng)], max_gen_len=4)
    check(llama.text_completion(prompts, **kwargs) == answers, "the same seeds give the same answers")


def ids(llama: Llama, rng: Random) -> None:
    """Continue prompts of tokens as a batch and as a stream that ends early. One prompt is as long as the context."""
    last_token = llama.tokenizer.n_words - 1
    prompts = [[rng.randint(3, last_token) for _ in range(n)] for n in (CONTEXT, 1, rng.randint(2, CONTEXT))]
    rng.shuffle(prompts)
    answers, _ = llama.generate(prompts, 12, temperature=0)
    check(
        all(len(a) <= min(12, CONTEXT - len(p)) for a, p in zip(answers, prompts, strict=True)), "answers fit into the context"
    )
    streamed: list[list[int]] = [[] for _ in prompts]
    for token, _ in zip(llama.generate_stream(prompts, 12, temperature=0), range(rng.randint(1, 30)), strict=False):
        streamed[token.prompt_index].append(token.token)
    check(all(a[: len(t)] == t for a, t in zip(answers, streamed, strict=True)), "streamed tokens equal the batch's")
    check(llama.generate([], 12) == ([], None), "no prompts give no answers")


def streams_to_the_end(llama: Llama, rng: Random) -> None:
    """Stream a text and a dialog: the chunks must add up to the answer of the same call without a stream."""
    prompt, messages, kwargs = text(rng), dialog(rng), options(rng) | {"seed": rng.randrange(2**32)}
    expected = llama.text_completion([prompt], **kwargs)[0]["generation"]
    check("".join(llama.text_completion_stream(prompt, **kwargs)) == expected, "the chunks of a text make up its answer")
    expected = llama.chat_completion([messages], **kwargs)[0]["generation"]["content"]
    check("".join(llama.chat_completion_stream(messages, **kwargs)) == expected, "the chunks of a dialog make up its answer")


def streams_left_early(llama: Llama, rng: Random) -> None:
    """Leave streams early: with a `with` block, with `close`, or by deleting the last reference."""
    for leave in ("with", "close", "forget"):
        stream = llama.chat_completion_stream(dialog(rng), **options(rng))
        for _ in range(rng.randrange(4)):
            next(stream, None)
        if leave == "with":
            with stream:
                pass
        elif leave == "close":
            stream.close()
        del stream


def streams_interrupted(llama: Llama, rng: Random) -> None:
    """Call the model while a stream is open: both answers must be right."""
    prompt, other = text(rng), text(rng)
    alone = [llama.text_completion([p], 0, max_gen_len=12)[0]["generation"] for p in (prompt, other)]
    stream = llama.text_completion_stream(prompt, 0, max_gen_len=12)
    with stream:
        streamed = next(stream, "")
        second = llama.text_completion([other], 0, max_gen_len=12)[0]["generation"]
        streamed += "".join(stream)
    check([streamed, second] == alone, "a stream and a call during the stream do not mix")


def turns(llama: Llama, rng: Random) -> None:
    """Hold a conversation, whose turns share the prefix cache."""
    messages: list[Message] = []
    for _ in range(3):
        messages.append({"role": "user", "content": text(rng, 8)})
        with llama.chat_completion_stream(messages, **options(rng) | {"max_gen_len": 16}) as stream:
            answer = "".join(stream)
        check(stream.finish_reason in ("stop", "length"), "a turn has a finish reason")
        check(stream.new_tokens <= 16, "a turn has at most max_gen_len tokens")
        messages.append({"role": "assistant", "content": answer})


def scores(llama: Llama, rng: Random) -> None:
    """Score the same endings of prompts twice: the scores must be equal."""
    prompts = [text(rng) for _ in range(rng.randint(1, 12))]
    endings = [f" {text(rng, 6)}" for _ in prompts]
    results = llama.score(prompts, endings)
    complete = all(score.total <= 0 and len(score.tokens) == len(score.logprobs) > 0 for score in results)
    check(complete, "each ending has a score for each token")
    check(llama.score(prompts, endings) == results, "the same texts have the same scores")


def stops(llama: Llama, rng: Random) -> None:
    """Complete texts with stop strings: no answer may contain a stop string."""
    stop = rng.sample(["e", "a", " the", "The end", ".", "🐶"], 3)
    for result in llama.text_completion(texts(rng), **options(rng), stop=stop, details=True):
        check(not any(s in result["generation"] for s in stop), "an answer contains none of its stop strings")


def bad_inputs(llama: Llama, rng: Random) -> None:
    """Make calls with invalid arguments: each must raise a LlamaError."""
    bad_calls: list[Callable[[], object]] = [
        lambda: llama.generate([[]], 4),
        lambda: llama.generate([[1], [llama.tokenizer.n_words]], 4),
        lambda: llama.generate([[1] * (CONTEXT + 1)], 4),
        lambda: llama.generate([[1]], -1),
        lambda: llama.text_completion("a string"),  # type: ignore[arg-type]
        lambda: llama.text_completion([text(rng), "\ud800"]),
        lambda: llama.text_completion([text(rng)], temperature=-rng.random() - 0.01),
        lambda: llama.text_completion([text(rng)], top_p=1.01),
        lambda: llama.text_completion([text(rng)], seed=[1, 2]),
        lambda: llama.text_completion([text(rng)], stop=[""]),
        lambda: llama.chat_completion([[{"role": "assistant", "content": text(rng)}]]),
        lambda: llama.chat_completion_stream([{"role": "user"}]),  # type: ignore[typeddict-item]
        lambda: llama.score([text(rng)], []),
        lambda: llama.tokenizer.decode([-1]),
        lambda: Llama.build(HERE / "nothing", HERE / "nothing", CONTEXT, ROWS),
    ]
    rng.shuffle(bad_calls)
    for i, call in enumerate(bad_calls):
        try:
            call()
        except LlamaError:
            continue
        raise BrokenPromise(f"bad input {i} of {len(bad_calls)} was not refused")


def two_threads(llama: Llama, rng: Random) -> None:
    """Call the model from two threads: each call must be answered as if alone."""
    prompts = [texts(rng) for _ in range(2)]
    alone = [llama.text_completion(p, 0, max_gen_len=8, logprobs=True) for p in prompts]
    failures: list[str] = []

    def ask(i: int) -> None:
        try:
            answers = llama.text_completion(prompts[i], 0, max_gen_len=8, logprobs=True)
            check(
                all(answer["generation"] == want["generation"] for answer, want in zip(answers, alone[i], strict=True)),
                "the answers of two threads do not mix",
            )
        except Exception as e:
            failures.append(f"{type(e).__name__} in a thread: {e}")

    def ask_repeatedly(i: int) -> None:
        for _ in range(3):
            ask(i)

    threads = [threading.Thread(target=ask_repeatedly, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not failures, "; ".join(failures))


WORKLOADS: list[Any] = [
    text_batches, chat_batches, seeds, ids, streams_to_the_end, streams_left_early, streams_interrupted, turns, scores, stops,
    bad_inputs, two_threads,
]  # fmt: skip


def probe(llama: Llama) -> list:
    """Return the model's answers to fixed prompts, which must stay the same throughout the run."""
    prompts = [llama.tokenizer.encode(p, bos=True, eos=False) for p in ("Once upon a time", "[INST] hi [/INST]", "3 + 4 =")]
    greedy = llama.generate(prompts, 12, temperature=0, logprobs=True, echo=True)
    seeded = llama.generate(prompts * 2, 8, temperature=1.0, seed=list(range(6)), logprobs=True)
    torch.manual_seed(7)
    return [greedy, seeded, llama.generate(prompts, 8, temperature=1.0, top_p=0.8, logprobs=True)]


# --- the run ---


def memory() -> tuple[int, int]:
    """Return two sizes in bytes: the resident memory of this process, and how much of it is anonymous (not pages of a file)."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Rss"].split()[0]) * 1024, int(lines["Anonymous"].split()[0]) * 1024


Samples = list[tuple[float, int, int]]  # seconds since the start, bytes of resident memory, bytes of anonymous memory
Medians = dict[str, tuple[float, float]]


def medians(samples: Samples) -> Medians | None:
    """Return, for resident and anonymous memory, the medians of the first and the last tenth of samples after the warm-up.

    If a tenth has fewer than three samples, return None.
    """
    # The warm-up is counted in samples, not in seconds, because seconds also pass while the process is paused.
    after_warm_up = samples[len(samples) // WARM_UP :]
    tenth = len(after_warm_up) // 10
    if tenth < 3:
        return None
    first, last = after_warm_up[:tenth], after_warm_up[-tenth:]
    columns = {"resident": 1, "anonymous": 2}
    return {
        name: (statistics.median(s[i] for s in first), statistics.median(s[i] for s in last)) for name, i in columns.items()
    }


def soak(models: dict[str, Llama], workloads: Sequence[Workload], minutes: float, seed: int) -> dict[str, Any]:
    """Run rounds of requests for a number of minutes, at least one round, and return the results that --json stores.

    models: one model for each weight format, with the format as the key. The rounds alternate between the models.
    """
    n_requests: Counter[str] = Counter()
    samples: Samples = []
    expected = {name: probe(llama) for name, llama in models.items()}
    broken, current, start, rounds, seconds = None, "", time.monotonic(), 0, 0.0
    try:
        while not rounds or seconds < 60 * minutes:
            rng, name = Random(f"{seed} {rounds}"), list(models)[rounds % len(models)]
            for workload in rng.sample(workloads, len(workloads)):
                current = f"round {rounds}, {name}, {workload.__name__}"
                torch.manual_seed(rng.randrange(2**32))
                workload(models[name], rng)
                n_requests[workload.__name__] += 1
            current = f"round {rounds}, {name}, probe"
            check(probe(models[name]) == expected[name], "the probe gives the same answers as at the start")
            rounds, seconds = rounds + 1, round(time.monotonic() - start, 1)
            if not samples or seconds - samples[-1][0] >= 60 * minutes / MAX_SAMPLES:
                samples.append((seconds, *memory()))
                if sys.stderr.isatty():
                    progress = f"{seconds / 60:.1f} of {minutes:g} minutes, {rounds} rounds, {samples[-1][1] / 1e6:,.0f} MB"
                    print(f"\r{progress}", end="", file=sys.stderr)
    except KeyboardInterrupt:
        print("ended early", file=sys.stderr)
    except Exception:
        broken = f"{current}: {traceback.format_exc()}"
    growth = medians(samples)
    if not broken and growth and any(after > (1 + MAX_GROWTH) * before for before, after in growth.values()):
        broken = f"memory grows by more than {MAX_GROWTH:.0%}"
    return {
        "minutes": round(seconds / 60, 2), "rounds": rounds, "requests": dict(sorted(n_requests.items())), "broken": broken,
        "medians": growth, "seed": seed, "kinds": list(models), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": sys.version.split()[0], "samples": samples,
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    n = sum(results["requests"].values())
    lines = [f"{results['minutes']} minutes, {results['rounds']} rounds, {n} requests of {len(results['requests'])} types"]
    if not results["medians"]:
        lines.append("too few samples to check whether memory is flat: give more --minutes")
    for name, (before, after) in (results["medians"] or {}).items():
        a, b = before / 1e6, after / 1e6
        lines.append(f"{name:10} {a:,.1f} MB after the warm-up, {b:,.1f} MB at the end: {after / before - 1:+.2%}")
    lines.append(f"BROKEN: {results['broken']}" if results["broken"] else "every probe as at the start")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot memory over time. Grey marks the warm-up, and bands show 2% above the memory just after the warm-up."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    grey = "#808a94"  # readable on a white and on a black background
    pyplot.rcParams.update({"font.size": 9, "text.color": grey})
    figure, axes = pyplot.subplots(figsize=(8, 2.8))
    minutes = [s[0] / 60 for s in results["samples"]]
    warm_up_end = minutes[len(minutes) // WARM_UP]
    for i, (name, color) in enumerate((("resident", "#2f81f7"), ("anonymous", "#e0823d")), 1):
        axes.plot(minutes, [s[i] / 1e6 for s in results["samples"]], color=color, linewidth=1.2, label=name)
        if results["medians"]:
            after_warm_up = results["medians"][name][0] / 1e6
            axes.fill_between(
                [warm_up_end, minutes[-1]],
                after_warm_up,
                after_warm_up * (1 + MAX_GROWTH),
                color=color,
                alpha=0.25,
                linewidth=0,
            )
    axes.axvspan(0, warm_up_end, color=grey, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 1.1 * max(s[1] for s in results["samples"]) / 1e6)
    axes.set_xlim(0, minutes[-1])
    axes.tick_params(colors=grey, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("minutes (grey: warm-up; bands: up to 2% above the memory after it)", color=grey)
    axes.set_ylabel("MB", color=grey)
    axes.legend(loc="lower right", ncols=2, frameon=False, labelcolor=grey)
    figure.savefig(path, transparent=True, bbox_inches="tight", dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="length of the run; default: 120")
    parser.add_argument(
        "--formats", default="stored,int8,int4", help="formats of the weights, one model for each; default: all"
    )
    parser.add_argument("--ckpt_dir", help="default: the demo model")
    parser.add_argument("--tokenizer_path", help="default: tokenizer.model in the folder or its parent folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests; default: 0")
    parser.add_argument("--only", default="", help="send only these types of request, as in turns,scores")
    parser.add_argument("--without", default="", help="types of request to leave out")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="image file for a plot of the memory")
    a = parser.parse_args(argv)
    if a.plot:
        import matplotlib  # noqa: F401  # a missing matplotlib fails now rather than after two hours

    folder, tokenizer = resolve_model_paths(a.ckpt_dir, a.tokenizer_path)

    def build(weight_format: str) -> Llama:
        quantize = None if weight_format == "stored" else weight_format
        return Llama.build(folder, tokenizer, CONTEXT, ROWS, device="cpu", quantize=quantize)

    formats = a.formats.split(",")
    models = {weight_format: build(weight_format) for weight_format in formats}

    def rebuilt(llama: Llama, rng: Random) -> None:
        """Build a model again: the new model must give the same answers."""
        weight_format = rng.choice(formats)
        check(probe(build(weight_format)) == probe(models[weight_format]), "a model built again gives the same answers")

    # Only the demo model is small enough to be built again in every round.
    workloads = {workload.__name__: workload for workload in [*WORKLOADS, *([] if a.ckpt_dir else [rebuilt])]}
    only, without = (set(names.split(",")) - {""} for names in (a.only, a.without))
    if unknown := (only | without) - set(workloads):
        parser.error(f"unknown types of request: {', '.join(unknown)}; give some of {', '.join(workloads)}")
    chosen = [workload for name, workload in workloads.items() if name in (only or workloads) and name not in without]
    results = soak(models, chosen, a.minutes, a.seed)
    print(report(results))
    if a.json:
        a.json.write_text(json.dumps(results) + "\n")
    if a.plot:
        plot(results, a.plot)
    return 1 if results["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
