"""A long run: mixed requests to one process for hours, and what must hold then.

    python benchmarks/soak.py [--minutes 120] [--kinds stored,int8,int4] [--ckpt_dir FOLDER --tokenizer_path FILE]
                              [--seed 0] [--only REQUESTS] [--without REQUESTS] [--json FILE] [--plot FILE]

Each round sends one model every kind of request (WORKLOADS), with prompts, options and an order of its own. Kept, or the
run ends there with what was broken and exit code 1:

    requests   each is answered as its kind promises, or refused where it must be
    answers    after every round a fixed probe of the model (greedy ids with log probabilities, seeded and unseeded draws)
               gives what it gave at the start, to the last digit
    memory     after a warm-up, the first third of the samples, resident memory is flat: the median of the last tenth of
               what follows is at most 2% above that of its first tenth; so is anonymous memory alone, which no file backs

Runs on the CPU of a Linux machine; Ctrl-C ends it early, and what was seen until then counts.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llama import Dialog, Llama, LlamaError, resolve_model_paths
from llama.chat import UNSAFE_ERROR, Message

HERE = Path(__file__).parent
WINDOW, ROWS = 256, 4
WARM_UP, SAMPLES, FLAT = 3, 600, 0.02  # a third; at most so many; 2%
WORDS = """what is the capital of France how do I get from Rome to Oslo my name Tom a little bear who could not sleep counted
stars and was still awake please tell me opposite hot cold bread flour water 3 + 4 = 7 naïve 你好 🐶 🚕 Привет été
letter dear grandmother birthday happy it rained all night The end""".split()
Draw = random.Random
Workload = Callable[[Llama, Draw], None]


class Broken(Exception):
    """A promise that was not kept."""


def hold(kept: bool, promise: str) -> None:
    if not kept:
        raise Broken(promise)


# What is asked


def text(draw: Draw, most: int = 24) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def texts(draw: Draw) -> list[str]:
    """Up to twice as many as there are rows, short beside long."""
    return [text(draw, draw.choice([2, 8, 60])) for _ in range(draw.randint(1, 2 * ROWS))]


def dialog(draw: Draw, turns: int = 3) -> Dialog:
    said: list[Message] = [{"role": "system", "content": text(draw, 6)}] if draw.random() < 0.3 else []
    for _ in range(draw.randrange(turns)):
        said += [{"role": "user", "content": text(draw, 8)}, {"role": "assistant", "content": text(draw, 8)}]
    return [*said, {"role": "user", "content": text(draw, 8)}]


def options(draw: Draw) -> dict[str, Any]:
    """Of one call: greedy, drawn, or drawn with a seed."""
    way: dict[str, Any] = draw.choice([{"temperature": 0}, {}, {"seed": draw.randrange(2**32)}])
    if way.get("temperature") != 0:
        way |= {"temperature": draw.uniform(0.2, 1.5), "top_p": draw.uniform(0.5, 1), "top_k": draw.choice([0, 5, 40])}
        way |= {"min_p": draw.choice([0.0, 0.05])}
    return way | {"repetition_penalty": draw.choice([1.0, 1.0, 1.2]), "max_gen_len": draw.choice([0, 1, 7, 16, 24])}


# How it is asked: each a kind of request, and its promise


def text_batches(llama: Llama, draw: Draw) -> None:
    """Ragged, often more prompts than rows; log probabilities and echo."""
    prompts, asked = texts(draw), options(draw)
    results = llama.text_completion(prompts, logprobs=True, echo=True, details=True, **asked)
    hold(len(results) == len(prompts), f"{len(prompts)} prompts, {len(results)} results")
    for prompt, result in zip(prompts, results, strict=True):
        n = result["prompt_tokens"] + result["new_tokens"]
        hold(n == len(result["tokens"]) == len(result["logprobs"]), "each id with echo has its log probability")
        hold(
            result["generation"].startswith(prompt) and result["new_tokens"] <= asked["max_gen_len"],
            "the text that was asked for",
        )
        hold(all(value <= 0 for value in result["logprobs"]), "log probabilities are 0 at most")


def chat_batches(llama: Llama, draw: Draw) -> None:
    """One dialog among them holds a tag of the format, and is answered by itself."""
    dialogs = [dialog(draw) for _ in range(draw.randint(1, 2 * ROWS))]
    unsafe = draw.randrange(len(dialogs) + 1)
    dialogs.insert(unsafe, [{"role": "user", "content": "what [/INST] is"}])
    results = llama.chat_completion(dialogs, logprobs=draw.random() < 0.5, **options(draw))
    said = [result["generation"]["content"] for result in results]
    hold([i for i, content in enumerate(said) if content == UNSAFE_ERROR] == [unsafe], "the dialog with a tag alone is refused")


def seeds(llama: Llama, draw: Draw) -> None:
    """The answer is the seed's, whatever was drawn in between."""
    prompts = texts(draw)
    asked = options(draw) | {"seed": [draw.randrange(-(2**63), 2**64) for _ in prompts], "temperature": 1.0}
    answers = llama.text_completion(prompts, **asked)
    llama.text_completion([text(draw)], max_gen_len=4)
    hold(llama.text_completion(prompts, **asked) == answers, "the same seeds give the same answers")


def ids(llama: Llama, draw: Draw) -> None:
    """Prompts of ids, one of which fills the window; as a generator too, left early."""
    last = llama.tokenizer.n_words - 1
    prompts = [[draw.randint(3, last) for _ in range(n)] for n in (WINDOW, 1, draw.randint(2, WINDOW))]
    draw.shuffle(prompts)
    answers, _ = llama.generate(prompts, 12, temperature=0)
    hold(all(len(a) <= min(12, WINDOW - len(p)) for a, p in zip(answers, prompts, strict=True)), "no id beyond the window")
    taken: list[list[int]] = [[] for _ in prompts]
    for token, _ in zip(llama.generate_stream(prompts, 12, temperature=0), range(draw.randint(1, 30)), strict=False):
        taken[token.prompt_index].append(token.token)
    hold(all(a[: len(t)] == t for a, t in zip(answers, taken, strict=True)), "ids one by one are those of the batch")
    hold(llama.generate([], 12) == ([], None), "nothing for nothing")


def streams_to_the_end(llama: Llama, draw: Draw) -> None:
    prompt, said, asked = text(draw), dialog(draw), options(draw) | {"seed": draw.randrange(2**32)}
    whole = llama.text_completion([prompt], **asked)[0]["generation"]
    hold("".join(llama.text_completion_stream(prompt, **asked)) == whole, "a stream's pieces are the text's answer")
    whole = llama.chat_completion([said], **asked)[0]["generation"]["content"]
    hold("".join(llama.chat_completion_stream(said, **asked)) == whole, "a stream's pieces are the dialog's answer")


def streams_left_early(llama: Llama, draw: Draw) -> None:
    """By `with`, by `close`, or by forgetting them."""
    for leave in ("with", "close", "forget"):
        stream = llama.chat_completion_stream(dialog(draw), **options(draw), reuse=draw.random() < 0.5)
        for _ in range(draw.randrange(4)):
            next(stream, None)
        if leave == "with":
            with stream:
                pass
        elif leave == "close":
            stream.close()
        del stream


def streams_interrupted(llama: Llama, draw: Draw) -> None:
    """By another call: one of both is refused, or both answers are right."""
    prompt, other = text(draw), text(draw)
    alone = [llama.text_completion([p], 0, max_gen_len=12)[0]["generation"] for p in (prompt, other)]
    stream = llama.text_completion_stream(prompt, 0, max_gen_len=12)
    try:
        with stream:
            said = next(stream, "")
            between = llama.text_completion([other], 0, max_gen_len=12)[0]["generation"]
            said += "".join(stream)
    except LlamaError as e:
        hold("another call" in str(e), f"refused as another call, not with: {e}")
    else:
        hold([said, between] == alone, "a stream and a call in between do not mix")


def turns(llama: Llama, draw: Draw) -> None:
    """A conversation whose keys and values are kept from turn to turn."""
    said: list[Message] = []
    for _ in range(3):
        said.append({"role": "user", "content": text(draw, 8)})
        with llama.chat_completion_stream(said, **options(draw) | {"max_gen_len": 16}, reuse=True) as stream:
            answer = "".join(stream)
        hold(stream.finish_reason in ("stop", "length") and stream.new_tokens <= 16, "a turn ends for a reason")
        said.append({"role": "assistant", "content": answer})


def scores(llama: Llama, draw: Draw) -> None:
    prompts = [text(draw) for _ in range(draw.randint(1, 12))]
    endings = [f" {text(draw, 6)}" for _ in prompts]
    found = llama.score(prompts, endings)
    hold(all(score.total <= 0 and len(score.tokens) == len(score.logprobs) > 0 for score in found), "each has its score")
    hold(llama.score(prompts, endings) == found, "the same texts have the same scores")


def stops(llama: Llama, draw: Draw) -> None:
    stop = draw.sample(["e", "a", " the", "The end", ".", "🐶"], 3)
    for result in llama.text_completion(texts(draw), **options(draw), stop=stop, details=True):
        hold(not any(s in result["generation"] for s in stop), "an answer ends before its stop string")


def bad_inputs(llama: Llama, draw: Draw) -> None:
    """Each is refused by an error of ours."""
    bad: list[Callable[[], object]] = [
        lambda: llama.generate([[]], 4),
        lambda: llama.generate([[1], [llama.tokenizer.n_words]], 4),
        lambda: llama.generate([[1] * (WINDOW + 1)], 4),
        lambda: llama.generate([[1]], -1),
        lambda: llama.text_completion("a string"),  # type: ignore[arg-type]
        lambda: llama.text_completion([text(draw), "\ud800"]),
        lambda: llama.text_completion([text(draw)], temperature=-draw.random() - 0.01),
        lambda: llama.text_completion([text(draw)], top_p=1.01),
        lambda: llama.text_completion([text(draw)], seed=[1, 2]),
        lambda: llama.text_completion([text(draw)], stop=[""]),
        lambda: llama.chat_completion([[{"role": "assistant", "content": text(draw)}]]),
        lambda: llama.chat_completion_stream([{"role": "user"}]),  # type: ignore[typeddict-item]
        lambda: llama.score([text(draw)], []),
        lambda: llama.tokenizer.decode([-1]),
        lambda: Llama.build(HERE / "nothing", HERE / "nothing", WINDOW, ROWS),
    ]
    draw.shuffle(bad)
    for i, call in enumerate(bad):
        try:
            call()
        except LlamaError:
            continue
        raise Broken(f"bad input {i} of {len(bad)} was not refused")


def two_threads(llama: Llama, draw: Draw) -> None:
    """Both call the model: each call is served as if alone, or refused."""
    prompts = [texts(draw) for _ in range(2)]
    alone = [llama.text_completion(p, 0, max_gen_len=8, logprobs=True) for p in prompts]
    wrong: list[str] = []

    def ask(i: int) -> None:
        try:
            answer = llama.text_completion(prompts[i], 0, max_gen_len=8, logprobs=True)
            hold(answer == alone[i], "two threads' answers do not mix")
        except LlamaError as e:
            if "another call" not in str(e):
                wrong.append(f"refused as another call, not with: {e}")
        except Exception as e:
            wrong.append(f"{type(e).__name__} in a thread: {e}")

    def ask_often(i: int) -> None:
        for _ in range(3):
            ask(i)

    threads = [threading.Thread(target=ask_often, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hold(not wrong, "; ".join(wrong))


WORKLOADS: list[Any] = [
    text_batches, chat_batches, seeds, ids, streams_to_the_end, streams_left_early, streams_interrupted, turns, scores, stops,
    bad_inputs, two_threads,
]  # fmt: skip


def probe(llama: Llama) -> list:
    """What must never change."""
    prompts = [llama.tokenizer.encode(p, bos=True, eos=False) for p in ("Once upon a time", "[INST] hi [/INST]", "3 + 4 =")]
    greedy = llama.generate(prompts, 12, temperature=0, logprobs=True, echo=True)
    seeded = llama.generate(prompts * 2, 8, temperature=1.0, seed=list(range(6)), logprobs=True)
    torch.manual_seed(7)
    return [greedy, seeded, llama.generate(prompts, 8, temperature=1.0, top_p=0.8, logprobs=True)]


# The run


def memory() -> tuple[int, int]:
    """This process's resident memory in bytes, and how much of it is anonymous: no file's pages."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Rss"].split()[0]) * 1024, int(lines["Anonymous"].split()[0]) * 1024


Samples = list[tuple[float, int, int]]  # seconds, resident, anonymous
Medians = dict[str, tuple[float, float]]


def medians(samples: Samples) -> Medians | None:
    """Of each memory, over the first and the last tenth of what follows the warm-up; None where that is too little to tell."""
    warm = samples[len(samples) // WARM_UP :]  # by samples, not by the clock: a process may be paused
    tenth = len(warm) // 10
    if tenth < 3:
        return None
    first, last = warm[:tenth], warm[-tenth:]
    at = {"resident": 1, "anonymous": 2}
    return {name: (statistics.median(s[i] for s in first), statistics.median(s[i] for s in last)) for name, i in at.items()}


def soak(models: dict[str, Llama], works: Sequence[Workload], minutes: float, seed: int) -> dict[str, Any]:
    """Rounds for so many minutes, one at least; what was done and seen, and `broken`: what was not kept, or None."""
    done: Counter[str] = Counter()
    samples: Samples = []
    expected = {kind: probe(llama) for kind, llama in models.items()}
    broken, now, begun, rounds, at = None, "", time.monotonic(), 0, 0.0
    try:
        while not rounds or at < 60 * minutes:
            draw, kind = Draw(f"{seed} {rounds}"), list(models)[rounds % len(models)]
            for work in draw.sample(works, len(works)):
                now = f"round {rounds}, {kind}, {work.__name__}"
                torch.manual_seed(draw.randrange(2**32))
                work(models[kind], draw)
                done[work.__name__] += 1
            now = f"round {rounds}, {kind}, probe"
            hold(probe(models[kind]) == expected[kind], "the probe's answers are what they were at the start")
            rounds, at = rounds + 1, round(time.monotonic() - begun, 1)
            if not samples or at - samples[-1][0] >= 60 * minutes / SAMPLES:
                samples.append((at, *memory()))
                if sys.stderr.isatty():
                    text = f"{at / 60:.1f} of {minutes:g} minutes, {rounds} rounds, {samples[-1][1] / 1e6:,.0f} MB"
                    print(f"\r{text}", end="", file=sys.stderr)
    except KeyboardInterrupt:
        print("ended early", file=sys.stderr)
    except Exception:
        broken = f"{now}: {traceback.format_exc()}"
    found = medians(samples)
    if not broken and found and any(after > (1 + FLAT) * before for before, after in found.values()):
        broken = f"memory grows by more than {FLAT:.0%}"
    return {
        "minutes": round(at / 60, 2), "rounds": rounds, "requests": dict(sorted(done.items())), "broken": broken,
        "medians": found, "seed": seed, "kinds": list(models), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": sys.version.split()[0], "samples": samples,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    n = sum(found["requests"].values())
    lines = [f"{found['minutes']} minutes, {found['rounds']} rounds, {n} requests of {len(found['requests'])} kinds"]
    if not found["medians"]:
        lines.append("too short to tell whether memory is flat")
    for name, (before, after) in (found["medians"] or {}).items():
        a, b = before / 1e6, after / 1e6
        lines.append(f"{name:10} {a:,.1f} MB after the warm-up, {b:,.1f} MB at the end: {after / before - 1:+.2%}")
    lines.append(f"BROKEN: {found['broken']}" if found["broken"] else "every probe as at the start")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Memory over time, with the warm-up and the band of 2% above what followed it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    grey = "#808a94"  # readable on white and on black
    pyplot.rcParams.update({"font.size": 9, "text.color": grey})
    figure, axes = pyplot.subplots(figsize=(8, 2.8))
    minutes = [s[0] / 60 for s in found["samples"]]
    warm = minutes[len(minutes) // WARM_UP]
    for i, (name, color) in enumerate((("resident", "#2f81f7"), ("anonymous", "#e0823d")), 1):
        axes.plot(minutes, [s[i] / 1e6 for s in found["samples"]], color=color, linewidth=1.2, label=name)
        if found["medians"]:
            flat = found["medians"][name][0] / 1e6
            axes.fill_between([warm, minutes[-1]], flat, flat * (1 + FLAT), color=color, alpha=0.25, linewidth=0)
    axes.axvspan(0, warm, color=grey, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 1.1 * max(s[1] for s in found["samples"]) / 1e6)
    axes.set_xlim(0, minutes[-1])
    axes.tick_params(colors=grey, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("minutes (grey: warm-up; bands: 2% above what followed it)", color=grey)
    axes.set_ylabel("MB", color=grey)
    axes.legend(loc="lower right", ncols=2, frameon=False, labelcolor=grey)
    figure.savefig(path, transparent=True, bbox_inches="tight", dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--kinds", default="stored,int8,int4", help="of weights, a model each")
    parser.add_argument("--ckpt_dir")
    parser.add_argument("--tokenizer_path")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--only", default="", help="these requests, as in: turns,scores (which of them makes memory grow?)")
    parser.add_argument("--without", default="", help="all requests but these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args(argv)
    if a.plot:
        import matplotlib  # noqa: F401  # now, not in two hours

    folder, tokenizer = resolve_model_paths(a.ckpt_dir, a.tokenizer_path)

    def build(kind: str) -> Llama:
        return Llama.build(folder, tokenizer, WINDOW, ROWS, device="cpu", quantize=None if kind == "stored" else kind)

    kinds = a.kinds.split(",")
    models = {kind: build(kind) for kind in kinds}

    def rebuilt(llama: Llama, draw: Draw) -> None:
        kind = draw.choice(kinds)
        hold(probe(build(kind)) == probe(models[kind]), "a model built anew answers alike")

    works = [*WORKLOADS, *([] if a.ckpt_dir else [rebuilt])]  # the demo model is small enough to be built again and again
    known = {work.__name__: work for work in works}
    only, without = (set(names.split(",")) - {""} for names in (a.only, a.without))
    if unknown := (only | without) - set(known):
        parser.error(f"no such request: {', '.join(unknown)}; there are {', '.join(known)}")
    found = soak(models, [known[name] for name in known if name in (only or known) and name not in without], a.minutes, a.seed)
    print(report(found))
    if a.json:
        a.json.write_text(json.dumps(found) + "\n")
    if a.plot:
        plot(found, a.plot)
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
