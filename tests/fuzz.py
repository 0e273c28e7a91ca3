"""Fuzz the library with hostile files and arguments.

This module contains the strategies of hypothesis that generate cases, the function `play` that runs a case, and the
command of `make fuzz`. A case is the name of a target, such as "tokenizer", and plain data. Every case must keep two promises:

- The case ends in a LlamaError or in a correct answer. If a damaged file loads, every tensor whose bytes are undamaged has
  its correct values; altered tensors load with the values in the file; a call that raises leaves later answers unchanged.
- No code in a file runs, and the case takes no more than 64 MB plus 20 times the size of its files, and 20 s of the CPU.

python -m tests.fuzz --minutes 30 runs random cases and then prints a table of the results. The cases run in a child process,
so that a crash of the interpreter is detected and its case is known. After a failure hypothesis shrinks the case, and the
command that repeats the case is printed. tests/test_fuzz.py uses the same strategies with a fixed random seed.
"""

import argparse
import collections
import json
import math
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from llama import LlamaError

from . import hostile
from .hostile import (
    FOLDERS,
    PARAMS,
    REPLACEMENTS,
    BrokenPromise,
    play_bytes,
    play_contents,
    play_header,
    play_params,
    temporary_folder,
)
from .hostile_calls import TRICK_OBJECTS, CallersError, play_call, play_tokenizer
from .hostile_zips import FRAGMENTS, ZIPS, canary, play_pickle, play_zip

set_hypothesis_home_dir(tempfile.gettempdir() + "/llama-hypothesis")  # keeps the files of hypothesis out of the repository
MAX_ADDRESS_SPACE = 16 << 30  # 16 GiB, so that a decompression bomb cannot exhaust the machine's memory
STUCK = 120  # seconds after which a case that has not ended is stopped

# --- cases -------------------------------------------------------------------------------------------------------------

numbers = st.integers(0, 1 << 20)
odd_bytes = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.sampled_from(
        [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\0\0\0\x80", b"PK\5\6", b"PK\1\2", b"PK\3\4", b"PK\6\6", b"]" * 64]
    ),
)
places = st.tuples(st.sampled_from(["any", "end", "frame", "frame"]), numbers)
edit = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(0, 7)),
    st.tuples(st.just("set"), places, odd_bytes),
    st.tuples(st.just("cut"), places),
    st.tuples(st.just("insert"), places, odd_bytes),
    st.tuples(st.just("delete"), places, st.integers(1, 300)),
    st.tuples(st.just("copy"), places, numbers, st.integers(1, 5000)),
    st.tuples(st.just("swap"), places, st.integers(1, 5000)),
)
edits = st.one_of(st.lists(edit, min_size=1, max_size=1), st.lists(edit, min_size=1, max_size=4))
texts = st.text(st.characters(exclude_categories=[]), max_size=20)
names = st.one_of(
    texts,
    st.sampled_from(["tok_embeddings.weight", "layers.1.attention.wq.weight", "layers.-1.x", "layers.", "rope.freqs", ""]),
    st.integers(-5, 5), st.none(), st.floats(), st.booleans(),
)  # fmt: skip
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts,
    st.sampled_from([2**31, 2**63, 10**30, -1, 0, 1, 2, 4, 16, 32, 64, 2**20, 2**31 - 1, 1e308, 1e-300]),
)  # fmt: skip
json_like = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
params = st.one_of(
    st.dictionaries(st.sampled_from([*PARAMS, "rope_theta", "ffn_dim_multiplier", "x"]), scalar, min_size=1, max_size=3),
    json_like,
    st.binary(max_size=40),
    st.builds(lambda s, n: s * n, st.sampled_from([b"[", b'{"dim":', b"9", b" ", b'{"a":[', b'"']), st.integers(1, 200_000)),
)  # fmt: skip

trick_objects = st.tuples(st.just("!"), st.sampled_from(sorted(TRICK_OBJECTS)))
tags = st.sampled_from(["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[IN", "ST]", "<s>", "</s>", "\0", "\ud800", " ", "hello"])
content = st.one_of(texts, st.lists(tags, max_size=4).map("".join), tags, trick_objects, scalar)
role = st.one_of(st.sampled_from(["system", "user", "assistant"]), trick_objects, scalar)
message = st.one_of(st.fixed_dictionaries({"role": role, "content": content}), trick_objects, json_like)
valid_dialog = st.lists(content, min_size=1, max_size=5).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
dialog = st.one_of(valid_dialog, st.lists(message, max_size=4), trick_objects, json_like)
tokens = st.one_of(
    st.lists(st.one_of(st.integers(0, 383), st.integers(0, 383), scalar, trick_objects), max_size=40), trick_objects, json_like
)
option = st.one_of(scalar, trick_objects, st.floats(0, 1), st.lists(scalar, max_size=3), content)
options = st.dictionaries(
    st.sampled_from(["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_gen_len", "logprobs",
                     "echo", "logit_bias", "top_logprobs"]),
    option, max_size=2,
)  # fmt: skip


def lists_of(element: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(element, max_size=3), trick_objects, json_like)


calls = {
    "encode": st.one_of(content, json_like), "decode": tokens, "generate": lists_of(tokens),
    "text_completion": lists_of(content), "text_completion_stream": content,
    "chat_completion": lists_of(dialog), "chat_completion_stream": dialog,
    "score": st.tuples(lists_of(content), lists_of(content)),
}  # fmt: skip
CASES = {
    "bytes": st.tuples(st.sampled_from(sorted(FOLDERS)), st.integers(0, 3), edits),
    "tokenizer": st.tuples(st.booleans(), edits),
    "contents": st.tuples(
        st.sampled_from([1, 2]),
        st.lists(
            st.tuples(numbers, st.sampled_from([*REPLACEMENTS, "drop", "rename", "add", "exchange", "share"]), numbers, names),
            max_size=3,
        ),
        st.integers(0, 1),
    ),
    "pickle": st.tuples(
        st.lists(st.sampled_from(sorted(FRAGMENTS)), max_size=5), st.one_of(st.just([]), edits), st.booleans()
    ),
    "zip": st.tuples(
        st.sampled_from(ZIPS), numbers, st.one_of(st.just([]), edits),
    ),
    "header": st.tuples(
        st.sampled_from(["int8", "int4"]),
        st.lists(
            st.tuples(numbers, st.sampled_from(["name", "entry", "dtype", "shape", "data_offsets", "version"]),
                      st.one_of(json_like, st.sampled_from(["BF16", "F32", "I8"]), st.lists(scalar, min_size=2, max_size=2))),
            min_size=1, max_size=2,
        ),
    ),
    "params": st.tuples(params),
    "call": st.one_of(*(st.tuples(st.just(name), argument, options) for name, argument in calls.items())),
}  # fmt: skip


# --- running a case ----------------------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[..., None]] = {
    "bytes": play_bytes, "tokenizer": play_tokenizer, "contents": play_contents, "pickle": play_pickle, "zip": play_zip,
    "header": play_header, "params": play_params, "call": play_call,
}  # fmt: skip
MAX_BYTES, MAX_SECONDS = 64 << 20, 20.0


def play(target: str, *arguments: Any) -> str:
    """Run a case; return "answered", "caller's error" or the name of the LlamaError. Raise if the case breaks a promise."""
    hostile.sound_answer()  # builds and caches the undamaged model, so that its time and memory are not counted
    if target == "bytes":
        hostile.sound_tensors(arguments[0]), hostile.sound_answer(arguments[0])
    first = next(hostile.cases)
    start, before = time.process_time(), _peak_memory(reset=True)
    try:
        TARGETS[target](*arguments)
        outcome = "answered"
    except LlamaError as e:
        outcome = type(e).__name__
        if len(str(e)) > 2000:
            raise BrokenPromise(f"a message of {len(str(e))} characters") from e
    except CallersError:
        outcome = "caller's error"
    finally:
        seconds, grown = time.process_time() - start, _peak_memory() - before
        folders = [temporary_folder() / f"case-{i}" for i in range(first, next(hostile.cases))]
        size = sum(file.stat().st_size for folder in folders for file in folder.glob("*"))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    if canary().exists():
        raise BrokenPromise("code in a file was run")
    text = 1_000_000 * repr(arguments).count("'huge'")  # characters in huge texts; SentencePiece takes 55 bytes per character
    if grown > MAX_BYTES + 20 * size + 64 * text or seconds > MAX_SECONDS:
        raise BrokenPromise(f"the case took {grown / 1e6:.0f} MB and {seconds:.1f} s, for files of {size / 1e6:.1f} MB")
    return outcome


def _peak_memory(reset: bool = False) -> int:
    """Return the peak resident memory in bytes since the last call with `reset`; 0 on systems without /proc."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- the command ---------------------------------------------------------------------------------------------------------


def fuzz(minutes: float, journal: Path) -> None:
    """Run 100 cases of each target in turn, until the time is up. Write each case to the journal before it runs."""
    until, outcomes = time.monotonic() + 60 * minutes, collections.Counter[str]()
    warnings.simplefilter("ignore")  # torch warns about deprecated tensor types in the hostile files
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))

    def run_cases(target: str, cases: st.SearchStrategy[Any]) -> None:
        @seed(random.getrandbits(64))
        @settings(max_examples=100, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                  phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False)  # fmt: skip
        @given(cases)
        def run_case(case: Any) -> None:
            (journal / "case").write_text(repr((target, *case)), "utf-8", "surrogatepass")
            outcomes[f"{target} {play(target, *case)}"] += 1

        try:
            run_case()
        finally:
            (journal / "outcomes").write_text(json.dumps(outcomes))

    while time.monotonic() < until:
        for target, cases in CASES.items():
            run_cases(target, cases)


def watch(minutes: float) -> int:
    """Run `fuzz` in a child process, print the table of results and, after a failure, the last case; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        journal, start = Path(folder), time.monotonic()
        command = [sys.executable, "-m", "tests.fuzz", "--minutes", str(minutes), "--journal", folder]
        env = os.environ | {"TMPDIR": folder}
        child = subprocess.Popen(command, env=env)
        last_case, seconds = "", 0
        while child.poll() is None:
            time.sleep(1)
            case = (journal / "case").read_text("utf-8", "surrogatepass") if (journal / "case").exists() else ""
            # Count loops of one second: a clock would also count the time in which the machine is suspended.
            last_case, seconds = case, seconds + 1 if case == last_case else 0
            if seconds == STUCK:
                print(f"the case did not end within {STUCK} s")
                child.send_signal(signal.SIGABRT)
        print_table(
            json.loads((journal / "outcomes").read_text()) if (journal / "outcomes").exists() else {}, time.monotonic() - start
        )
        if child.returncode:
            case = (journal / "case").read_text("utf-8", "surrogatepass")
            print(f"FAILED (exit status {child.returncode}); the last case:")
            print(f".venv/bin/python -m tests.fuzz --case {shlex.quote(case)}")
        return child.returncode


def print_table(outcomes: dict[str, int], seconds: float) -> None:
    names = sorted({key.split(" ", 1)[1] for key in outcomes})
    print(f"{'':12}{'cases':>10}" + "".join(f"{name:>19}" for name in names))
    rows = {target: [outcomes.get(f"{target} {name}", 0) for name in names] for target in CASES}
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for target, row in rows.items():
        print(f"{target:12}{sum(row):>10,}" + "".join(f"{n:>19,}" for n in row))
    print(f"in {seconds / 60:.1f} minutes")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--case", help="run only this case, as printed after a failure")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(play(*eval(args.case, {"nan": math.nan, "inf": math.inf, "__builtins__": {}})))
        return 0
    if args.journal:
        fuzz(args.minutes, args.journal)
        return 0
    return watch(args.minutes)


if __name__ == "__main__":
    sys.exit(main())
