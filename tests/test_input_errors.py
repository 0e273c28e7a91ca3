"""Bad arguments, prompts, dialogs, devices and ranks: one LlamaError each, with the value, the limit and the way out, before
any work. Memory: what the preflight advises fits, and nothing larger does."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import (
    DeviceError,
    InputError,
    Llama,
    LlamaError,
    ModelArgs,
    Tokenizer,
    Transformer,
    checkpoint,
    loading,
    memory,
    runtime,
)
from llama import model as llama_model
from llama import parallel as llama_parallel

from .support import random_weights, run, torchrun, write_shards


def refused(call: Callable[[], Any], error: type[LlamaError], *parts: str) -> None:
    """The call must raise this error, with all the parts in a message of reasonable length."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, LlamaError) and isinstance(caught.value, AssertionError)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [] and len(message) < 700, message


@pytest.fixture
def idle(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """The small model, built with max_seq_len=64 and max_batch_size=6, which must not run."""
    monkeypatch.setattr(llama.model, "hidden", lambda *_: pytest.fail("the model ran"))
    return llama


# --- build -----------------------------------------------------------------------------------------------------------

WHOLE, RANKS, DEVICES = "a whole number", "a whole number of ranks, 1 or more", "'cpu', 'cuda'"
DTYPES = "use 'bfloat16', 'float16' or 'float32'"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "name, value, error, parts",
    [
        *[
            (name, bad, InputError, (f"{name} is {bad!r:.20}", WHOLE))
            for name in ("max_seq_len", "max_batch_size")
            for bad in (0, -1, 1.5, True, "8", None, math.nan, 2**31, 10**400)
        ],
        *[("seed", bad, InputError, (f"seed is {bad!r:.20}", WHOLE)) for bad in (1.5, "1", None, True, 2**64, -(2**63) - 1)],
        *[
            ("dtype", bad, InputError, ("dtype is", DTYPES))
            for bad in ("int8", "float64", "foo", "nn", "", 5, True, torch.int8)
        ],
        *[("device", bad, DeviceError, ("device=", DEVICES)) for bad in ("foo", "", "cuda:x", True, [], 1.5, 10**30)],
        *[("device", bad, DeviceError, (f"device='{bad}' is not supported", DEVICES)) for bad in ("meta", "xpu")],
        pytest.param("device", "cuda", DeviceError, ("device='cuda'", "no CUDA GPU", "use device='cpu'"), marks=no_gpu),
        *[("model_parallel_size", bad, DeviceError, (f"is {bad!r}", RANKS)) for bad in (0, -1, "2", 1.0, True)],
        ("model_parallel_size", 2, DeviceError, ("=2 does not divide the 1 running", "torchrun --nproc_per_node 2")),
    ],
    ids=lambda value: f"{value!r:.20}" if not isinstance(value, tuple) else "",
)
def test_build_arguments(monkeypatch: pytest.MonkeyPatch, name: str, value: Any, error: type[LlamaError], parts: tuple) -> None:
    monkeypatch.setattr(checkpoint, "read_params", lambda _: pytest.fail("files were read"))
    arguments = {"max_seq_len": 16, "max_batch_size": 2, "device": "cpu"} | {name: value}
    refused(lambda: Llama.build("folder", "tokenizer.model", **arguments), error, *parts)


def test_ranks_announced_by_halves(monkeypatch: pytest.MonkeyPatch, small: SimpleNamespace) -> None:
    """RANK and WORLD_SIZE without an address to meet at, as some batch systems leave them."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    parts = ("MASTER_ADDR", "torchrun", "unset RANK and WORLD_SIZE")
    refused(lambda: Llama.build(small.folder, small.tokenizer_path, 16, 2, device="cpu"), DeviceError, *parts)


# --- memory ----------------------------------------------------------------------------------------------------------

SEVEN_B = ModelArgs(vocab_size=32000, max_seq_len=4096, max_batch_size=8)
CODE = replace(SEVEN_B, vocab_size=32016)  # which 32 ranks do not divide
SHORT = replace(SEVEN_B, max_seq_len=16)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "args, dtype, ranks, free, advised",
    [
        (SEVEN_B, BF16, 1, 20 * 10**9, {"max_seq_len", "max_batch_size", "ranks"}),
        (SEVEN_B, BF16, 1, 14 * 10**9, {"max_seq_len", "ranks"}),
        (SHORT, BF16, 1, 7 * 10**9, {"int8", "ranks"}),
        (SEVEN_B, BF16, 1, 13_490_000_000, {"max_batch_size=1 with max_seq_len", "ranks"}),
        (SEVEN_B, FP32, 1, 40 * 10**9, {"max_seq_len", "max_batch_size", "dtype", "int4", "ranks"}),
        (SEVEN_B, FP32, 2, 17 * 10**9, {"max_seq_len", "max_batch_size", "dtype", "ranks"}),
        (SEVEN_B, FP32, 1, 16 * 10**9, {"ranks"}),
        (SEVEN_B, FP32, 16, 25 * 10**8, {"max_seq_len", "max_batch_size", "dtype", "ranks"}),
        (SEVEN_B, BF16, 32, 7 * 10**8, {"max_seq_len", "max_batch_size"}),
        (CODE, FP32, 16, 25 * 10**8, {"max_seq_len", "max_batch_size", "dtype"}),
        (SEVEN_B, FP32, 1, 10**6, set()),
    ],
)
def test_each_advice_of_the_preflight_fits_and_nothing_larger(
    args: ModelArgs, dtype: torch.dtype, ranks: int, free: int, advised: set[str]
) -> None:
    free += memory.working_bytes(args, ranks, dtype)

    def preflight(args: ModelArgs = args, ranks: int = ranks, dtype: torch.dtype = dtype, kind: str | None = None) -> None:
        memory.preflight(args, ranks, dtype, torch.device("cpu"), free, kind)

    with pytest.raises(DeviceError, match=rf"max_seq_len={args.max_seq_len}, max_batch_size=8") as caught:
        preflight()
    facts, _, advice = str(caught.value).partition("It fits with ")
    assert f"{memory.gb(free)} are free" in facts and f"{ranks} rank(s)" in facts
    assert advice or "No change of length, rows, dtype or ranks" in facts
    found = set()
    for way in advice.rstrip(".").split(", or "):
        if match := re.fullmatch(r"(max_seq_len|max_batch_size)=(\d+)", way):
            name, value = match[1], int(match[2])
            preflight(replace(args, **{name: value}))
            with pytest.raises(DeviceError):
                preflight(replace(args, **{name: value + 1}))
        elif match := re.fullmatch(r"(max_batch_size=1 with max_seq_len)=(\d+)", way):
            name, value = match[1], int(match[2])
            preflight(replace(args, max_batch_size=1, max_seq_len=value))
            with pytest.raises(DeviceError):
                preflight(replace(args, max_batch_size=1, max_seq_len=value + 1))
        elif re.fullmatch(r"dtype='bfloat16' \(\d+\.\d\d GB\)", way):
            name = "dtype"
            preflight(dtype=BF16)
        elif match := re.fullmatch(r"quantize='(int8|int4)' \(\d+\.\d\d GB\)", way):
            name = match[1]
            preflight(kind=name)
            if name == "int4":
                with pytest.raises(DeviceError):
                    preflight(kind="int8")
        elif match := re.fullmatch(r"(\d+) ranks on machines of their own \(\d+\.\d\d GB each\)", way):
            name, value = "ranks", int(match[1])
            preflight(ranks=value)
            smaller = [r for r in range(ranks + 1, value) if args.kv_heads % r == 0]
            assert ranks < value and args.vocab_size % value == args.kv_heads % value == 0
            parts = memory.weight_bytes, memory.cache_bytes, memory.working_bytes
            assert not any(sum(part(args, r, dtype) for part in parts) <= free for r in smaller)
        else:
            assert way == "", way
            continue
        found.add(name)
    assert found == advised


def test_no_advice_leads_into_another_error() -> None:
    """Where a kind of quantization, or a number of ranks, has no kernel."""
    for device, dtype in (("mps", BF16), ("cuda", torch.float16)):
        with pytest.raises(DeviceError, match=r"does not fit on \w+: 13.48 GB") as caught:
            memory.preflight(SHORT, 1, dtype, torch.device(device), 6 * 10**9)
        assert "int4" not in str(caught.value) and "4 ranks" in str(caught.value)
    with pytest.raises(DeviceError, match="2 ranks") as caught:
        memory.preflight(SHORT, 1, BF16, torch.device("cpu"), 4 * 10**9, "int4")
    assert "int4" in str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_bytes_counted_are_those_of_a_real_model(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, ranks: int, dtype: torch.dtype
) -> None:
    args = llama.model.params
    for module in (llama_model, llama_parallel):
        monkeypatch.setattr(module, "model_parallel", lambda: (0, ranks))
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
        cache = model.allocate() if ranks == 1 else None
    assert memory.weight_bytes(args, ranks, dtype) == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert cache is None or memory.cache_bytes(args, 1, dtype) == cache.data.nbytes
    assert memory.cache_bytes(args, ranks, dtype) * ranks == memory.cache_bytes(args, 1, dtype)


def test_what_does_not_fit_is_refused_before_any_work(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Llama:
        return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")

    # A position takes 512 bytes of cache: keys and values, 2 layers, 4 heads, 8 numbers, 4 bytes.
    working = memory.working_bytes(ModelArgs(**{**small.params, "vocab_size": 384}), 1, torch.float32)
    monkeypatch.setattr(runtime, "free_memory", lambda _: 591_500 + 2 * 64 * 512 + working)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
        patch.setattr(Transformer, "allocate", lambda *_: pytest.fail("a cache was made"))
        facts = ("0.591 MB of weights (float32)", "0.131 MB of cache", f"{memory.gb(working)} to compute in")
        refused(build, DeviceError, *facts, "max_seq_len=32,", "max_batch_size=2,", "dtype='bfloat16'")
    monkeypatch.setattr(runtime, "free_memory", lambda _: None)  # where the system does not tell
    assert build().model.params.max_batch_size == 4


# --- generate --------------------------------------------------------------------------------------------------------

IDS, LISTS = "ids are whole numbers from 0 to 383", "a list of lists of token ids"


@pytest.mark.parametrize(
    "prompts, parts",
    [
        *[(bad, (f"{bad!r:.10}", LISTS)) for bad in (None, 5, "abc", b"abc", {"a": [1]}, {1, 2}, torch.ones(1, 2))],
        *[([[1], bad], ("prompt 1", f"{bad!r:.10}", "a list of token ids")) for bad in (None, 5, "ab", b"ab", {1: 2})],
        *[([[1], [5, bad]], ("prompt 1", f"{bad!r:.10}", IDS)) for bad in (384, -1, True, 1.0, "a", None, [1], 10**400)],
        ([[1], []], ("prompt 1 holds no ids", "begin it with BOS (1)")),
        ([[1], [1] * 65], ("prompt 1 has 65 ids", "max_seq_len=64", "shorten it", "larger max_seq_len")),
    ],
    ids=lambda value: f"{value!r:.30}" if not isinstance(value, tuple) else "",
)
def test_prompts_of_ids(idle: Llama, prompts: Any, parts: tuple) -> None:
    refused(lambda: idle.generate(prompts, 4, temperature=0), InputError, *parts)
    refused(lambda: idle.tokens(prompts, 4, temperature=0), InputError, *parts)  # at once, not at the first id


@pytest.mark.parametrize(
    "name, value, limit",
    [
        *[
            ("temperature", bad, "from 0 (the likeliest id) to 1e30")
            for bad in (math.nan, math.inf, -0.1, -1, "0", True, None, 10**400)
        ],
        *[("top_p", bad, "from 0 to 1") for bad in (math.nan, -0.1, 1.01, math.inf, "0.9", True, None, 1j, [])],
        *[("max_gen_len", bad, "a whole number, 0 or more") for bad in (-1, 4.0, True, "4", math.nan, [])],
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_sampling_arguments(idle: Llama, name: str, value: Any, limit: str) -> None:
    arguments = {"temperature": 0.6, "top_p": 0.9, "max_gen_len": 4} | {name: value}
    parts = (f"{name} is {value!r:.20}", limit)
    refused(lambda: idle.generate([[1, 5]], **arguments), InputError, *parts)
    if value is not None or name != "max_gen_len":
        refused(lambda: idle.text_completion(["a"], **arguments), InputError, *parts)
        refused(lambda: idle.chat_completion([[USER]], **arguments), InputError, *parts)


def test_a_temperature_next_to_zero_takes_the_likeliest_id(llama: Llama) -> None:
    """Divided by it the logits are infinite, and their softmax would be no numbers."""
    greedy = llama.generate([[1, 5], [1, 9]], 6, temperature=0)
    assert llama.generate([[1, 5], [1, 9]], 6, temperature=1e-40) == greedy
    assert llama.generate([[1, 5], [1, 9]], 6, temperature=1e-300) == greedy


# --- texts and dialogs -----------------------------------------------------------------------------------------------

TEXTS, SURROGATE = "a list of texts, as in [text]", ("a lone surrogate", r"'\ud800' at 2", "no character", "UTF-8")


@pytest.mark.parametrize(
    "prompts, parts",
    [
        *[(bad, (f"{bad!r:.10}", TEXTS)) for bad in (None, 5, "once", b"once", {"a": 1}, {"a"})],
        *[(["a", bad], ("prompt 1", f"{bad!r:.10}", "must be a string")) for bad in (None, 5, b"a", ["a"], [1, 2])],
        (["a", "ab\ud800"], ("prompt 1", *SURROGATE)),
        (["a", "b" * 100], ("prompt 1 has 101 ids", "max_seq_len=64", "shorten it")),
    ],
    ids=lambda value: f"{value!r:.30}" if not isinstance(value, tuple) else "",
)
def test_texts(idle: Llama, prompts: Any, parts: tuple) -> None:
    refused(lambda: idle.text_completion(prompts), InputError, *parts)


def by(role: Any, content: Any = "hello") -> dict:
    return {"role": role, "content": content}


SYSTEM, USER, ASSISTANT = by("system"), by("user"), by("assistant")
ORDER = "then 'user' and 'assistant' in turn"


@pytest.mark.parametrize(
    "dialog, parts",
    [
        *[(bad, (f"{bad!r:.10}", "a list of dialogs, each a list of {'role'")) for bad in (None, 5, "hello", USER, {1, 2})],
        *[
            ([USER, bad], ("message 1", f"{bad!r:.10}", "a dict with 'role' and 'content'"))
            for bad in (None, "hello", ["user"])
        ],
        ([], ("is empty", "must end with a 'user' message")),
        ([SYSTEM], ("only a system message", "must end with a 'user' message")),
        ([ASSISTANT], ("message 0 is by 'assistant'", "'user' must speak", ORDER)),
        ([SYSTEM, ASSISTANT, USER], ("message 1 is by 'assistant'", "'user' must speak", ORDER)),
        ([SYSTEM, SYSTEM, USER], ("message 1 is by 'system'", "'user' must speak", ORDER)),
        ([USER, USER], ("message 1 is by 'user'", "'assistant' must speak", ORDER)),
        ([USER, SYSTEM, USER], ("message 1 is by 'system'", "'assistant' must speak", ORDER)),
        ([USER, ASSISTANT], ("ends with 'assistant'", "must be by 'user'")),
        *[
            ([by(bad)], ("message 0", f"{bad!r:.10}", "'system', 'user' and"))
            for bad in ("bot", "User", None, 5, [], {}, b"user")
        ],
        ([USER, {"role": "assistant"}], ("message 1 has no 'content'", "['role']")),
        ([{"content": "hello", 5: 6}], ("message 0 has no 'role'", "['5', 'content']")),
        *[([by("user", bad)], ("message 0", f"{bad!r:.10}", "must be a string")) for bad in (None, 5, b"a", ["a"], {"a": 1})],
        ([by("user", "ab\ud800")], ("message 0", *SURROGATE)),
        ([by("user", "b" * 100)], ("has 116 ids", "max_seq_len=64", "shorten it")),
    ],
    ids=lambda value: f"{value!r:.40}" if not isinstance(value, tuple) else "",
)
def test_dialogs(idle: Llama, dialog: Any, parts: tuple) -> None:
    """Named by its place in the call, also after one that is not even encoded."""
    refused(lambda: idle.chat_completion([[by("user", "[INST]")], [USER], dialog]), InputError, "dialog 2", *parts)


def test_dialogs_that_are_no_list_of_them(idle: Llama) -> None:
    for bad in (None, 5, "hello", USER, {1, 2}):
        refused(lambda bad=bad: idle.chat_completion(bad), InputError, f"dialogs is {bad!r:.10}", "must be a list of dialogs")
    refused(lambda: idle.chat_completion([USER]), InputError, "dialog 0 is {'role': 'user'", "list of dialogs, each a list")


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    for bad in (None, 5, b"a", ["a"]):
        refused(lambda bad=bad: tokenizer.encode(bad, bos=True, eos=False), InputError, f"{bad!r}", "must be a string")
    refused(lambda: tokenizer.encode("ab\ud800c", bos=True, eos=False), InputError, *SURROGATE)
    for bad in (384, -1, 10**400):
        refused(lambda bad=bad: tokenizer.decode([5, bad]), InputError, f"{bad!r:.20}", "out of range", "0 to 383")
    for bad in (None, 5, "ab", [1.0], ["a"], [None], [[1]]):
        refused(lambda bad=bad: tokenizer.decode(bad), InputError, f"{bad!r}", "a list of whole numbers")
    assert tokenizer.decode(torch.tensor(tokenizer.encode("sea shells", True, True))) == "sea shells"


def test_after_each_refusal_the_next_call_answers_as_before(llama: Llama) -> None:
    before = llama.generate([[1, 5, 9], [1, 7]], 8, temperature=0, logprobs=True)
    for prompts, options in (
        ([[1, 384]], {}),
        ([[]], {}),
        ([[1] * 65], {}),
        ([[1]], {"top_p": 2}),
        (None, {}),
    ):
        refused(lambda p=prompts, o=options: llama.generate(p, 8, **o), InputError)
        refused(lambda: llama.chat_completion([[ASSISTANT]]), InputError)
        assert llama.generate([[1, 5, 9], [1, 7]], 8, temperature=0, logprobs=True) == before


# --- other ways to run -----------------------------------------------------------------------------------------------

UNDER_O = """
import math, sys
from llama import Llama, LlamaError, Tokenizer

folder, tokenizer_path = sys.argv[1:]
llama = Llama.build(folder, tokenizer_path, 16, 2, device="cpu")
user = {"role": "user", "content": "hello"}
calls = {
    "size": lambda: Llama.build(folder, tokenizer_path, 0),
    "dtype": lambda: Llama.build(folder, tokenizer_path, dtype="int8"),
    "device": lambda: Llama.build(folder, tokenizer_path, device="foo"),
    "ranks": lambda: Llama.build(folder, tokenizer_path, model_parallel_size=2, device="cpu"),
    "memory": lambda: Llama.build(folder, tokenizer_path, 10**9, 10**6, device="cpu"),
    "folder": lambda: Llama.build(folder + "/none", tokenizer_path, device="cpu"),
    "tokenizer": lambda: Tokenizer(folder + "/params.json"),
    "shards": lambda: Llama.build(folder + "/cut", tokenizer_path, device="cpu"),
    "ids": lambda: llama.generate([[384]], 4),
    "empty": lambda: llama.generate([[]], 4),
    "long": lambda: llama.generate([[1] * 17], 4),
    "seeds": lambda: llama.generate([[1]] * 3, 4, seed=[1, 2]),
    "stop": lambda: llama.text_completion(["a"], stop=""),
    "temperature": lambda: llama.generate([[1]], 4, temperature=math.nan),
    "text": lambda: llama.text_completion("hello"),
    "roles": lambda: llama.chat_completion([[user, user]]),
    "decode": lambda: llama.tokenizer.decode([-1]),
    "window": lambda: llama.model.forward(llama.model.output.weight[:1].long(), 0),
}
for name, call in calls.items():
    try:
        call()
        print(name, "passed")
    except LlamaError as e:
        if not (isinstance(e, ValueError) and isinstance(e, AssertionError)):
            print(name, "is not of the family:", type(e))
print("optimized" if sys.flags.optimize and not __debug__ else "plain", len(calls))
"""


def test_all_of_it_holds_without_assertions(small: SimpleNamespace, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model", small.params, small.weights)
    cut = write_shards(folder / "cut", small.params, small.weights) / "consolidated.00.pth"
    cut.write_bytes(cut.read_bytes()[:1000])
    (tmp_path / "script.py").write_text(UNDER_O)
    done = run("-O", tmp_path / "script.py", folder, small.tokenizer_path)
    assert done.stdout.split("\n")[0] == "optimized 18", done.stdout + done.stderr


ON_RANKS = """
import os, sys
from pathlib import Path
from llama import Llama, LlamaError

good, one_head, tokenizer_path, out = sys.argv[1:]
rank = os.environ["RANK"]
for name, folder in (("one rank", good + "/none" * int(rank)), ("heads", one_head)):
    try:
        Llama.build(folder, tokenizer_path, 16, 2, device="cpu")
    except LlamaError as e:
        Path(out, f"{name} {rank}").write_text(f"{type(e).__name__}: {e}")
        if name == "heads":
            raise
"""


def test_errors_on_ranks_end_all_of_them_with_the_cause(small: SimpleNamespace, tmp_path: Path) -> None:
    """First a folder that only rank 1 lacks, then, in the same processes, more ranks than key/value heads. `torchrun` here
    gives up after 120 seconds, which ranks that wait for each other would need."""
    params = {**small.params, "n_kv_heads": 1}
    one_head = write_shards(tmp_path / "one_head", params, random_weights(params, 384, 192))
    (tmp_path / "script.py").write_text(ON_RANKS)
    done = torchrun(2, tmp_path / "script.py", small.folder, one_head, small.tokenizer_path, tmp_path)
    assert done.returncode != 0 and "key/value heads" in done.stderr
    said = {path.name: path.read_text() for path in tmp_path.glob("* [01]")}
    assert said["one rank 0"].startswith("LlamaError: rank 1 failed, so every rank stops: CheckpointError: ckpt_dir is ")
    assert said["one rank 1"].startswith("CheckpointError: ckpt_dir is ") and "No such file" in said["one rank 1"]
    for rank in (0, 1):
        assert said[f"heads {rank}"] == "DeviceError: key/value heads: 1 cannot be divided among 2 ranks; use one of 1"
