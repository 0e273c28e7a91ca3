"""Test ragged batches and the KV cache: segments, masks, the rows and positions that are written, and prefill chunks."""

import pytest
import torch

from llama import Llama
from llama.engine.kv_cache import KVCache, RaggedBatch, Segment, kv_view, prefill_chunks, store_kv


def test_neighbouring_rows_of_equal_length_share_a_segment() -> None:
    batch = RaggedBatch.from_segments([(0, 0, 3), (1, 0, 2), (2, 0, 2), (4, 0, 2), (5, 4, 2)])
    assert batch.rows.tolist() == [0, 0, 0, 1, 1, 2, 2, 4, 4, 5, 5]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 4, 5]
    assert batch.segments == (Segment(0, 1, 3, 3), Segment(1, 2, 2, 2), Segment(4, 1, 2, 2), Segment(5, 1, 2, 6))
    assert [s.starts_at_zero for s in batch.segments] == [True, True, True, False]


def test_masks_let_each_token_attend_to_the_positions_up_to_its_own() -> None:
    batch = RaggedBatch.from_segments([(0, 0, 3), (1, 2, 2)])
    prompt, chunk = batch.masks(torch.float32)
    assert prompt is None  # a segment that starts at position 0 needs only the kernel's causal mask
    assert chunk is not None
    assert chunk.shape == (1, 1, 2, 4)
    assert (chunk[0, 0] == 0).tolist() == [[True, True, True, False], [True, True, True, True]]
    (step,) = RaggedBatch.decode(torch.tensor([0, 2]), 4).masks(torch.float32)
    # The decode step reads the first 4 positions of each row.
    assert RaggedBatch.decode(torch.tensor([0, 2]), 4).segments == (Segment(0, 2, 1, 4, True),)
    assert step is not None and (step[:, 0, 0] == 0).tolist() == [[True, False, False, False], [True, True, True, False]]


def test_stored_keys_and_values_are_read_back_as_views_of_the_cache() -> None:
    cache = KVCache(torch.zeros(2, 2, 3, 2, 5, 4))
    kv = torch.randn(3, 2, 2, 4)
    k, v = kv.unbind(1)
    batch = RaggedBatch.from_segments([(1, 0, 2), (2, 3, 1)])
    store_kv(cache.layers[1], batch, kv)
    keys, values = kv_view(cache.layers[1], batch.segments[0])
    assert keys.shape == (1, 2, 2, 4)
    assert torch.equal(keys[0].transpose(0, 1), k[:2]) and torch.equal(values[0].transpose(0, 1), v[:2])
    assert torch.equal(cache.data[1, 0, 2, :, 3], k[2])
    assert cache.data[0].count_nonzero() == 0 and cache.data[1].count_nonzero() == 2 * k.numel()
    assert keys.data_ptr() == cache.data[1, 0, 1].data_ptr()  # keys are a view of the cache, not a copy
    assert torch.equal(cache.views[1][0][1, :2], k[:2]) and torch.equal(cache.views[1][1][2, 3], v[2])


def test_the_cache_tensors_of_the_layers_are_views_of_the_kv_cache(llama: Llama) -> None:
    model, cache = llama.model, llama.engine.forward().cache
    args = model.params
    shape = args.max_batch_size, args.max_seq_len, args.kv_heads, args.head_dim
    for layer, (k, v) in zip(model.layers, cache.data, strict=True):
        for cached, data in ((layer.attention.cache_k, k), (layer.attention.cache_v, v)):
            assert tuple(cached.shape) == shape
            assert cached.data_ptr() == data.data_ptr() and torch.equal(cached.transpose(1, 2), data)


def test_a_cache_tensor_that_the_caller_replaced_is_copied_into_a_new_kv_cache(llama: Llama) -> None:
    model = llama.model
    cache = llama.engine.forward().cache
    assert llama.engine.forward().cache is cache and cache.belongs_to(model)
    cache.record_version()
    replacement = torch.randn_like(model.layers[1].attention.cache_v)
    model.layers[1].attention.cache_v = replacement
    assert cache.is_unchanged() and not cache.belongs_to(model)
    adopted = llama.engine.forward().cache
    assert adopted is not cache and adopted.belongs_to(model) and not any(adopted.prefixes.tokens)
    assert torch.equal(adopted.data[1, 1], replacement.transpose(1, 2)) and torch.equal(adopted.data[0], cache.data[0])
    adopted.record_version()
    model.layers[1].attention.cache_v[0, 0] = 1
    assert not adopted.is_unchanged()


def test_prefill_chunks_split_the_prompts_in_order() -> None:
    assert list(prefill_chunks([3, 5, 1], 4)) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)], [(2, 0, 1)]]
    assert list(prefill_chunks([10], 4)) == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)]]
    assert list(prefill_chunks([9], 4)) == [[(0, 0, 4)], [(0, 4, 3)], [(0, 7, 2)]]  # no single token at the end
    assert list(prefill_chunks([2, 2], 4)) == [[(0, 0, 2), (1, 0, 2)]]


@pytest.mark.parametrize("chunk_size, alignment", [(1, 1), (8, 1), (8, 2), (8, 4), (8, 8), (4, 128), (9, 4)])
def test_prefill_chunks_start_at_multiples_of_the_attention_chunk(chunk_size: int, alignment: int) -> None:
    lengths = [3, 9, 1, 0, 20, 4, 8, 17]
    chunks = list(prefill_chunks(lengths, chunk_size, alignment))
    pieces = [piece for chunk in chunks for piece in chunk]
    assert all(0 < sum(n for _, _, n in chunk) <= chunk_size for chunk in chunks)
    assert all(start % min(chunk_size, alignment) == 0 for _, start, _ in pieces)
    assert [(row, position) for row, n in enumerate(lengths) for position in range(n)] == [
        (row, position) for row, start, n in pieces for position in range(start, start + n)
    ]
