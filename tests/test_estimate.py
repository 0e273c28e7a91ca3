"""The estimated memory agrees with the memory that models take, and an error about too little memory gives useful advice."""

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
from llama.planning.free_memory import FreeMemory

from .counting import count_forward_tokens
from .support import assert_raises

SEVEN_B = ModelArgs(vocab_size=32000, max_seq_len=4096, max_batch_size=8)
CODE = replace(SEVEN_B, vocab_size=32016)  # this vocabulary cannot be divided among 32 ranks
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
def test_each_change_that_the_error_advises_fits_and_nothing_larger_fits(
    args: ModelArgs, dtype: torch.dtype, ranks: int, free: int, advised: set[str]
) -> None:
    free += estimate.activation_bytes(args, ranks, dtype)

    def check(args: ModelArgs = args, ranks: int = ranks, dtype: torch.dtype = dtype, format: str | None = None) -> None:
        estimate.check_memory(args, ranks, dtype, torch.device("cpu"), FreeMemory(free), format)

    with pytest.raises(DeviceError, match=rf"max_seq_len={args.max_seq_len}, max_batch_size=8") as caught:
        check()
    facts, _, advice = str(caught.value).partition("It fits with ")
    assert f"{errors.format_bytes(free)} are free" in facts and f"{ranks} rank(s)" in facts
    assert advice or "No single change of" in facts
    changes = set()
    for change in advice.rstrip(".").split(", or "):
        if match := re.fullmatch(r"(max_seq_len|max_batch_size)=(\d+)", change):
            name, value = match[1], int(match[2])
            check(replace(args, **{name: value}))
            with pytest.raises(DeviceError):
                check(replace(args, **{name: value + 1}))
        elif match := re.fullmatch(r"(max_batch_size=1 with max_seq_len)=(\d+)", change):
            name, value = match[1], int(match[2])
            check(replace(args, max_batch_size=1, max_seq_len=value))
            with pytest.raises(DeviceError):
                check(replace(args, max_batch_size=1, max_seq_len=value + 1))
        elif re.fullmatch(r"dtype='bfloat16' \(\d+\.\d\d GB\)", change):
            name = "dtype"
            check(dtype=BF16)
        elif match := re.fullmatch(r"quantize='(int8|int4)' \(\d+\.\d\d GB\)", change):
            name = match[1]
            check(format=name)
            if name == "int4":
                with pytest.raises(DeviceError):
                    check(format="int8")
        elif match := re.fullmatch(r"(\d+) ranks on separate machines \(\d+\.\d\d GB each\)", change):
            name, value = "ranks", int(match[1])
            check(ranks=value)
            smaller = [r for r in range(ranks + 1, value) if args.kv_heads % r == 0]
            assert ranks < value and args.vocab_size % value == args.kv_heads % value == 0
            assert not any(estimate.memory_required(args, r, dtype).total <= free for r in smaller)
        else:
            assert change == "", change
            continue
        changes.add(name)
    assert changes == advised


def test_the_error_advises_nothing_that_would_raise_another_error() -> None:
    """The error must not advise a format without a kernel for the device, or ranks that cannot divide the model."""
    for device, dtype in (("mps", BF16), ("cuda", torch.float16)):
        with pytest.raises(DeviceError, match=r"does not fit on \w+: .* take 13.48 GB") as caught:
            estimate.check_memory(SHORT, 1, dtype, torch.device(device), FreeMemory(6 * 10**9))
        assert "int4" not in str(caught.value) and "4 ranks" in str(caught.value)
    with pytest.raises(DeviceError, match="2 ranks") as caught:
        estimate.check_memory(SHORT, 1, BF16, torch.device("cpu"), FreeMemory(4 * 10**9), "int4")
    assert "int4" in str(caught.value)
    huge = ModelArgs(dim=2**30, n_heads=2**29, vocab_size=2**30)  # the check must be quick, without trying all numbers of ranks
    with pytest.raises(DeviceError, match="No single change of"):
        estimate.check_memory(huge, 1, BF16, torch.device("cpu"), FreeMemory(10**9))


def test_the_error_advises_no_copy_of_weights_that_stay_mapped_without_memory_for_it() -> None:
    """If float32 weights stay in the mapped file, a copy in bfloat16 needs other memory, even though it is smaller."""
    required = estimate.memory_required(SEVEN_B, 1, FP32)
    free = FreeMemory(required.total - 1, required.total - required.weights, "ulimit -v")
    with pytest.raises(DeviceError, match="free within ulimit -v") as caught:
        estimate.check_memory(SEVEN_B, 1, FP32, torch.device("cpu"), free)
    assert "max_seq_len=4095, or max_batch_size=7" in str(caught.value) and "dtype='bfloat16'" in str(caught.value)
    free = free._replace(if_copied=required.total - required.weights - 10 * 10**9)
    with pytest.raises(DeviceError) as caught:
        estimate.check_memory(SEVEN_B, 1, FP32, torch.device("cpu"), free)
    assert "max_batch_size=7" in str(caught.value) and "bfloat16" not in str(caught.value).partition("It fits")[2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_estimated_bytes_of_weights_and_kv_cache_are_those_of_a_real_model(
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


def test_no_forward_has_more_tokens_than_the_estimate_assumes(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring computes a sequence in one forward pass. Generation computes a prompt in chunks."""
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 16)
    with count_forward_tokens() as token_counts:
        llama.score([[1, 2] * 5, [1, 3] * 5, [1, 4] * 5, [1, 5] * 32, [1, 6] * 2], [[7]] * 5)
    assert max(token_counts) == estimate.max_tokens_per_forward(llama.model.params) == llama.model.params.max_seq_len
    with count_forward_tokens() as token_counts:
        llama.generate([[1] * 60] * 3, 2)
    assert max(token_counts) == 16
    assert estimate.activation_bytes(replace(SEVEN_B, max_seq_len=8192), 1, BF16) > estimate.activation_bytes(SEVEN_B, 1, BF16)


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system does not report its free memory, `build` continues without a check."""

    def build() -> Llama:
        return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")

    # A position of the KV cache takes 512 bytes: keys and values, 2 layers, 4 heads, 8 values per head, 4 bytes per value.
    working = estimate.activation_bytes(ModelArgs(**{**small.params, "vocab_size": 384}), 1, torch.float32)
    monkeypatch.setattr(free_memory, "free_memory", lambda *_: FreeMemory(591_500 + 2 * 64 * 512 + working, limit="ulimit -v"))
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
        patch.setattr(KVCache, "adopt", lambda *_: pytest.fail("a cache was made"))
        facts = (
            "free within ulimit -v. Weights in float32 take 0.591 MB",
            "=4) 0.131 MB",
            f"activations {errors.format_bytes(working)}",
        )
        assert_raises(build, DeviceError, *facts, "max_seq_len=32,", "max_batch_size=2,", "dtype='bfloat16'")
    monkeypatch.setattr(free_memory, "free_memory", lambda *_: None)
    assert build().model.params.max_batch_size == 4
