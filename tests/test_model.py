"""The model against its plain twin, and its pieces against their definitions."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.attention import attend, attend_plainly
from llama.cache import Batch
from llama.errors import InputError
from llama.model import (
    RMSNorm,
    apply_rotary_emb,
    ffn_width,
    precompute_freqs_cis,
    repeat_kv,
    reshape_for_broadcast,
)
from llama.rotary import rotate_, rotate_plainly

from .support import plain_logits, write_shards


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))


def twin(small: SimpleNamespace, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([plain_logits(small.params, small.weights, row.tolist()) for row in ids])


def test_forward_equals_the_plain_twin(llama: Llama, small: SimpleNamespace, ids: torch.Tensor) -> None:
    logits = llama.model.forward(ids, 0)
    assert logits.shape == (3, 20, 384) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, twin(small, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [19, 1], [7, 1, 12], [1, 19]])
def test_any_way_of_feeding_gives_the_same_logits(
    llama: Llama, small: SimpleNamespace, ids: torch.Tensor, pieces: list[int]
) -> None:
    """Whole, id by id, in chunks: the cache must stand in for what was fed before."""
    logits, start = [], 0
    for n in pieces:
        logits.append(llama.model.forward(ids[:, start : start + n], start))
        start += n
    torch.testing.assert_close(torch.cat(logits, 1), twin(small, ids), atol=1e-4, rtol=0)


def test_rows_at_different_positions_in_one_forward(llama: Llama, small: SimpleNamespace, ids: torch.Tensor) -> None:
    """Ragged pieces that begin at different positions, then a step with a position for each row."""
    starts, lengths = [0, 5, 2], [6, 4, 9]
    model = llama.model
    for row, start in enumerate(starts):
        if start:
            model.hidden(ids[row, :start], Batch.of([(row, 0, start)]))
    packed = torch.cat([ids[r, s : s + n] for r, (s, n) in enumerate(zip(starts, lengths, strict=True))])
    logits = model.logits(model.hidden(packed, Batch.of(zip(range(3), starts, lengths, strict=True))))
    want = twin(small, ids)
    expected = torch.cat([want[r, s : s + n] for r, (s, n) in enumerate(zip(starts, lengths, strict=True))])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    positions = torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)])
    step = model.logits(model.hidden(ids[range(3), positions], Batch.step(positions, 12)))
    torch.testing.assert_close(step, want[range(3), positions], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wanted", [[], [0], [4], [2, 7, 8], [*range(9)]])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_layer_computes_only_what_is_wanted(
    small: SimpleNamespace, ids: torch.Tensor, dtype: torch.dtype, watched: bool, wanted: list[int]
) -> None:
    """But all of it where a caller's hook sees it, which may well mix what comes in with what goes out."""
    model = Llama.build(small.folder, small.tokenizer_path, 16, 3, device="cpu", dtype=dtype).model
    batch, packed = Batch.of([(0, 0, 5), (1, 0, 4)]), torch.cat([ids[0, :5], ids[1, :4]])
    last, seen, found = model.layers[-1], [], []
    last.feed_forward.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    if watched:
        last.register_forward_hook(lambda _, args, y: y + 0.5 * args[0])
    with torch.inference_mode():
        for asked in (None, torch.tensor(wanted, dtype=torch.int64)):
            cache = model.allocate()
            found.append((model.hidden(packed, batch, wanted=asked), cache.data))
    assert torch.equal(found[0][1], found[1][1]) and seen == [9, 9 if watched else max(1, len(wanted))]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found[1][0], found[0][0][wanted], atol=tolerance, rtol=tolerance)


def test_slots_beyond_a_position_are_never_read(llama: Llama, ids: torch.Tensor) -> None:
    """What an earlier, longer prompt left in the cache must not show."""
    clean = llama.model.forward(ids[:, :4], 0), llama.model.forward(ids[:, 4:5], 4)
    llama.model.forward(torch.full((3, 60), 7), 0)
    dirty = llama.model.forward(ids[:, :4], 0), llama.model.forward(ids[:, 4:5], 4)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_forward_refuses_what_does_not_fit(llama: Llama) -> None:
    with pytest.raises(InputError, match=r"start_pos=60 and 5 ids .* max_seq_len=64"):
        llama.model.forward(torch.ones(1, 5, dtype=torch.long), 60)
    with pytest.raises(InputError, match=r"7 rows.*max_batch_size=6"):
        llama.model.forward(torch.ones(7, 1, dtype=torch.long), 0)
    with pytest.raises(InputError, match="vocab_size"):
        Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2))


def test_forward_says_which_ids_and_positions_there_are(llama: Llama) -> None:
    for bad in (384, -1):
        with pytest.raises(InputError, match="ids are 0 to 383"):
            llama.model(torch.tensor([[1, bad]]), 0)
    for bad in (1.0, None, "0"):
        with pytest.raises(InputError, match="it must be a whole number"):
            llama.model(torch.tensor([[1, 5]]), bad)
    logits = llama.model(torch.tensor([[1, 5]]), 0)
    for zero in (torch.tensor(0), np.int64(0)):
        assert torch.equal(llama.model(torch.tensor([[1, 5]]), zero), logits)


def test_a_model_by_itself_can_be_trained() -> None:
    """No checkpoint, no groups: forward is differentiable, and every weight gets a gradient."""
    torch.manual_seed(0)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=8, max_batch_size=2, max_seq_len=8)
    model, ids = Transformer(args), torch.randint(0, 40, (2, 8))
    first = last = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1], 0).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < first


def test_without_the_cache_whole_sequences_give_the_same(llama: Llama, small: SimpleNamespace, ids: torch.Tensor) -> None:
    """More rows than the cache has, and nothing written to it."""
    many = ids.repeat(3, 1)
    llama.model.forward(ids, 0)
    before = llama.model.cache.data.clone()  # type: ignore[union-attr]
    batch = Batch.of((row, 0, 20) for row in range(9))
    logits = llama.model.logits(llama.model.hidden(many.flatten(), batch, keep=False)).view(9, 20, -1)
    torch.testing.assert_close(logits, twin(small, ids).repeat(3, 1, 1), atol=1e-4, rtol=0)
    assert torch.equal(before, llama.model.cache.data)  # type: ignore[union-attr]


def test_rms_norm() -> None:
    norm, x = RMSNorm(6, eps=1e-5), torch.randn(4, 6, dtype=torch.float64).float()
    norm.weight.data.uniform_()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=0)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert norm.eps == 1e-5 and RMSNorm(4).eps == 1e-6


def test_rotary_embedding_turns_adjacent_pairs() -> None:
    freqs = precompute_freqs_cis(8, 10, theta=100.0)
    assert freqs.shape == (10, 4) and freqs.dtype == torch.complex64
    angle = 3 * 100.0 ** (-2 / 8)  # position 3, pair 1
    assert freqs[3, 1].real.item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
    xq, xk = torch.randn(2, 10, 4, 8), torch.randn(2, 10, 2, 8)
    q, k = apply_rotary_emb(xq, xk, freqs)
    for x, y in ((xq, q), (xk, k)):
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * freqs.view(1, 10, 1, 4)
        torch.testing.assert_close(y, torch.view_as_real(turned).flatten(-2), atol=1e-6, rtol=0)
    assert apply_rotary_emb(xq.bfloat16(), xk.bfloat16(), freqs)[0].dtype == torch.bfloat16
    assert reshape_for_broadcast(freqs, torch.zeros(2, 10, 4, 4)).shape == (1, 10, 1, 4)
    with pytest.raises(InputError):
        reshape_for_broadcast(freqs, torch.zeros(2, 9, 4, 4))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kv, groups", [(4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("S, L, starts", [(5, 5, None), (5, 9, [4]), (1, 9, [8, 3]), (1, 9, None), (1, 1, None)])
def test_attend_equals_its_readable_twin(
    kv: int, groups: int, dtype: torch.dtype, tolerance: float, S: int, L: int, starts: list[int] | None
) -> None:
    """The kernel over unexpanded heads, its twin, and the definition: softmax over the slots up to a query's own.

    Whole rows, chunks and steps; `starts`: position of each row's first query, or of all, where a mask says so.
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
    got = attend(q, k, v, mask).float()
    assert got.shape == q.shape
    torch.testing.assert_close(got, attend_plainly(q, k, v, mask).float(), atol=tolerance, rtol=0)

    b, s, head, group = 1, S // 2, kv - 1, groups - 1
    seen = (starts[-1] if starts else L - S) + s + 1
    weights = (k[b, head, :seen].float() @ q[b, s, head, group].float() / hd**0.5).softmax(0)
    torch.testing.assert_close(got[b, s, head, group], weights @ v[b, head, :seen].float(), atol=tolerance, rtol=0)


def test_rotation_and_norm_are_in_float32_whatever_the_dtype() -> None:
    x = torch.randn(3, 2, 8).bfloat16()
    freqs = torch.rand(3, 1, 4, 2)
    assert torch.equal(rotate_(x.clone(), freqs), rotate_(x.float(), freqs).bfloat16())
    assert torch.equal(rotate_plainly(x, freqs), rotate_plainly(x.float(), freqs).bfloat16())
    torch.testing.assert_close(rotate_(x.float(), freqs), rotate_plainly(x.float(), freqs), atol=1e-6, rtol=0)
    norm = RMSNorm(8, eps=1e-5).bfloat16()
    norm.weight.data.uniform_()
    exact = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)
    with torch.no_grad():
        assert torch.equal(norm(x), exact.bfloat16() * norm.weight)
        assert RMSNorm(8, eps=0)(torch.zeros(1, 8)).isnan().all()
    norm, wide = norm.double(), x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    torch.testing.assert_close(norm(wide), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 70])
def test_norms_without_gradients_are_those_with(dtype: torch.dtype, rows: int) -> None:
    """One row and many, from tiny to large. Rounded as from float32: by a factor of x's dtype a third would be others."""
    norm = RMSNorm(2048, eps=1e-5).to(dtype)
    norm.weight.data.uniform_()
    x = (torch.randn(70, 2048) * torch.logspace(-6, 3, 70).unsqueeze(1)).to(dtype)
    want = norm(x)
    with torch.no_grad():
        got = torch.cat([norm(part.view(1, -1, 2048)).flatten(0, 1) for part in x.split(rows)])
    assert got.dtype == dtype
    if dtype != torch.float32:
        assert (got != want).float().mean() < 1e-3
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-7)


def test_rope_theta_and_norm_eps_are_those_of_params_json(tmp_path: Path, small: SimpleNamespace, ids: torch.Tensor) -> None:
    """Code Llama's kind: with the defaults in their place the logits would be others."""
    params = {**small.params, "rope_theta": 100.0, "norm_eps": 0.05}
    llama = Llama.build(write_shards(tmp_path, params, small.weights), small.tokenizer_path, 64, 3, device="cpu")
    want = torch.stack([plain_logits(params, small.weights, row.tolist()) for row in ids])
    torch.testing.assert_close(llama.model.forward(ids, 0), want, atol=1e-4, rtol=0)
    assert (want - twin(small, ids)).abs().max() > 0.1


def test_repeat_kv_repeats_each_head_in_place() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1)
    assert repeat_kv(x, 2).flatten().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "dim, multiple_of, multiplier, width",
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672)],
)
def test_feed_forward_width_of_7b_13b_and_70b(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert ffn_width(4 * dim, multiple_of, multiplier) == width


def test_forward_fills_the_window(llama: Llama) -> None:
    window = llama.model.params.max_seq_len
    ids = torch.randint(3, 300, (1, window))
    whole = llama.model(ids, 0)
    assert whole.shape == (1, window, 384)
    torch.testing.assert_close(llama.model(ids[:, -1:], window - 1)[0, 0], whole[0, -1], atol=1e-4, rtol=1e-4)
    assert llama.model(ids[:0], 0).shape == (0, window, 384)


def test_heads_have_an_even_width() -> None:
    with pytest.raises(InputError, match="even width"):
        Transformer(ModelArgs(dim=6, n_heads=2, n_layers=1, vocab_size=8, multiple_of=1))


def test_rotation_of_many_heads() -> None:
    x, freqs = torch.randn(200, 3, 8, 64), precompute_freqs_cis(64, 3)
    with torch.inference_mode():
        got, _ = apply_rotary_emb(x, x, freqs)
    torch.testing.assert_close(got, rotate_plainly(x, torch.view_as_real(freqs)[:, None]))
