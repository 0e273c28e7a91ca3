"""Memory: what the preflight counts is what is held; what it advises fits, and nothing larger does."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llama import DeviceError, Llama, ModelArgs, Transformer, errors, tuning
from llama import model as llama_model
from llama.checkpoint import loading
from llama.engine.kv_cache import KVCache
from llama.layers import embedding, linear
from llama.planning import estimate, free_memory

from .counting import counted
from .support import refused

SEVEN_B = ModelArgs(vocab_size=32000, max_seq_len=4096, max_batch_size=8)
CODE = replace(SEVEN_B, vocab_size=32016)  # which 32 ranks do not divide
HALF = replace(SEVEN_B, max_seq_len=2048)
SHORT = replace(SEVEN_B, max_seq_len=16)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "args, dtype, ranks, free, advised",
    [
        (SEVEN_B, BF16, 1, 20 * 10**9, {"max_seq_len", "max_batch_size", "ranks"}),
        (SEVEN_B, BF16, 1, 14 * 10**9, {"max_seq_len", "ranks"}),
        (SHORT, BF16, 1, 71 * 10**8, {"int8", "ranks"}),
        (HALF, BF16, 1, 13_490_000_000, {"max_batch_size=1 with max_seq_len", "int4", "ranks"}),
        (SEVEN_B, FP32, 1, 40 * 10**9, {"max_seq_len", "max_batch_size", "dtype", "int4", "ranks"}),
        (SEVEN_B, FP32, 2, 17 * 10**9, {"max_seq_len", "max_batch_size", "dtype", "ranks"}),
        (SEVEN_B, FP32, 1, 16 * 10**9, {"ranks"}),
        (SEVEN_B, FP32, 16, 25 * 10**8, {"max_seq_len", "max_batch_size", "dtype", "int4", "ranks"}),
        (SEVEN_B, BF16, 32, 7 * 10**8, {"max_seq_len", "max_batch_size", "int4"}),
        (CODE, FP32, 16, 25 * 10**8, {"max_seq_len", "max_batch_size", "dtype", "int4"}),
        (SEVEN_B, FP32, 1, 10**6, set()),
    ],
)
def test_each_advice_of_the_preflight_fits_and_nothing_larger(
    args: ModelArgs, dtype: torch.dtype, ranks: int, free: int, advised: set[str]
) -> None:
    free += estimate.activation_bytes(args, ranks, dtype)

    def preflight(args: ModelArgs = args, ranks: int = ranks, dtype: torch.dtype = dtype, kind: str | None = None) -> None:
        estimate.check_memory(args, ranks, dtype, torch.device("cpu"), free, kind)

    with pytest.raises(DeviceError, match=rf"max_seq_len={args.max_seq_len}, max_batch_size=8") as caught:
        preflight()
    facts, _, advice = str(caught.value).partition("It fits with ")
    assert f"{errors.format_bytes(free)} are free" in facts and f"{ranks} rank(s)" in facts
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
            assert not any(estimate.memory_required(args, r, dtype).total <= free for r in smaller)
        else:
            assert way == "", way
            continue
        found.add(name)
    assert found == advised


def test_no_advice_leads_into_another_error() -> None:
    """Where a kind of quantization, or a number of ranks, has no kernel."""
    for device, dtype in (("mps", BF16), ("cuda", torch.float16)):
        with pytest.raises(DeviceError, match=r"does not fit on \w+: 13.48 GB") as caught:
            estimate.check_memory(SHORT, 1, dtype, torch.device(device), 6 * 10**9)
        assert "int4" not in str(caught.value) and "4 ranks" in str(caught.value)
    with pytest.raises(DeviceError, match="2 ranks") as caught:
        estimate.check_memory(SHORT, 1, BF16, torch.device("cpu"), 4 * 10**9, "int4")
    assert "int4" in str(caught.value)
    endless = ModelArgs(dim=2**30, n_heads=2**29, vocab_size=2**30)  # not every number of ranks is tried
    with pytest.raises(DeviceError, match="No change of"):
        estimate.check_memory(endless, 1, BF16, torch.device("cpu"), 10**9)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_bytes_counted_are_those_of_a_real_model(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, ranks: int, dtype: torch.dtype
) -> None:
    args = llama.model.params
    for module in (llama_model, linear, embedding):
        monkeypatch.setattr(module, "model_parallel", lambda: (0, ranks))
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
        cache = KVCache.adopt(model)
    assert estimate.weight_bytes(args, ranks, dtype) == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert estimate.cache_bytes(args, ranks, dtype) == cache.data.nbytes
    assert estimate.cache_bytes(args, ranks, dtype) * ranks == estimate.cache_bytes(args, 1, dtype)


def test_no_forward_has_more_ids_than_are_counted(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence to be scored goes through whole, prompts in chunks."""
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 16)
    with counted() as ids_at_once:
        llama.engine.score([[1] * 10] * 3 + [[1] * 64, [1] * 4], [1] * 5, [""] * 5)
    assert max(ids_at_once) == estimate.max_tokens_per_forward(llama.model.params) == llama.model.params.max_seq_len
    with counted() as ids_at_once:
        llama.generate([[1] * 60] * 3, 2)
    assert max(ids_at_once) == 16
    assert estimate.activation_bytes(replace(SEVEN_B, max_seq_len=8192), 1, BF16) > estimate.activation_bytes(SEVEN_B, 1, BF16)


def test_what_does_not_fit_is_refused_before_any_work(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Llama:
        return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")

    # A position takes 512 bytes of cache: keys and values, 2 layers, 4 heads, 8 numbers, 4 bytes.
    working = estimate.activation_bytes(ModelArgs(**{**small.params, "vocab_size": 384}), 1, torch.float32)
    monkeypatch.setattr(free_memory, "free_memory", lambda _: 591_500 + 2 * 64 * 512 + working)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
        patch.setattr(KVCache, "adopt", lambda *_: pytest.fail("a cache was made"))
        facts = ("0.591 MB of weights (float32)", "0.131 MB of cache", f"{errors.format_bytes(working)} to compute in")
        refused(build, DeviceError, *facts, "max_seq_len=32,", "max_batch_size=2,", "dtype='bfloat16'")
    monkeypatch.setattr(free_memory, "free_memory", lambda _: None)  # where the system does not tell
    assert build().model.params.max_batch_size == 4
