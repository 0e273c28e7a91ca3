/* What the files of C share: products of rows by weights, and the 8-bit form that quantized weights multiply. */

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16_t;
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, of PyTorch's own threads */

/* Prefetch what comes 16 kB later: the CPU's own prefetcher looks less far ahead. */
enum { AHEAD = 16384 };
INLINE void ahead(const void *weight) { _mm_prefetch((const char *)weight + AHEAD, _MM_HINT_T1); }

/* Claim a share of the tasks that are left, one after the other: memory is read in long runs, and no thread waits long. */
INLINE long take(long *next, long threads, long tasks, long *end) {
  for (long first = __atomic_load_n(next, __ATOMIC_RELAXED);;) {
    const long share = 7 * (tasks - first) / (8 * threads);
    *end = first + (share > 1 ? share : 1);
    if (first >= tasks) return first;
    if (__atomic_compare_exchange_n(next, &first, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return first;
  }
}

/* F16C, which has no name in __builtin_cpu_supports of older compilers. */
static inline int has_f16c(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
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

/* Weights of INT8, INT4 and (in products.c) BF16 lie in blocks of OUT outputs by all inputs, (out / OUT, in / per, OUT, per):
 * 4 bytes of an output beside 4 of the next. Those hold `per` inputs: 2 of BF16; 4 of INT8, each 128 more than its value; 8 of
 * INT4, each 8 more than its value, input i of the first four in the low half of byte i, of the last four in the high half.
 * A group of `group` inputs has a scale of its own for each output, and in INT4 a zero, what a value of 0 stands for. */
enum { OUT = 64, STEP = 32 }; /* STEP: inputs of x that share a scale */

typedef struct Product {
  long kind, numbers;   /* of the weight; of x */
  long y_numbers;       /* of y */
  long digits;          /* 8-bit rows for each row of x: 1, or with INT8 and INT4 2, the second of what the first leaves */
  const void *weight;
  const bf16_t *scales; /* INT8: (out / OUT, in / group, OUT); INT4: (.., 2), scale and zero */
  long group, in, out;  /* where it is gated, out is half of what is multiplied */
  long gated;           /* y = silu(first half of the outputs) * second half */
  const bf16_t *norm;   /* (in), or none: what the rows are normalized by before; this and the others are float with FP32 */
  float eps, unused;
  const void *x;          /* (n / digits, in) */
  void *y;                /* (n / digits, out) */
  const bf16_t *residual; /* (n / digits, out), or none: what is added; may be y */
  bf16_t *normed;         /* buffer for (n / digits, in) */
  void *room;             /* INT8 and INT4: for n * (in + 12 * in / STEP) bytes; avx2.c's others: for (n, in) floats */
  long n, threads, next;  /* n: 8-bit rows, `digits` for each row of x; next: the next task, counted up by the threads */
  const float *parts[3];  /* FP32 with AVX-512: (ends[i] - ends[i - 1], in) each, in place of `weight` */
  long ends[3];           /* the output that follows each part: a multiple of 16 */
} Product;

/* Rows of x, quantized: 8-bit values, and a scale for each STEP inputs. `bias`, for each step, is -offset * (sum of its values),
 * which takes away what the weight's offset (128 or 8) adds. `sums`, for each group of the weight: the sum of its dequantized x. */
typedef struct QuantizedRows {
  int8_t *values;
  float *scales;
  int32_t *bias;
  float *sums;
} QuantizedRows;

INLINE QuantizedRows quantized(const Product *p, long row) {
  const long steps = p->in / STEP, groups = p->in / p->group;
  int8_t *values = p->room;
  float *scales = (float *)(values + p->n * p->in);
  int32_t *bias = (int32_t *)(scales + p->n * steps);
  float *sums = (float *)(bias + p->n * steps);
  return (QuantizedRows){values + row * p->in, scales + row * steps, bias + row * steps, sums + row * groups};
}

INLINE void to_floats(const void *x, long numbers, long n, float *y) { /* n is a multiple of 8 */
  if (numbers == FP32) memcpy(y, x, 4 * n);
  if (numbers == BF16)
    for (long i = 0; i < n; i++) y[i] = as_float((uint32_t)((const bf16_t *)x)[i] << 16);
  if (numbers == FP16)
    for (long i = 0; i < n; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i))));
}

/* Quantize step s of `row`, v. With 2 digits v becomes what rounding left. NaN or infinity in v makes the scale and so all
 * products not finite. */
INLINE void quantize_step(const Product *p, float v[STEP], long row, long s) {
  const QuantizedRows q = quantized(p, row);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff); /* of bits, in whose order NaN comes last */
  __m256i most = _mm256_setzero_si256(), sum = most, values[4];
  EACH(i, 4) most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, _mm256_loadu_si256((const __m256i *)(v + 8 * i))));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float largest = as_float(_mm_cvtsi128_si32(four)), scale = (largest < 1e-30f ? 1e-30f : largest) / 127, factor = 1 / scale;
  EACH(i, 4) {
    const __m256 x = _mm256_loadu_ps(v + 8 * i);
    values[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(factor)));
    sum = _mm256_add_epi32(sum, values[i]);
    if (p->digits == 2)
      _mm256_storeu_ps(v + 8 * i, _mm256_sub_ps(x, _mm256_mul_ps(_mm256_cvtepi32_ps(values[i]), _mm256_set1_ps(scale))));
  }
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(values[0], values[1]), _mm256_packs_epi32(values[2], values[3]));
  _mm256_storeu_si256((__m256i *)(q.values + s * STEP), /* packs_ go by halves of a register */
                      _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0)));
  four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  const int32_t total = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  q.scales[s] = scale;
  q.bias[s] = -(p->kind == INT8 ? 128 : 8) * total;
  q.sums[s * STEP / p->group] += scale * (float)total;
}

INLINE void quantize_row(const Product *p, const void *x, long row) {
  const int size = p->numbers == FP32 ? 4 : 2;
  for (long d = 0; d < p->digits; d++) memset(quantized(p, row + d).sums, 0, p->in / p->group * 4);
  for (long s = 0; s < p->in / STEP; s++) {
    float v[STEP];
    to_floats((const char *)x + s * STEP * size, p->numbers, STEP, v);
    for (long d = 0; d < p->digits; d++) quantize_step(p, v, row + d, s);
  }
}
