"""With packed weights an answer does not depend on the batch: it is bitwise the same alone and in any batch."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama import Llama, tuning
from llama.engine.forward import EngineNorm, apply_rope_
from llama.kernels import blocked_linear, onednn
from llama.model import RMSNorm

from .support import random_weights, write_shards


def is_batch_invariance_promised() -> bool:
    """Return True on CPUs with AVX-512 for bfloat16."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of PyTorch have no get_capabilities
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


exact = pytest.mark.skipif(not is_batch_invariance_promised(), reason="promised for AVX-512 with bfloat16")
PROMPTS = [[1, *(3 + (i * n) % 297 for i in range(n))] for n in (2, 40, 300, 15, 15, 15, 129, 650, 1, 257)]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@exact
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_answers_are_the_same_alone_and_in_any_batch(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, format: str | None, threads: int
) -> None:
    """Compare tokens and log probabilities, greedy and sampled, for prompts of many lengths that are prefilled in chunks.

    Answers end at different decode steps, and waiting prompts take over the rows of finished answers.
    """
    if format == "int4" and blocked_linear.extension_for("int4") is None:
        pytest.skip("PyTorch's int4 kernel rounds differently for few rows and for many rows")
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)  # sets no minimum size, so that even small weights are packed
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 512)
    params = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
    folder = write_shards(tmp_path, params, random_weights(params, 384, 704))
    greedy, sampled = {"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 7, "echo": True}

    def build(n_rows: int) -> Llama:
        return Llama.build(folder, tokenizer_path, 665, n_rows, device="cpu", dtype="bfloat16", quantize=format)

    single = build(1)
    answers = [single.generate([prompt], 40, **greedy)[0][0] for prompt in PROMPTS]
    eos = statistics.mode(itertools.chain(*answers))
    monkeypatch.setattr(single.tokenizer, "eos_id", eos)
    for options in (greedy, sampled):
        alone = [single.generate([prompt], 40, logprobs=True, **options) for prompt in PROMPTS]
        assert len({len(values[0]) for _, values in alone if values}) > 2
        for n_rows in (2, 4, 7):
            batched = build(n_rows)
            monkeypatch.setattr(batched.tokenizer, "eos_id", eos)
            together = batched.generate(PROMPTS, 40, logprobs=True, **options)
            assert together == ([tokens[0] for tokens, _ in alone], [values[0] for _, values in alone if values])


@exact
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_answers_of_a_wide_quantized_model_are_the_same_alone_and_in_a_batch(
    tmp_path: Path, tokenizer_path: Path, format: str
) -> None:
    """In rows of 2,048 inputs, activations have 8 bits, and AMX converts the weights of prefills to bfloat16."""
    params = dict(dim=2048, n_layers=1, n_heads=16, n_kv_heads=2, multiple_of=64, ffn_dim_multiplier=0.1, norm_eps=1e-5)
    params = {**params, "vocab_size": -1}
    folder = write_shards(tmp_path, params, random_weights(params, 384, 576))
    prompts = [[1, *(3 + (i * n) % 297 for i in range(n))] for n in (2, 40, 15, 129)]
    options = {"temperature": 0, "logprobs": True}

    def build(n_rows: int) -> Llama:
        return Llama.build(folder, tokenizer_path, 160, n_rows, device="cpu", dtype="bfloat16", quantize=format)

    single = build(1)
    alone = [single.generate([prompt], 8, **options) for prompt in prompts]
    for llama in (single, build(4)):
        assert llama.generate(prompts, 8, **options) == ([t[0] for t, _ in alone], [v[0] for _, v in alone if v])


@exact
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX, oneDNN's kernels for few and for many rows differ")
def test_onednn_rows_are_bitwise_the_same_alone_and_in_a_batch() -> None:
    """oneDNN's kernel for a single row rounds differently, so OneDnnLinear must not use that kernel."""
    kernel = onednn.OneDnnLinear(torch.randn(3000, 2048).bfloat16())
    x = torch.randn(60, 2048).bfloat16()
    for n in (1, 2, 3, 7):
        assert torch.equal(torch.cat([kernel(rows) for rows in x.split(n)]), kernel(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalized_rows_are_bitwise_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    norm = EngineNorm(RMSNorm(512, eps=1e-5).to(dtype))
    x = (torch.randn(1500, 512) * torch.logspace(-3, 2, 1500).unsqueeze(1)).to(dtype)
    with torch.no_grad():
        assert torch.equal(torch.cat([norm.forward(row) for row in x.split(1)]), norm.forward(x))


def test_rotated_rows_are_bitwise_the_same_alone_and_in_a_batch(threads: int) -> None:
    """Rotate so many values that PyTorch divides them among threads. A thread may then start in the middle of a head."""
    x, freqs = torch.randn(500, 7, 64), torch.randn(500, 1, 32, 2)
    with torch.no_grad():
        alone = [apply_rope_(row.clone(), row_freqs) for row, row_freqs in zip(x.split(1), freqs.split(1), strict=True)]
        assert torch.equal(torch.cat(alone), apply_rope_(x, freqs))
