/* Causal attention for prefill in bfloat16, on CPUs with AVX-512 for bfloat16. First, keys and values are packed in blocks
 * of 64 positions: keys as pairs of adjacent features, values as pairs of adjacent positions. Then each thread computes TILE
 * query rows at a time, whose float32 scores stay in the CPU's cache until softmax converts them to bfloat16 probabilities.
 * The sums of a row are added in the same order for any number of rows. avx512.py fills PromptAttentionArgs; the C code
 * checks neither sizes nor addresses. */

#include "avx512.h"
#include "prompt_attention.h"

enum { BLOCK_VECTORS = BLOCK_KEYS / LANES, TILE = 4 };

/* The function that each thread runs: pack one block of 64 positions of one head at a time. */
static void pack_worker(void *shared) {
  PromptAttentionArgs *a = shared;
  const long n = n_blocks(a), tasks = a->B * a->K * n, hd = a->hd;
  for (long t; (t = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < tasks;) {
    const long first = t % n * BLOCK_KEYS, head = t / n, count = a->L - first < BLOCK_KEYS ? a->L - first : BLOCK_KEYS;
    const long offset = head / a->K * a->kv_batch + head % a->K * a->kv_head + first * a->kv_stride;
    uint32_t *keys = (uint32_t *)(a->packed_kv + t * BLOCK_KEYS * hd),
             *values = (uint32_t *)(a->packed_kv + (tasks + t) * BLOCK_KEYS * hd);
    if (count < BLOCK_KEYS) memset(keys, 0, 2 * BLOCK_KEYS * hd), memset(values, 0, 2 * BLOCK_KEYS * hd);
    for (long i = 0; i < count; i++) {
      const uint32_t *key = (const uint32_t *)(a->keys + offset + i * a->kv_stride);
      for (long pair = 0; pair < hd / 2; pair++) keys[pair * BLOCK_KEYS + i] = key[pair];
    }
    for (long i = 0; i < count; i += 2) {
      const bf16_t *value = a->values + offset + i * a->kv_stride, *next = i + 1 < count ? value + a->kv_stride : 0;
      for (long d = 0; d < hd; d++) values[i / 2 * hd + d] = value[d] | (next ? (uint32_t)next[d] << 16 : 0);
    }
  }
}

/* Multiply x (TILE, 2 * pairs) by a matrix (2 * pairs, 64), and add the product to sum (TILE, 64). Each element of the stored
 * matrix (pairs, 64) holds two adjacent inputs of one output; its rows are `stride` elements apart. */
INLINE void multiply_tile(const bf16_t *const x[TILE], const uint32_t *pairs_of_64, long stride, long pairs,
                          __m512 sum[TILE][BLOCK_VECTORS]) {
  for (long k = 0; k < pairs; k++, pairs_of_64 += stride) {
    __m512bh v[BLOCK_VECTORS];
    UNROLL(i, BLOCK_VECTORS) v[i] = (__m512bh)_mm512_loadu_si512(pairs_of_64 + LANES * i);
    UNROLL(r, TILE) {
      int32_t pair;
      memcpy(&pair, x[r] + 2 * k, 4);
      UNROLL(i, BLOCK_VECTORS) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], v[i], (__m512bh)_mm512_set1_epi32(pair));
    }
  }
}

/* Compute softmax(scale * scores) for the first kv_len scores, and store the result in bfloat16, followed by zeros up to
 * position padded_end. Scores are rounded to bfloat16 before and after the scaling, as in Meta's reference code. */
INLINE void softmax_row(float *scores, __m512 scale, long kv_len, long padded_end, bf16_t *weights) {
  __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (long k = 0; k < kv_len; k += LANES) {
    const __m512 score = round_to_bf16(_mm512_mul_ps(round_to_bf16(_mm512_loadu_ps(scores + k)), scale));
    _mm512_storeu_ps(scores + k, score);
    largest = _mm512_mask_max_ps(largest, tail_mask(kv_len - k), largest, score);
  }
  const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (long k = 0; k < kv_len; k += LANES) {
    const __m512 e = _mm512_maskz_mov_ps(tail_mask(kv_len - k), exp_fp32(_mm512_sub_ps(_mm512_loadu_ps(scores + k), maximum)));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(scores + k, e);
  }
  const __m512 factor = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
  for (long k = 0; k < padded_end; k += LANES)
    store_bf16(weights + k, k < kv_len ? _mm512_mul_ps(_mm512_loadu_ps(scores + k), factor) : _mm512_setzero_ps());
}

/* The function that each thread runs: compute one tile of query rows after another. Tiles with the most keys come first, so
 * that the last tasks are short. */
static void prompt_attention_worker(void *shared) {
  PromptAttentionArgs *a = shared;
  const long hd = a->hd, n = n_blocks(a), rows = a->S * a->G, tiles = (rows + TILE - 1) / TILE, heads = a->B * a->K;
  const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)hd))));
  const long width = n * BLOCK_KEYS;
  float *scores = a->scores + __atomic_fetch_add(&a->threads_started, 1, __ATOMIC_RELAXED) * a->scores_size;
  bf16_t *weights = (bf16_t *)(scores + TILE * width);
  for (long t; (t = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < heads * tiles;) {
    const long head = t / tiles, first = (tiles - 1 - t % tiles) * TILE, count = rows - first < TILE ? rows - first : TILE;
    const bf16_t *x[TILE], *w[TILE];
    bf16_t *y[TILE];
    long kv_len[TILE];
    UNROLL(r, TILE) {
      const long row = first + (r < count ? r : 0), s = row / a->G, inner = (head % a->K * a->G + row % a->G) * hd;
      x[r] = a->q + head / a->K * a->q_batch + s * a->q_stride + inner;
      y[r] = a->y + (head / a->K * a->S + s) * a->K * a->G * hd + inner;
      w[r] = weights + r * width, kv_len[r] = a->L - a->S + s + 1;
    }
    const long visible_blocks = (kv_len[count - 1] + BLOCK_KEYS - 1) / BLOCK_KEYS;
    const uint32_t *keys = (const uint32_t *)(a->packed_kv + head * n * BLOCK_KEYS * hd),
                   *values = keys + heads * n * BLOCK_KEYS * hd / 2;
    for (long b = 0; b < visible_blocks; b++) {
      __m512 sum[TILE][BLOCK_VECTORS] = {0};
      multiply_tile(x, keys + b * BLOCK_KEYS * hd / 2, BLOCK_KEYS, hd / 2, sum);
      UNROLL(r, TILE)
        UNROLL(i, BLOCK_VECTORS) _mm512_storeu_ps(scores + r * width + b * BLOCK_KEYS + i * LANES, sum[r][i]);
    }
    for (long r = 0; r < TILE; r++)
      softmax_row(scores + r * width, scale, kv_len[r], visible_blocks * BLOCK_KEYS, weights + r * width);
    for (long d = 0; d < hd; d += BLOCK_KEYS) {
      __m512 sum[TILE][BLOCK_VECTORS] = {0};
      multiply_tile(w, values + d, hd, (kv_len[count - 1] + 1) / 2, sum);
      for (long r = 0; r < count; r++)
        UNROLL(i, BLOCK_VECTORS) store_bf16(y[r] + d + i * LANES, sum[r][i]);
    }
  }
}

void prompt_attention(Parallel parallel, unsigned threads, const PromptAttentionArgs *args) {
  PromptAttentionArgs a = *args;
  a.next = a.threads_started = 0;
  parallel(pack_worker, &a, threads, 0);
  a.next = 0;
  parallel(amx_in_use ? prompt_attention_amx_worker : prompt_attention_worker, &a, threads, 0);
}

_Static_assert(sizeof(PromptAttentionArgs) == 20 * sizeof(long), "decode_avx512.c reports this size to c_extension.py");
