/* What the files of C share: products of rows by weights, and the 8-bit form that quantized weights multiply. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16_t;
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, of PyTorch's own threads */

/* Prefetch what comes 16 kB later: the CPU's own prefetcher looks less far ahead. */
INLINE void ahead(const void *weight) { _mm_prefetch((const char *)weight + 16384, _MM_HINT_T1); }

/* Claim a share of the tasks that are left, one after the other: memory is read in long runs, and no thread waits long. */
INLINE long take(long *next, long threads, long tasks, long *end) {
  for (long first = __atomic_load_n(next, __ATOMIC_RELAXED);;) {
    const long share = 7 * (tasks - first) / (8 * threads);
    *end = first + (share > 1 ? share : 1);
    if (first >= tasks) return first;
    if (__atomic_compare_exchange_n(next, &first, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return first;
  }
}

INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE bf16_t to_bf16(float x) { /* rounded to the nearest, ties to even */
  const uint32_t bits = as_bits(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* ---- products: y (n, out) = x (n, in) times a weight (out, in), transposed ---- */

enum { BF16, FP16, FP32, INT8, INT4 }; /* of a weight; the first three also of x and y */

/* Quantized weights, and in native.c those of BF16, lie in blocks of OUT outputs by all inputs, (out / OUT, in / per, OUT, per):
 * 4 bytes of an output beside 4 of the next. Those hold `per` inputs: 2 of BF16; 4 of INT8, each 128 more than its value; 8 of
 * INT4, each 8 more than its value, input i of the first four in the low half of byte i, of the last four in the high half.
 * A group of `group` inputs has a scale of its own for each output, and in INT4 a zero, what a value of 0 stands for. */
enum { OUT = 64, STEP = 32 }; /* STEP: inputs of x that share a scale */

typedef struct Product {
  long kind, numbers;   /* of the weight; of x and y */
  const void *weight;
  const bf16_t *scales; /* INT8: (out / OUT, in / group, OUT); INT4: (.., 2), scale and zero */
  long group, in, out;  /* where it is gated, out is half of what is multiplied */
  long gated;           /* y = silu(first half of the outputs) * second half */
  const bf16_t *norm;   /* (in), or none: what the rows are normalized by before */
  float eps, unused;
  const void *x;          /* (n, in) */
  void *y;                /* (n, out) */
  const bf16_t *residual; /* (n, out), or none: what is added; may be y */
  bf16_t *normed;         /* room for (n, in) */
  void *room;             /* INT8 and INT4: for n * (in + 12 * in / STEP) bytes; avx2.c's others: for (n, in) floats */
  long n, threads, next;
} Product;

/* Rows of x for quantized weights: 8-bit values and a scale for each STEP inputs. `bias` is what a weight's offset adds to the
 * sum of products of such a step, negated; `sums` are those of the values of each group of the weight, scaled. */
typedef struct Quantized {
  int8_t *values;
  float *scales;
  int32_t *bias;
  float *sums;
} Quantized;

INLINE Quantized quantized(const Product *p, long row) {
  const long steps = p->in / STEP, groups = p->in / p->group;
  int8_t *values = p->room;
  float *scales = (float *)(values + p->n * p->in);
  int32_t *bias = (int32_t *)(scales + p->n * steps);
  float *sums = (float *)(bias + p->n * steps);
  return (Quantized){values + row * p->in, scales + row * steps, bias + row * steps, sums + row * groups};
}

INLINE void to_floats(const void *x, long numbers, long n, float *y) { /* n is a multiple of 8 */
  if (numbers == FP32) memcpy(y, x, 4 * n);
  if (numbers == BF16)
    for (long i = 0; i < n; i++) y[i] = as_float((uint32_t)((const bf16_t *)x)[i] << 16);
  if (numbers == FP16)
    for (long i = 0; i < n; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i))));
}

/* NaN and infinity make a step's scale one of these, and so the row's products. */
INLINE void quantize_row(const Product *p, const void *x, long row) {
  const Quantized q = quantized(p, row);
  const int size = p->numbers == FP32 ? 4 : 2, offset = p->kind == INT8 ? 128 : 8;
  for (long k = 0; k < p->in / p->group; k++) q.sums[k] = 0;
  for (long s = 0; s < p->in / STEP; s++) {
    float v[STEP];
    int32_t most = 0, sum = 0;
    to_floats((const char *)x + s * STEP * size, p->numbers, STEP, v);
    for (int i = 0; i < STEP; i++) {
      const int32_t bits = as_bits(v[i]) & 0x7fffffff; /* in whose order NaN comes last */
      most = bits > most ? bits : most;
    }
    const float largest = as_float(most), scale = (largest < 1e-30f ? 1e-30f : largest) / 127, factor = 1 / scale;
    for (int i = 0; i < STEP; i++) { /* 1.5 * 2^23 leaves a whole number in the last bits */
      const int8_t value = (int8_t)as_bits(v[i] * factor + 12582912.0f);
      q.values[s * STEP + i] = value;
      sum += value;
    }
    q.scales[s] = scale;
    q.bias[s] = -offset * sum;
    q.sums[s * STEP / p->group] += scale * (float)sum;
  }
}
