/* Causal attention of a prompt's rows in bfloat16, on CPUs with AVX-512's instructions for it.
 *
 * Keys are packed as pairs of features, of 64 keys side by side; values as pairs of positions, of all features side by side. Each
 * thread then takes TILE query rows at a time; their float32 scores stay in the CPU's cache until softmax has made them
 * probabilities in bfloat16. A row's sums have the same order whatever other rows there are. native.py fills the structure; sizes
 * and addresses are not checked here. */

#include "avx512.h"

enum { KEYS = 64, PARTS = KEYS / LANES, TILE = 4 };

typedef struct Prompt {
  const bf16_t *q;             /* (B, S, K, G, hd), of which batch and position have strides */
  const bf16_t *keys, *values; /* (B, K, L, hd), of which batch, head and position have strides */
  bf16_t *y;                   /* (B, S, K, G, hd) */
  bf16_t *room;                /* (2, B, K, blocks, 64, hd), blocks of 64 positions that hold L: packed keys, packed values */
  float *scores;               /* for each thread (TILE, 64 * blocks), and half as much behind it for probabilities */
  long B, S, K, G, hd, L, q_batch, q_stride, kv_batch, kv_head, kv_stride, begun, next; /* begun: threads */
} Prompt;

static inline long blocks(const Prompt *a) { return (a->L + KEYS - 1) / KEYS; }

static void pack_block(void *shared) { /* a thread: the next 64 positions of a head */
  Prompt *a = shared;
  const long n = blocks(a), tasks = a->B * a->K * n, hd = a->hd;
  for (long t; (t = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < tasks;) {
    const long first = t % n * KEYS, head = t / n, here = a->L - first < KEYS ? a->L - first : KEYS;
    const long from = head / a->K * a->kv_batch + head % a->K * a->kv_head + first * a->kv_stride;
    uint32_t *keys = (uint32_t *)(a->room + t * KEYS * hd), *values = (uint32_t *)(a->room + (tasks + t) * KEYS * hd);
    if (here < KEYS) memset(keys, 0, 2 * KEYS * hd), memset(values, 0, 2 * KEYS * hd);
    for (long i = 0; i < here; i++) {
      const uint32_t *key = (const uint32_t *)(a->keys + from + i * a->kv_stride);
      for (long pair = 0; pair < hd / 2; pair++) keys[pair * KEYS + i] = key[pair];
    }
    for (long i = 0; i < here; i += 2) {
      const bf16_t *value = a->values + from + i * a->kv_stride, *next = i + 1 < here ? value + a->kv_stride : 0;
      for (long d = 0; d < hd; d++) values[i / 2 * hd + d] = value[d] | (next ? (uint32_t)next[d] << 16 : 0);
    }
  }
}

/* sum (TILE, 64) += x (TILE, 2 * pairs) times (pairs, 64) pairs, whose rows are `stride` apart. */
INLINE void tile(const bf16_t *const x[TILE], const uint32_t *pairs_of_64, long stride, long pairs, __m512 sum[TILE][PARTS]) {
  for (long k = 0; k < pairs; k++, pairs_of_64 += stride) {
    __m512bh v[PARTS];
    EACH(i, PARTS) v[i] = (__m512bh)_mm512_loadu_si512(pairs_of_64 + LANES * i);
    EACH(r, TILE) {
      int32_t pair;
      memcpy(&pair, x[r] + 2 * k, 4);
      EACH(i, PARTS) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], v[i], (__m512bh)_mm512_set1_epi32(pair));
    }
  }
}

/* Softmax of scores (end), rounded where the reference rounds them: weights in bfloat16, 0 from `end` to `beyond`. */
INLINE void weigh(float *scores, __m512 scale, long end, long beyond, bf16_t *weights) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (long k = 0; k < end; k += LANES) {
    const __m512 score = rounded(_mm512_mul_ps(rounded(_mm512_loadu_ps(scores + k)), scale));
    _mm512_storeu_ps(scores + k, score);
    most = _mm512_mask_max_ps(most, mask(end - k), most, score);
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (long k = 0; k < end; k += LANES) {
    const __m512 e = _mm512_maskz_mov_ps(mask(end - k), exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + k), top)));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(scores + k, e);
  }
  const __m512 by = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
  for (long k = 0; k < beyond; k += LANES)
    store(weights + k, k < end ? _mm512_mul_ps(_mm512_loadu_ps(scores + k), by) : _mm512_setzero_ps());
}

static void attend_tiles(void *shared) { /* a thread: the next rows of a head, those that see the most first */
  Prompt *a = shared;
  const long hd = a->hd, n = blocks(a), rows = a->S * a->G, tiles = (rows + TILE - 1) / TILE, heads = a->B * a->K;
  const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)hd))));
  const long width = n * KEYS;
  float *scores = a->scores + __atomic_fetch_add(&a->begun, 1, __ATOMIC_RELAXED) * TILE * width * 3 / 2;
  bf16_t *weights = (bf16_t *)(scores + TILE * width);
  for (long t; (t = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < heads * tiles;) {
    const long head = t / tiles, first = (tiles - 1 - t % tiles) * TILE, here = rows - first < TILE ? rows - first : TILE;
    const bf16_t *x[TILE], *w[TILE];
    bf16_t *y[TILE];
    long end[TILE];
    EACH(r, TILE) {
      const long row = first + (r < here ? r : 0), s = row / a->G, inner = (head % a->K * a->G + row % a->G) * hd;
      x[r] = a->q + head / a->K * a->q_batch + s * a->q_stride + inner;
      y[r] = a->y + (head / a->K * a->S + s) * a->K * a->G * hd + inner;
      w[r] = weights + r * width, end[r] = a->L - a->S + s + 1;
    }
    const long seen = (end[here - 1] + KEYS - 1) / KEYS;
    const uint32_t *keys = (const uint32_t *)(a->room + head * n * KEYS * hd), *values = keys + heads * n * KEYS * hd / 2;
    for (long b = 0; b < seen; b++) {
      __m512 sum[TILE][PARTS] = {0};
      tile(x, keys + b * KEYS * hd / 2, KEYS, hd / 2, sum);
      EACH(r, TILE) EACH(i, PARTS) _mm512_storeu_ps(scores + r * width + b * KEYS + i * LANES, sum[r][i]);
    }
    for (long r = 0; r < TILE; r++) weigh(scores + r * width, scale, end[r], seen * KEYS, weights + r * width);
    for (long d = 0; d < hd; d += KEYS) {
      __m512 sum[TILE][PARTS] = {0};
      tile(w, values + d, hd, (end[here - 1] + 1) / 2, sum);
      for (long r = 0; r < here; r++)
        EACH(i, PARTS) store(y[r] + d + i * LANES, sum[r][i]);
    }
  }
}

void prompt(Parallel parallel, unsigned threads, const Prompt *given) {
  Prompt a = *given;
  a.next = a.begun = 0;
  parallel(pack_block, &a, threads, 0);
  a.next = 0;
  parallel(attend_tiles, &a, threads, 0);
}

_Static_assert(sizeof(Prompt) == 19 * sizeof(long), "native.c says this size to library.py");
