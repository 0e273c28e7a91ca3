"""Hostile input: strategies, what must come of each case, and `make fuzz`.

A case is a target's name and plain data, which `play` carries out. What is promised of each:

- It ends in a LlamaError, or in a right answer: if a damaged file loads, every tensor whose bytes are as they were has
  its right numbers; altered contents load as what they say; a refused call leaves the next one's answer as it was.
- No code in a file is run, and neither memory (64 MB, and 20 times the files) nor time (20 s of the CPU) is lost over it.

python -m tests.fuzz --minutes 30 tries cases at random, and ends with a table of what came of them.
It works in a child process, so that a crash of the interpreter is found, and named with its case. On a failure hypothesis
looks for the smallest like it, and the command that plays it again is printed. tests/test_fuzz.py has the same strategies,
but the same cases each time.
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
from .hostile import FOLDERS, OTHERS, PARAMS, Wrong, home, play_bytes, play_contents, play_header, play_params
from .hostile_calls import LIES, Raises, play_call, play_tokenizer
from .hostile_zips import FRAGMENTS, ZIPS, canary, play_pickle, play_zip

set_hypothesis_home_dir(tempfile.gettempdir() + "/llama-hypothesis")  # nothing is left in the tree
MOST_ADDRESSES = 16 << 30  # bytes: a bomb ends the case, not the machine
STUCK = 120  # seconds of no case

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
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts,
    st.sampled_from([2**31, 2**63, 10**30, -1, 0, 1, 2, 4, 16, 32, 64, 2**20, 2**31 - 1, 1e308, 1e-300]),
)  # fmt: skip
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
params = st.one_of(
    st.dictionaries(st.sampled_from([*PARAMS, "rope_theta", "ffn_dim_multiplier", "x"]), plain, min_size=1, max_size=3),
    anything,
    st.binary(max_size=40),
    st.builds(lambda s, n: s * n, st.sampled_from([b"[", b'{"dim":', b"9", b" ", b'{"a":[', b'"']), st.integers(1, 200_000)),
)  # fmt: skip

lies = st.tuples(st.just("!"), st.sampled_from(sorted(LIES)))
tags = st.sampled_from(["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[IN", "ST]", "<s>", "</s>", "\0", "\ud800", " ", "hello"])
content = st.one_of(texts, st.lists(tags, max_size=4).map("".join), tags, lies, plain)
role = st.one_of(st.sampled_from(["system", "user", "assistant"]), lies, plain)
message = st.one_of(st.fixed_dictionaries({"role": role, "content": content}), lies, anything)
sound_dialog = st.lists(content, min_size=1, max_size=5).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)
dialog = st.one_of(sound_dialog, st.lists(message, max_size=4), lies, anything)
ids = st.one_of(st.lists(st.one_of(st.integers(0, 383), st.integers(0, 383), plain, lies), max_size=40), lies, anything)
option = st.one_of(plain, lies, st.floats(0, 1), st.lists(plain, max_size=3), content)
options = st.dictionaries(
    st.sampled_from(["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_gen_len", "logprobs",
                     "echo"]),
    option, max_size=2,
)  # fmt: skip


def several(one: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(one, max_size=3), lies, anything)


calls = {
    "encode": st.one_of(content, anything), "decode": ids, "generate": several(ids), "text_completion": several(content),
    "chat_completion": several(dialog), "text_completion_stream": content, "chat_completion_stream": dialog,
    "score": st.tuples(several(content), several(content)),
}  # fmt: skip
CASES = {
    "bytes": st.tuples(st.sampled_from(sorted(FOLDERS)), st.integers(0, 3), edits),
    "tokenizer": st.tuples(st.booleans(), edits),
    "contents": st.tuples(
        st.sampled_from([1, 2]),
        st.lists(
            st.tuples(numbers, st.sampled_from([*OTHERS, "drop", "rename", "add", "exchange", "share"]), numbers, names),
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
                      st.one_of(anything, st.sampled_from(["BF16", "F32", "I8"]), st.lists(plain, min_size=2, max_size=2))),
            min_size=1, max_size=2,
        ),
    ),
    "params": st.tuples(params),
    "call": st.one_of(*(st.tuples(st.just(name), argument, options) for name, argument in calls.items())),
}  # fmt: skip


# --- playing -----------------------------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[..., None]] = {
    "bytes": play_bytes, "tokenizer": play_tokenizer, "contents": play_contents, "pickle": play_pickle, "zip": play_zip,
    "header": play_header, "params": play_params, "call": play_call,
}  # fmt: skip
MOST_BYTES, MOST_SECONDS = 64 << 20, 20.0


def play(target: str, *arguments: Any) -> str:
    """How the case ended: "answered", or the name of one of our errors."""
    hostile.sound_answer()  # what is made once counts for no case
    if target == "bytes":
        hostile.sound_tensors(arguments[0]), hostile.sound_answer(arguments[0])
    first = next(hostile.cases)
    begun, before = time.process_time(), _peak(anew=True)
    try:
        TARGETS[target](*arguments)
        ended = "answered"
    except LlamaError as e:
        ended = type(e).__name__
        if len(str(e)) > 2000:
            raise Wrong(f"a message of {len(str(e))} characters") from e
    except Raises:
        ended = "the caller's own"
    finally:
        seconds, grown = time.process_time() - begun, _peak() - before
        folders = [home() / f"case-{i}" for i in range(first, next(hostile.cases))]
        size = sum(file.stat().st_size for folder in folders for file in folder.glob("*"))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    if canary().exists():
        raise Wrong("code was run")
    text = 1_000_000 * repr(arguments).count("'huge'")  # characters, of which SentencePiece takes 55 bytes each
    if grown > MOST_BYTES + 20 * size + 64 * text or seconds > MOST_SECONDS:
        raise Wrong(f"it took {grown / 1e6:.0f} MB and {seconds:.1f} s, for files of {size / 1e6:.1f} MB")
    return ended


def _peak(anew: bool = False) -> int:
    """Most memory that was resident, since it was last asked for `anew`; 0 where the system does not tell."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- for as long as one likes ------------------------------------------------------------------------------------------


def fuzz(minutes: float, journal: Path) -> None:
    """Rounds of cases of each target; each is written down before it is played, and how it ended after."""
    until, ended = time.monotonic() + 60 * minutes, collections.Counter[str]()
    warnings.simplefilter("ignore")  # torch's, as it makes what it will not make for long
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))

    def tried(target: str, cases: st.SearchStrategy[Any]) -> None:
        @seed(random.getrandbits(64))
        @settings(max_examples=100, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                  phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False)  # fmt: skip
        @given(cases)
        def one(case: Any) -> None:
            (journal / "case").write_text(repr((target, *case)), "utf-8", "surrogatepass")
            ended[f"{target} {play(target, *case)}"] += 1

        try:
            one()
        finally:
            (journal / "ended").write_text(json.dumps(ended))

    while time.monotonic() < until:
        for target, cases in CASES.items():
            tried(target, cases)


def watch(minutes: float) -> int:
    """Run `fuzz` in a child; its exit status, the table, and the case that it ended with if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        journal, begun = Path(folder), time.monotonic()
        command = [sys.executable, "-m", "tests.fuzz", "--minutes", str(minutes), "--journal", folder]
        env = os.environ | {"TMPDIR": folder}
        child = subprocess.Popen(command, env=env)
        seen, seconds = "", 0
        while child.poll() is None:
            time.sleep(1)
            now = (journal / "case").read_text("utf-8", "surrogatepass") if (journal / "case").exists() else ""
            seen, seconds = now, seconds + 1 if now == seen else 0  # counted, as the machine may sleep
            if seconds == STUCK:
                print(f"no end within {STUCK} s")
                child.send_signal(signal.SIGABRT)
        show(json.loads((journal / "ended").read_text()) if (journal / "ended").exists() else {}, time.monotonic() - begun)
        if child.returncode:
            case = (journal / "case").read_text("utf-8", "surrogatepass")
            print(f"FAILED (exit status {child.returncode}); the last case:")
            print(f".venv/bin/python -m tests.fuzz --case {shlex.quote(case)}")
        return child.returncode


def show(ended: dict[str, int], seconds: float) -> None:
    ways = sorted({way for key in ended for way in [key.split(" ", 1)[1]]})
    print(f"{'':12}{'cases':>10}" + "".join(f"{way:>19}" for way in ways))
    rows = {target: [ended.get(f"{target} {way}", 0) for way in ways] for target in CASES}
    rows["in all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for target, row in rows.items():
        print(f"{target:12}{sum(row):>10,}" + "".join(f"{n:>19,}" for n in row))
    print(f"in {seconds / 60:.1f} minutes")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--case", help="play this one")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    given_ = parser.parse_args()
    if given_.case:
        print(play(*eval(given_.case, {"nan": math.nan, "inf": math.inf, "__builtins__": {}})))
        return 0
    if given_.journal:
        fuzz(given_.minutes, given_.journal)
        return 0
    return watch(given_.minutes)


if __name__ == "__main__":
    sys.exit(main())
