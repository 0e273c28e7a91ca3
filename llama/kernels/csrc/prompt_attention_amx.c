/* Causal attention for prefill in bfloat16, on CPUs with AMX: as in prompt_attention_avx512.c, with the same packed keys and
 * values, but for 16 query rows at a time, and with exp computed as a power of 2. The sums of a row are added in the same order
 * for any number of rows. */

#include "amx.h"
#include "prompt_attention.h"

/* Scale 64 scores, store them in bfloat16, and return the lane-wise maximum of `largest` and of the first `count` of them.
 * Scores are rounded to bfloat16 before and after the scaling, as in Meta's reference code. */
INLINE __m512 scale_scores(const float *sums, __m512 scale, long count, __m512 largest, bf16_t *scores) {
  __m512 v[4];
  UNROLL(i, 4) {
    v[i] = round_to_bf16(_mm512_mul_ps(round_to_bf16(_mm512_loadu_ps(sums + LANES * i)), scale));
    largest = _mm512_mask_max_ps(largest, tail_mask(count - LANES * i), largest, v[i]);
  }
  UNROLL(i, 2)
    _mm512_storeu_si512(scores + 2 * LANES * i, (__m512i)_mm512_cvtne2ps_pbh(v[2 * i + 1], v[2 * i]));
  return largest;
}

/* Return 2 to the power of x, for x up to 0, with an error of 2e-7. The coefficients are a minimax approximation. */
INLINE __m512 exp2_fp32(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-160), x); /* NaN stays NaN */
  const __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
  static const float coefficients[] = {0.009671513f, 0.055507336f, 0.24022242f, 0.693147f, 1};
  __m512 y = _mm512_set1_ps(0.0013264727f);
  UNROLL(i, 5) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(coefficients[i]));
  return _mm512_scalef_ps(y, n);
}

/* Replace the first kv_len scores by their softmax, and those up to padded_end by 0. powers: a buffer for padded_end floats. */
INLINE void softmax_row(bf16_t *scores, float maximum, long kv_len, long padded_end, float *powers) {
  const __m512 log2_e = _mm512_set1_ps(1.44269504f), largest = _mm512_set1_ps(maximum);
  __m512 sum = _mm512_setzero_ps();
  for (long k = 0; k < kv_len; k += LANES) {
    const __m512 power = exp2_fp32(_mm512_mul_ps(_mm512_sub_ps(load_bf16(scores + k), largest), log2_e)),
                 e = _mm512_maskz_mov_ps(tail_mask(kv_len - k), power);
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(powers + k, e);
  }
  const __m512 factor = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
  for (long k = 0; k < padded_end; k += LANES)
    store_bf16(scores + k, k < kv_len ? _mm512_mul_ps(_mm512_loadu_ps(powers + k), factor) : _mm512_setzero_ps());
}

void prompt_attention_amx_worker(void *shared) {
  PromptAttentionArgs *a = shared;
  const long hd = a->hd, n = n_blocks(a), rows = a->S * a->G, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, heads = a->B * a->K;
  const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)hd))));
  /* 32 more values than needed keep the rows of a tile from sharing a few lines of the cache. */
  const long width = n * BLOCK_KEYS + 32;
  float *powers = a->scores + __atomic_fetch_add(&a->threads_started, 1, __ATOMIC_RELAXED) * a->scores_size;
  bf16_t *scores = (bf16_t *)(powers + width), *q = scores + TILE_ROWS * width;
  float sums[TILE_ROWS][BLOCK_KEYS];
  TileShapes shapes;
  const TileShapes before = begin_tiles(&shapes, TILE_ROWS);
  /* Tiles with the most keys come first, so that the last tasks are short. */
  for (long t; (t = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < heads * tiles;) {
    const long head = t / tiles, first = (tiles - 1 - t % tiles) * TILE_ROWS,
               count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
    bf16_t *y[TILE_ROWS];
    long kv_len[TILE_ROWS];
    __m512 largest[TILE_ROWS];
    for (long r = 0; r < TILE_ROWS; r++) {
      const long row = first + (r < count ? r : 0), s = row / a->G, inner = (head % a->K * a->G + row % a->G) * hd;
      memcpy(q + r * hd, a->q + head / a->K * a->q_batch + s * a->q_stride + inner, 2 * hd);
      y[r] = a->y + (head / a->K * a->S + s) * a->K * a->G * hd + inner;
      kv_len[r] = a->L - a->S + s + 1, largest[r] = _mm512_set1_ps(-INFINITY);
    }
    const long visible_blocks = (kv_len[count - 1] + BLOCK_KEYS - 1) / BLOCK_KEYS;
    const uint32_t *keys = (const uint32_t *)(a->packed_kv + head * n * BLOCK_KEYS * hd),
                   *values = keys + heads * n * BLOCK_KEYS * hd / 2;
    for (long b = 0; b < visible_blocks; b++) {
      multiply_tile((char *)q, 2 * hd, 2 * TILE_INPUTS, (char *)(keys + b * BLOCK_KEYS * hd / 2), STRIDE, hd, 1, (char *)sums);
      for (long r = 0; r < count; r++)
        largest[r] = scale_scores(sums[r], scale, kv_len[r] - b * BLOCK_KEYS, largest[r], scores + r * width + b * BLOCK_KEYS);
    }
    for (long r = 0; r < count; r++)
      softmax_row(scores + r * width, _mm512_reduce_max_ps(largest[r]), kv_len[r], visible_blocks * BLOCK_KEYS, powers);
    for (long d = 0; d < hd; d += BLOCK_KEYS) {
      multiply_tile((char *)scores, 2 * width, 2 * TILE_INPUTS, (char *)(values + d), 4 * hd, kv_len[count - 1], 1,
                    (char *)sums);
      for (long r = 0; r < count; r++)
        for (long i = 0; i < BLOCK_KEYS; i += LANES) store_bf16(y[r] + d + i, _mm512_loadu_ps(sums[r] + i));
    }
  }
  end_tiles(before);
}
