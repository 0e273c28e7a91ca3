/* A decode step of a few rows in bfloat16 or float32, piece by piece, on CPUs with AVX-512's instructions for bfloat16 and 8
 * bits: weights are read once (products.c), and between them as little as can be.
 *
 * Norms, gates and rotations are rounded and summed as PyTorch does, so that what comes of them is the same to the last bit;
 * attention sums in an order of its own. native.py fills the structures; no size and no address is checked here. */

#include "avx512.h"
#include "fp32.h"

/* ---- rows by themselves: normalized, or gated ---- */

typedef struct Rows {
  long gated;           /* else normalized */
  const bf16_t *x;      /* (n, width), or (n, 2, width): silu of the first times the second */
  const bf16_t *weight; /* (width), of the norm */
  bf16_t *y;            /* (n, width) */
  float eps, unused;
  long n, width, next;
} Rows;

static void row_by_row(void *shared) { /* what a thread does */
  Rows *a = shared;
  const long width = a->width;
  for (long r; (r = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->n;) {
    if (!a->gated) {
      normalize(a->x + r * width, a->weight, a->eps, width, a->y + r * width);
      continue;
    }
    const bf16_t *x = a->x + 2 * r * width;
    for (long k = 0; k < width; k += LANES) store(a->y + r * width + k, gated(load(x + k), load(x + width + k)));
  }
}

void rows(Parallel parallel, unsigned threads, const Rows *given) {
  Rows a = *given;
  a.next = 0;
  parallel(row_by_row, &a, threads < a.n ? threads : a.n, 0);
}

/* ---- attention ---- */

typedef struct Attention {
  void *q;              /* (n, K, G, hd) at a stride; with turns, behind it the id's own keys and values, (2, K, hd) */
  const float *turns;   /* (n, hd / 2, 2), cosines and sines; none: all is turned and written already */
  void *keys, *values;  /* (rows, K, slots, hd) */
  const long *at;       /* (n, 2): row, and the position, which is the last slot that is seen */
  float *scores;        /* room for (n, K, G, slots) */
  void *y;              /* (n, K, G, hd) */
  long numbers;         /* of q, keys, values and y: BF16 or FP32 */
  long n, K, G, hd, slots, q_stride, row_stride, head_stride, next;
} Attention;

INLINE void turn(const int numbers, void *x, const float *turns, long hd) { /* adjacent pairs, as complex numbers, in place */
  for (long k = 0; k < hd; k += LANES) {
    const __m512 v = load_as(numbers, x, k), by = _mm512_loadu_ps(turns + k);
    const __m512 direct = _mm512_mul_ps(v, _mm512_moveldup_ps(by)), across = _mm512_mul_ps(v, _mm512_movehdup_ps(by));
    const __m512 crossed = _mm512_permute_ps(across, 0xb1);
    store_as(numbers, x, k, _mm512_mask_add_ps(_mm512_sub_ps(direct, crossed), 0xaaaa, direct, crossed));
  }
}

/* The products of a query and n keys, 1 or 4. */
INLINE void score(const int numbers, const void *q, const void *keys, long hd, const int n, float *scores) {
  __m512 s[4] = {0};
  if (numbers == FP32)
    for (long k = 0; k < hd; k += LANES)
      EACH(i, n) s[i] = _mm512_fmadd_ps(load_as(FP32, q, k), load_as(FP32, keys, i * hd + k), s[i]);
  else
    for (long k = 0; k < hd; k += 2 * LANES)
      EACH(i, n) s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)_mm512_loadu_si512(element(BF16, q, k)),
                                         (__m512bh)_mm512_loadu_si512(element(BF16, keys, i * hd + k)));
  if (n == 1) *scores = _mm512_reduce_add_ps(s[0]);
  else _mm_storeu_ps(scores, four_totals(s));
}

/* y = the sum of values (end, hd) times weights (end), of n registers of hd. */
INLINE void mix(const int numbers, const float *weights, const void *values, long hd, long end, const int n, void *y) {
  __m512 sum[4] = {0};
  for (long slot = 0; slot < end; slot++)
    EACH(i, n) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[slot]), load_as(numbers, values, slot * hd + i * LANES), sum[i]);
  EACH(i, n) store_as(numbers, y, i * LANES, sum[i]);
}

/* The G queries of a row's key/value head over slots 0..end. */
INLINE void attend_head(const Attention *a, const int numbers, const void *q, const void *keys, const void *values, float *scores,
                        void *y, long end) {
  const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)a->hd))));
  long slot = 0; /* each key is read once */
  for (; slot + 4 <= end; slot += 4)
    for (long g = 0; g < a->G; g++)
      score(numbers, element(numbers, q, g * a->hd), element(numbers, keys, slot * a->hd), a->hd, 4, scores + g * a->slots + slot);
  for (; slot < end; slot++)
    for (long g = 0; g < a->G; g++)
      score(numbers, element(numbers, q, g * a->hd), element(numbers, keys, slot * a->hd), a->hd, 1, scores + g * a->slots + slot);
  for (long g = 0; g < a->G; g++) {
    float *s = scores + g * a->slots;
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long k = 0; k < end; k += LANES) { /* rounded where the reference rounds them */
      const __m512 x = rounded_as(numbers, _mm512_mul_ps(rounded_as(numbers, _mm512_maskz_loadu_ps(mask(end - k), s + k)), scale));
      most = _mm512_mask_max_ps(most, mask(end - k), most, x);
      _mm512_mask_storeu_ps(s + k, mask(end - k), x);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long k = 0; k < end; k += LANES) {
      const __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask(end - k), s + k), top));
      sum = _mm512_mask_add_ps(sum, mask(end - k), sum, e);
      _mm512_mask_storeu_ps(s + k, mask(end - k), e);
    }
    const __m512 by = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    for (long k = 0; k < end; k += LANES)
      _mm512_mask_storeu_ps(s + k, mask(end - k),
                            rounded_as(numbers, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask(end - k), s + k), by)));
    long k = 0;
    for (; k + 4 * LANES <= a->hd; k += 4 * LANES)
      mix(numbers, s, element(numbers, values, k), a->hd, end, 4, element(numbers, y, g * a->hd + k));
    for (; k < a->hd; k += 2 * LANES)
      mix(numbers, s, element(numbers, values, k), a->hd, end, 2, element(numbers, y, g * a->hd + k));
  }
}

INLINE void head_of_row(const Attention *a, const int numbers, long i) {
  const long r = i / a->K, head = i % a->K, group = a->G * a->hd, row = a->at[2 * r], last = a->at[2 * r + 1];
  void *q = element(numbers, a->q, r * a->q_stride + head * group);
  void *keys = element(numbers, a->keys, row * a->row_stride + head * a->head_stride);
  void *values = element(numbers, a->values, row * a->row_stride + head * a->head_stride);
  if (a->turns) {
    const float *turns = a->turns + r * a->hd;
    void *key = element(numbers, a->q, r * a->q_stride + (a->K * a->G + head) * a->hd);
    void *value = element(numbers, key, a->K * a->hd);
    turn(numbers, key, turns, a->hd);
    for (long g = 0; g < a->G; g++) turn(numbers, element(numbers, q, g * a->hd), turns, a->hd);
    memcpy(element(numbers, keys, last * a->hd), key, size_of(numbers) * a->hd);
    memcpy(element(numbers, values, last * a->hd), value, size_of(numbers) * a->hd);
  }
  attend_head(a, numbers, q, keys, values, a->scores + i * a->G * a->slots, element(numbers, a->y, i * group), last + 1);
}

static void heads(void *shared) { /* a thread: the next key/value head of a row */
  Attention *a = shared;
  for (long i; (i = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->n * a->K;) {
    if (a->numbers == FP32) head_of_row(a, FP32, i);
    else head_of_row(a, BF16, i);
  }
}

void attend(Parallel parallel, unsigned threads, const Attention *given) {
  Attention a = *given;
  a.next = 0;
  parallel(heads, &a, threads, 0);
}

/* ---- the layers of a model ---- */

void multiply(Parallel parallel, unsigned threads, const Product *given);

/* Of each layer four products, its norms, gate and residuals among them, and attention after the first. */
void layers(Parallel parallel, unsigned threads, const Product *products, const Attention *attentions, long n) {
  for (const Product *p = products; p < products + 4 * n; p++) {
    multiply(parallel, threads, p);
    if ((p - products) % 4 == 0) attend(parallel, threads, attentions++);
  }
}

/* What library.py checks; and whether this CPU has it all. */
const long abi_info[] = {SOURCE, sizeof(Rows), sizeof(Product), sizeof(Attention), 19 * sizeof(long)};

int cpu_supported(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni") && has_f16c();
}
