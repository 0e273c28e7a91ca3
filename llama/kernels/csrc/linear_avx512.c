/* Products of any number of rows by weights of bfloat16, 8 and 4 bits, on CPUs with AVX-512's instructions for these.
 *
 * A few rows read the weights once, at the rate at which memory gives them. Of many, TILE at a time multiply a block of the weight,
 * which stays in a cache meanwhile. A row's sums go in the same order whatever rows there are beside it. blocks.py fills the
 * structure; no size and no address is checked here. */

#include "avx512.h"

enum {
  PARTS = OUT / LANES, /* registers of a block's outputs */
  TILE = 4,            /* rows at once: their 16 sums, as many partial sums in memory, and what is multiplied */
  CHUNK = 32 * TILE    /* rows of a task */
};

INLINE __m512i spread(const void *x) { /* 4 bytes, to each lane */
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

/* _mm512_dpbusd_epi32, which GCC surrounds with copies of registers. */
INLINE __m512i dot(__m512i sum, __m512i weight, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
  return sum;
}

/* What to prefetch while a block is multiplied. With one tile of rows: the weights AHEAD of it. With several, which find the
 * block in a cache: each tile a share of the next block, so that memory is read all the time. */
typedef struct Ahead {
  const char *from;
  long by, also; /* for each 256 bytes of the block; how far from it another line */
} Ahead;

INLINE Ahead next_block(const Product *p, const void *w, long bytes, long first) {
  const long tiles = (p->n + TILE - 1) / TILE, tile = first / TILE;
  if (tiles == 1 || tiles > CHUNK / TILE) return (Ahead){(const char *)w + AHEAD, 4 * OUT, 0};
  return (Ahead){(const char *)w + bytes + bytes * tile / tiles, 4 * OUT / tiles, 64};
}

INLINE void prefetch(Ahead *next) {
  _mm_prefetch(next->from, _MM_HINT_T1);
  _mm_prefetch(next->from + next->also, _MM_HINT_T1);
  next->from += next->by;
}

/* The kernels: y of outputs 64 b and on, of rows first to first + n. */

INLINE void bf16(const Product *p, long b, long first, const int n, __m512 y[TILE][PARTS]) {
  const bf16_t *w = (const bf16_t *)p->weight + b * OUT * p->in, *x = (const bf16_t *)p->x + first * p->in;
  Ahead next = next_block(p, w, 2 * OUT * p->in, first);
  __m512 sum[TILE][PARTS];
  EACH(r, n) EACH(i, PARTS) sum[r][i] = _mm512_setzero_ps();
  for (long k = 0; k < p->in; k += 2, w += 2 * OUT) {
    prefetch(&next);
    __m512bh v[PARTS];
    EACH(i, PARTS) v[i] = (__m512bh)_mm512_loadu_si512(w + 2 * LANES * i);
    EACH(r, n) {
      const __m512bh pair = (__m512bh)spread(x + r * p->in + k);
      EACH(i, PARTS) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], v[i], pair);
    }
  }
  EACH(r, n) EACH(i, PARTS) y[r][i] = sum[r][i];
}

/* Four inputs of OUT outputs, added to the sums of n rows. */
#define FOUR(k)                                                         \
  EACH(r, n) {                                                          \
    const __m512i four = spread(x.values + r * p->in + s * STEP + (k)); \
    EACH(i, PARTS) sum[r][i] = dot(sum[r][i], v[i], four);              \
  }

/* INT8 and INT4: each step's integer sum is multiplied by x's scale and added up, and a group's total by the weight's scale. */
INLINE void multiply_quantized(const Product *p, long b, long first, const int kind, const int n, __m512 y[TILE][PARTS]) {
  const QuantizedRows x = quantized(p, first);
  const long steps = p->in / STEP, groups = p->in / p->group, of_group = p->group / STEP, per = kind == INT8 ? 4 : 8;
  const uint8_t *w = (const uint8_t *)p->weight + b * OUT * p->in * 4 / per;
  const bf16_t *scales = p->scales + b * OUT * groups * (kind == INT8 ? 1 : 2);
  const __m512i low = _mm512_set1_epi8(15);
  Ahead next = next_block(p, w, OUT * p->in * 4 / per, first);
  float part[TILE][PARTS][LANES] __attribute__((aligned(64)));
  EACH(r, n) EACH(i, PARTS) y[r][i] = _mm512_setzero_ps();
  for (long g = 0, s = 0; g < groups; g++) {
    for (long step = 0; step < of_group; step++, s++) {
      __m512i sum[TILE][PARTS];
      EACH(r, n) EACH(i, PARTS) sum[r][i] = _mm512_set1_epi32(x.bias[r * steps + s]);
      EACH(j, kind == INT8 ? 8 : 4) {
        prefetch(&next);
        __m512i v[PARTS], bytes[PARTS];
        EACH(i, PARTS) {
          bytes[i] = _mm512_loadu_si512(w + 64 * i);
          v[i] = kind == INT8 ? bytes[i] : _mm512_and_si512(bytes[i], low);
        }
        FOUR(per * j)
        if (kind == INT4) {
          EACH(i, PARTS) v[i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), low);
          FOUR(per * j + 4)
        }
        w += 4 * OUT;
      }
      const __mmask16 begun = step ? 0xffff : 0; /* else there is nothing to add to */
      EACH(i, PARTS) EACH(r, n) {
        const __m512 scale = _mm512_set1_ps(x.scales[r * steps + s]), before = _mm512_maskz_load_ps(begun, part[r][i]);
        _mm512_store_ps(part[r][i], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][i]), scale, before));
      }
      __asm__ volatile("" ::: "memory"); /* y and part stay in memory: the registers hold sums */
    }
    EACH(i, PARTS) {
      __m512 scale, zero = _mm512_setzero_ps();
      if (kind == INT8) {
        scale = load(scales + g * OUT + i * LANES);
      } else {
        const __m512i both = _mm512_loadu_si512(scales + 2 * (g * OUT + i * LANES));
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
      }
      EACH(r, n) {
        y[r][i] = _mm512_fmadd_ps(_mm512_load_ps(part[r][i]), scale, y[r][i]);
        if (kind == INT4) y[r][i] = _mm512_fmadd_ps(zero, _mm512_set1_ps(x.sums[r * groups + g]), y[r][i]);
      }
    }
  }
}
INLINE void int8(const Product *p, long b, long first, const int n, __m512 y[TILE][PARTS]) { multiply_quantized(p, b, first, INT8, n, y); }
INLINE void int4(const Product *p, long b, long first, const int n, __m512 y[TILE][PARTS]) { multiply_quantized(p, b, first, INT4, n, y); }

#define ROWS(kernel) /* by the number of rows, which decides how many registers there must be */                  \
  static void __attribute__((noinline))                                                                           \
  kernel##_rows(const Product *p, long b, long first, long n, __m512 y[TILE][PARTS]) {                            \
    switch (n) {                                                                                                  \
      case 1: kernel(p, b, first, 1, y); break;                                                                   \
      case 2: kernel(p, b, first, 2, y); break;                                                                   \
      case 3: kernel(p, b, first, 3, y); break;                                                                   \
      default: kernel(p, b, first, TILE, y);                                                                      \
    }                                                                                                             \
  }
ROWS(bf16)
ROWS(int8)
ROWS(int4)

/* y of 64 outputs of n rows, from the kernel's sums. */
static void outputs(const Product *p, long b, long first, long n) {
  static void (*const kernels[])(const Product *, long, long, long, __m512[TILE][PARTS]) = {bf16_rows, 0, 0, int8_rows, int4_rows};
  __m512 y[TILE][PARTS], up[TILE][PARTS] = {0};
  kernels[p->kind](p, b, first, n, y);
  if (p->gated) kernels[p->kind](p, b + p->out / OUT, first, n, up);
  for (long r = 0; r < n; r += p->digits) EACH(i, PARTS) {
    const long at = (first + r) / p->digits * p->out + b * OUT + i * LANES;
    const __mmask16 those = mask(p->out - b * OUT - i * LANES);
    if (p->digits == 2) y[r][i] = _mm512_add_ps(y[r][i], y[r + 1][i]), up[r][i] = _mm512_add_ps(up[r][i], up[r + 1][i]);
    if (p->y_numbers == FP32) {
      _mm512_mask_storeu_ps((float *)p->y + at, those, y[r][i]);
    } else if (p->y_numbers == FP16) {
      _mm256_mask_storeu_epi16((uint16_t *)p->y + at, those, _mm512_cvtps_ph(y[r][i], 0));
    } else {
      __m512 v = rounded(y[r][i]);
      if (p->gated) v = gated(v, rounded(up[r][i]));
      if (p->residual) v = _mm512_add_ps(widen(_mm256_maskz_loadu_epi16(those, p->residual + at)), v);
      _mm256_mask_storeu_epi16((bf16_t *)p->y + at, those, narrow(v));
    }
  }
}

static void make_ready(void *shared) { /* what a thread does: the next row of x, normalized and quantized */
  Product *p = shared;
  const int size = p->numbers == FP32 ? 4 : 2;
  for (long r; (r = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n / p->digits;) {
    const void *x = (const char *)p->x + r * p->in * size;
    if (p->norm) {
      normalize(x, p->norm, p->eps, p->in, p->normed + r * p->in);
      x = p->normed + r * p->in;
    }
    if (p->kind != BF16) quantize_row(p, x, r * p->digits);
  }
}

#include "tiles.h"

void multiply_fp32(Parallel parallel, unsigned threads, const Product *given);

void multiply(Parallel parallel, unsigned threads, const Product *given) {
  if (given->kind == FP32) return multiply_fp32(parallel, threads, given);
  Product p = *given;
  if (p.norm || p.kind != BF16) prepare(parallel, threads, &p);
  if (p.norm) p.x = p.normed;
  p.next = 0, p.threads = threads;
  parallel(in_tiles, &p, threads, 0);
}
