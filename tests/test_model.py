"""Test the reference model and its parts against their definitions, and the engine's forward against the reference model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.engine.forward import EngineLayer, EngineNorm, apply_rope_, apply_rope_real
from llama.engine.kv_cache import RaggedBatch
from llama.errors import InputError
from llama.kernels.attention import attention, attention_reference
from llama.model import RMSNorm, apply_rotary_emb, ffn_width, precompute_freqs_cis, repeat_kv, reshape_for_broadcast

from .support import write_shards


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))


def test_a_model_of_one_layer_computes_its_formula(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    args = ModelArgs(
        dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=384, multiple_of=8, max_batch_size=3, max_seq_len=20
    )
    model = Transformer(args)
    for p in model.parameters():
        p.uniform_(-0.5, 0.5)
    w = {name.removeprefix("layers.0."): p for name, p in model.named_parameters()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rope(x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(20.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8)).repeat_interleave(2, 1)[:, None]
        quarter_turn = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * angles.cos() + quarter_turn * angles.sin()

    x = w["tok_embeddings.weight"][tokens]
    n = norm(x, "attention_norm.weight")
    q, k, v = ((n @ w[f"attention.{name}.weight"].T).unflatten(-1, (-1, 8)) for name in ("wq", "wk", "wv"))
    q, k, v = rope(q), rope(k).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / 8**0.5
    weights = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf")).softmax(-1)
    h = x + torch.einsum("bhst,bthd->bshd", weights, v).flatten(2) @ w["attention.wo.weight"].T
    n = norm(h, "ffn_norm.weight")
    gate = torch.nn.functional.silu(n @ w["feed_forward.w1.weight"].T)
    h = h + (gate * (n @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    torch.testing.assert_close(model(tokens, 0), norm(h, "norm.weight") @ w["output.weight"].T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[1] * 20, [19, 1], [7, 1, 12], [1, 19]])
def test_a_sequence_fed_in_parts_gives_the_logits_of_the_whole_sequence(
    reference: Transformer, tokens: torch.Tensor, lengths: list[int]
) -> None:
    """Feed a sequence to the model in several calls. Each call attends to the earlier tokens in the KV cache."""
    want, logits, start = reference.forward(tokens, 0), [], 0
    for n in lengths:
        logits.append(reference.forward(tokens[:, start : start + n], start))
        start += n
    torch.testing.assert_close(torch.cat(logits, 1), want, atol=1e-4, rtol=0)


def test_rows_at_different_positions_in_one_forward_give_the_references_logits(
    llama: Llama, reference: Transformer, tokens: torch.Tensor
) -> None:
    """Test a ragged batch whose rows start at different positions, then a decode step in which each row is at a different
    position."""
    starts, lengths, want = [0, 5, 2], [6, 4, 9], reference.forward(tokens, 0)
    forward = llama.engine.forward()
    for row, start in enumerate(starts):
        if start:
            forward.hidden_states(tokens[row, :start], RaggedBatch.from_segments([(row, 0, start)]))
    ragged = torch.cat([tokens[r, s : s + n] for r, (s, n) in enumerate(zip(starts, lengths, strict=True))])
    logits = forward.logits(
        forward.hidden_states(ragged, RaggedBatch.from_segments(zip(range(3), starts, lengths, strict=True)))
    )
    expected = torch.cat([want[r, s : s + n] for r, (s, n) in enumerate(zip(starts, lengths, strict=True))])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    positions = torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)])
    step = forward.logits(forward.hidden_states(tokens[range(3), positions], RaggedBatch.decode(positions, 12)))
    torch.testing.assert_close(step, want[range(3), positions], atol=1e-4, rtol=0)


@pytest.mark.parametrize("logits_indices", [[], [0], [4], [2, 7, 8], [*range(9)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_layer_computes_only_the_tokens_that_need_logits(
    small: SimpleNamespace, tokens: torch.Tensor, dtype: torch.dtype, logits_indices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that all keys and values are written to the KV cache, and that the feed-forward of the last layer gets only the
    tokens at `logits_indices`."""
    built = Llama.build(small.folder, small.tokenizer_path, 16, 3, device="cpu", dtype=dtype)
    batch, ragged = RaggedBatch.from_segments([(0, 0, 5), (1, 0, 4)]), torch.cat([tokens[0, :5], tokens[1, :4]])
    hidden: list[torch.Tensor] = []
    caches: list[torch.Tensor] = []
    n_swiglu: list[int] = []
    swiglu = EngineLayer.swiglu
    monkeypatch.setattr(
        EngineLayer, "swiglu", lambda self, x, decoding: (n_swiglu.append(len(x)), swiglu(self, x, decoding))[1]
    )
    with torch.inference_mode():
        for indices in (None, torch.tensor(logits_indices, dtype=torch.int64)):
            forward = built.engine.forward()
            forward.cache.data.zero_()
            hidden.append(forward.hidden_states(ragged, batch, logits_indices=indices))
            caches.append(forward.cache.data.clone())
    assert torch.equal(*caches) and n_swiglu == [9, 9, 9, max(1, len(logits_indices))]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(hidden[1], hidden[0][logits_indices], atol=tolerance, rtol=tolerance)


def test_keys_and_values_of_an_earlier_longer_prompt_are_never_read(llama: Llama, tokens: torch.Tensor) -> None:
    want = llama.model.forward(tokens[:, :4], 0), llama.model.forward(tokens[:, 4:5], 4)
    llama.model.forward(torch.full((3, 60), 7), 0)
    got = llama.model.forward(tokens[:, :4], 0), llama.model.forward(tokens[:, 4:5], 4)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_forward_refuses_more_positions_or_rows_than_the_kv_cache_has(llama: Llama) -> None:
    with pytest.raises(InputError, match=r"start_pos=60 and 5 tokens .* max_seq_len=64"):
        llama.model.forward(torch.ones(1, 5, dtype=torch.long), 60)
    with pytest.raises(InputError, match=r"7 rows.*max_batch_size=6"):
        llama.model.forward(torch.ones(7, 1, dtype=torch.long), 0)
    with pytest.raises(InputError, match="vocab_size"):
        Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2))


def test_forward_refuses_tokens_and_positions_out_of_range(llama: Llama) -> None:
    for bad in (384, -1):
        with pytest.raises(InputError, match="must be from 0 to 383"):
            llama.model(torch.tensor([[1, bad]]), 0)
    for bad in (1.0, None, "0"):
        with pytest.raises(InputError, match="it must be a whole number"):
            llama.model(torch.tensor([[1, 5]]), bad)
    logits = llama.model(torch.tensor([[1, 5]]), 0)
    for zero in (torch.tensor(0), np.int64(0)):
        assert torch.equal(llama.model(torch.tensor([[1, 5]]), zero), logits)


def test_a_model_without_checkpoint_and_process_groups_can_be_trained() -> None:
    """Train a small model: every weight gets a gradient, and the loss falls."""
    torch.manual_seed(0)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=8, max_batch_size=2, max_seq_len=8)
    model, tokens = Transformer(args).requires_grad_(), torch.randint(0, 40, (2, 8))
    first = last = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1], 0).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < first


def test_a_forward_without_the_kv_cache_gives_the_references_logits(
    llama: Llama, reference: Transformer, tokens: torch.Tensor
) -> None:
    """Run a forward without the KV cache for more rows than the KV cache has. The KV cache must stay unchanged."""
    forward, nine_rows = llama.engine.forward(), tokens.repeat(3, 1)
    before = forward.cache.data.clone()
    hidden = forward.hidden_states(
        nine_rows.flatten(), RaggedBatch.from_segments((row, 0, 20) for row in range(9)), use_cache=False
    )
    want = reference.forward(tokens, 0).repeat(3, 1, 1)
    torch.testing.assert_close(forward.logits(hidden).view(9, 20, -1), want, atol=1e-4, rtol=0)
    assert torch.equal(before, forward.cache.data)


def test_rms_norm_computes_its_formula() -> None:
    norm, x = RMSNorm(6, eps=1e-5), torch.randn(4, 6, dtype=torch.float64).float()
    norm.weight.data.uniform_()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=0)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert norm.eps == 1e-5 and RMSNorm(4).eps == 1e-6


def test_rotary_embedding_rotates_adjacent_pairs_of_values() -> None:
    freqs = precompute_freqs_cis(8, 10, theta=100.0)
    assert freqs.shape == (10, 4) and freqs.dtype == torch.complex64
    angle = 3 * 100.0 ** (-2 / 8)  # the rotation angle of the pair with index 1 at position 3
    assert freqs[3, 1].real.item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
    xq, xk = torch.randn(2, 10, 4, 8), torch.randn(2, 10, 2, 8)
    q, k = apply_rotary_emb(xq, xk, freqs)
    for x, y in ((xq, q), (xk, k)):
        rotated = torch.view_as_complex(x.unflatten(-1, (4, 2))) * freqs.view(1, 10, 1, 4)
        torch.testing.assert_close(y, torch.view_as_real(rotated).flatten(-2), atol=1e-6, rtol=0)
    assert apply_rotary_emb(xq.bfloat16(), xk.bfloat16(), freqs)[0].dtype == torch.bfloat16
    assert reshape_for_broadcast(freqs, torch.zeros(2, 10, 4, 4)).shape == (1, 10, 1, 4)
    with pytest.raises(InputError):
        reshape_for_broadcast(freqs, torch.zeros(2, 9, 4, 4))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kv, groups", [(4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("S, L, starts", [(5, 5, None), (5, 9, [4]), (1, 9, [8, 3]), (1, 9, None), (1, 1, None)])
def test_attention_equals_the_reference_attention_and_the_formula(
    kv: int, groups: int, dtype: torch.dtype, tolerance: float, S: int, L: int, starts: list[int] | None
) -> None:
    """Test whole prompts, chunks of a prompt, and decode steps. Attention gets key/value heads without repetition.

    By the formula, the weights of each query are a softmax over all positions up to its own. `starts` is a list of the position
    of the first query: one for each row, or a single one for all rows. It is None in tests without a mask.
    """
    B, hd = 2, 16
    q, k, v = torch.randn(B, S, kv, groups, hd), torch.randn(B, kv, L, hd), torch.randn(B, kv, L, hd)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    mask = None
    if starts:
        mask = torch.full((len(starts), 1, S, L), float("-inf"), dtype=dtype)
        for b, start in enumerate(starts):
            for s in range(S):
                mask[b, :, s, : start + s + 1] = 0
    got = attention(q, k, v, mask).float()
    assert got.shape == q.shape
    torch.testing.assert_close(got, attention_reference(q, k, v, mask).float(), atol=tolerance, rtol=0)

    b, s, head, group = 1, S // 2, kv - 1, groups - 1
    n_attended = (starts[-1] if starts else L - S) + s + 1
    weights = (k[b, head, :n_attended].float() @ q[b, s, head, group].float() / hd**0.5).softmax(0)
    torch.testing.assert_close(got[b, s, head, group], weights @ v[b, head, :n_attended].float(), atol=tolerance, rtol=0)


def test_rotary_embedding_is_computed_in_float32_in_any_dtype() -> None:
    x, freqs = torch.randn(3, 2, 8).bfloat16(), torch.rand(3, 1, 4, 2)
    assert torch.equal(apply_rope_(x.clone(), freqs), apply_rope_(x.float(), freqs).bfloat16())
    assert torch.equal(apply_rope_real(x, freqs), apply_rope_real(x.float(), freqs).bfloat16())
    torch.testing.assert_close(apply_rope_(x.float(), freqs), apply_rope_real(x.float(), freqs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_engines_norm_equals_the_models_norm(dtype: torch.dtype) -> None:
    """Test inputs of magnitudes from 1e-6 to 1e3. In 16 bits, fewer than 0.1% of the results may be rounded differently; a
    third would be, if the norm were not computed in float32. The result of a row must not depend on other rows."""
    norm = RMSNorm(2048, eps=1e-5).to(dtype)
    norm.weight.uniform_()
    x = (torch.randn(70, 2048) * torch.logspace(-6, 3, 70).unsqueeze(1)).to(dtype)
    want, got = norm(x), EngineNorm(norm).forward(x)
    alone = torch.cat([EngineNorm(norm).forward(row) for row in x.split(1)])
    assert got.dtype == dtype and torch.equal(alone, got)
    if dtype != torch.float32:
        assert (got != want).float().mean() < 1e-3
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-7)


def test_rope_theta_and_norm_eps_of_params_json_are_used(
    tmp_path: Path, small: SimpleNamespace, reference: Transformer, tokens: torch.Tensor
) -> None:
    """Build a model whose params.json has another rope_theta and norm_eps than the defaults. The logits must change."""
    params = {**small.params, "rope_theta": 100.0, "norm_eps": 0.05}
    built = Llama.build(write_shards(tmp_path, params, small.weights), small.tokenizer_path, 64, 3, device="cpu")
    assert built.model.norm.eps == 0.05 and torch.equal(built.model.freqs_cis, precompute_freqs_cis(8, 128, 100.0))
    logits = built.model.forward(tokens, 0)
    forward = built.engine.forward()
    hidden = forward.hidden_states(tokens.flatten(), RaggedBatch.from_segments((row, 0, 20) for row in range(3)))
    torch.testing.assert_close(forward.logits(hidden).view(3, 20, -1), logits, atol=1e-4, rtol=0)
    assert (logits - reference.forward(tokens, 0)).abs().max() > 0.1


def test_repeat_kv_repeats_each_head_next_to_itself() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1)
    assert repeat_kv(x, 2).flatten().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "dim, multiple_of, multiplier, width",
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672)],
)
def test_the_feed_forward_widths_of_7b_13b_and_70b_are_metas(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    assert ffn_width(4 * dim, multiple_of, multiplier) == width


def test_forward_accepts_a_sequence_that_fills_the_context(llama: Llama) -> None:
    context = llama.model.params.max_seq_len
    tokens = torch.randint(3, 300, (1, context))
    logits = llama.model(tokens, 0)
    assert logits.shape == (1, context, 384)
    torch.testing.assert_close(llama.model(tokens[:, -1:], context - 1)[0, 0], logits[0, -1], atol=1e-4, rtol=1e-4)
    assert llama.model(tokens[:0], 0).shape == (0, context, 384)


def test_a_model_with_an_odd_head_width_is_refused() -> None:
    with pytest.raises(InputError, match="n_heads even"):
        Transformer(ModelArgs(dim=6, n_heads=2, n_layers=1, vocab_size=8, multiple_of=1))


def test_rotary_embedding_of_many_rows_and_heads_equals_its_formula() -> None:
    x, freqs = torch.randn(200, 3, 8, 64), precompute_freqs_cis(64, 3)
    with torch.inference_mode():
        got, _ = apply_rotary_emb(x, x, freqs)
    torch.testing.assert_close(got, apply_rope_real(x, torch.view_as_real(freqs)[:, None]))
