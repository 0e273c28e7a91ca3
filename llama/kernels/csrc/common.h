/* Define the types and functions that all C files share: the arguments of a linear layer, the claiming of tasks by threads,
 * and the quantization of activations to int8. */

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define UNROLL(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16_t;
/* The type of GOMP_parallel, which runs function(argument) on PyTorch's OpenMP threads. Parameters: function, argument,
 * number of threads, flags. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Prefetch the weights that come 16 KiB after the address `weight`: the CPU's hardware prefetcher does not reach that far
 * ahead. */
enum { PREFETCH_DISTANCE = 16384 };
INLINE void prefetch_ahead(const void *weight) { _mm_prefetch((const char *)weight + PREFETCH_DISTANCE, _MM_HINT_T1); }

/* Claim a range of adjacent tasks for the calling thread. Return the first claimed task and set `*end` to the task after the
 * last one; return `tasks` or more if no task is left. A range is 7/8 of a thread's equal share of the remaining tasks. Long
 * ranges let a thread read memory sequentially; the ranges become shorter towards the end, so that no thread waits long for
 * another. */
INLINE long claim_tasks(long *next, long threads, long tasks, long *end) {
  for (long first = __atomic_load_n(next, __ATOMIC_RELAXED);;) {
    const long share = 7 * (tasks - first) / (8 * threads);
    *end = first + (share > 1 ? share : 1);
    if (first >= tasks) return first;
    if (__atomic_compare_exchange_n(next, &first, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return first;
  }
}

/* Return nonzero if the CPU has F16C (float16 conversion). Older compilers do not know F16C in __builtin_cpu_supports. */
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

/* Round to the nearest bfloat16, ties to even. */
INLINE bf16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* ---- linear layers: y (rows, out) = x (rows, in) times the transposed weight (out, in) ---- */

/* Formats of a weight. The first three are also dtypes of activations. c_extension.py defines the same codes. */
enum { BF16, FP16, FP32, INT8, INT4 };

/* Layout of packed weights, in the formats INT8, INT4 and (only for linear_avx512.c) BF16: bytes in an array
 * (out / BLOCK_OUTPUTS, in / inputs_per_word, BLOCK_OUTPUTS, 4). Each word of 4 bytes contains adjacent inputs of one
 * output: 2 inputs for BF16; 4 for INT8, each stored as its value + 128; 8 for INT4, each stored as its value + 8. For INT4,
 * inputs 0 to 3 are in the low halves of the 4 bytes, and inputs 4 to 7 in the high halves. Every `group` inputs of an
 * output share a scale and, in INT4, a zero, which is the weight that the value 0 stands for. */
enum { BLOCK_OUTPUTS = 64, ACTIVATION_GROUP = 32 }; /* ACTIVATION_GROUP: adjacent inputs of x that share a scale */

/* The arguments of the function `linear`. Below, rows = n / int8_per_activation is the number of rows of x. If `format` is
 * FP32, norm, residual and normed point to floats. */
typedef struct LinearArgs {
  long format, x_dtype;     /* format code of the weight, dtype code of x */
  long y_dtype;             /* dtype code of y */
  long int8_per_activation; /* int8 values per activation: 1, or 2 if the second stores the rounding error of the first */
  const void *weight;
  const bf16_t *scales; /* scales (out / 64, in / group, 64); for INT4 (out / 64, in / group, 64, 2), pairs of scale and zero */
  long group, in,
      out;    /* group: inputs that share a scale; in: inputs of a row; out: outputs of a row, after SwiGLU if there is any */
  long gated; /* 1 for SwiGLU: y = silu(first half of the weight's outputs) * second half; otherwise 0 */
  const bf16_t *norm;     /* weight (in) of an RMSNorm of x, or NULL if there is none */
  float eps, unused;      /* eps of the RMSNorm */
  const void *x;          /* input x: (rows, in) */
  void *y;                /* output y: (rows, out) */
  const bf16_t *residual; /* values (rows, out) that are added to the output, or NULL; may be y itself */
  bf16_t *normed;         /* buffer (rows, in) for x after the RMSNorm */
  void *scratch;          /* buffer for x in another form; blocked_linear.py and avx2.py compute its size */
  long n, threads, next;  /* n: rows * int8_per_activation; next: the first task that no thread has claimed */
  const float *parts[3];  /* only FP32 with AVX-512: 1 to 3 parts of the weight, which replace the field `weight` */
  long ends[3];           /* number of outputs up to the end of each part of the weight; multiples of 16 */
  long dequantize; /* 1 to convert int8 or int4 weights to bfloat16 if possible, instead of x to int8: see linear_amx.c */
  long tiled, quantizes_x; /* set by `linear`: 1 if the scratch buffer has x in tiles for AMX, or quantized to int8 */
} LinearArgs;

/* Rows of x, quantized to int8 with a scale for each activation group (ACTIVATION_GROUP inputs). bias: for each activation
 * group, -offset * (sum of its int8 values), which cancels the offset (128 or 8) of the weight's stored values. sums: the
 * sum of the dequantized x in each group of the weight, by which the zeros of INT4 are multiplied. */
typedef struct QuantizedRows {
  int8_t *values; /* shape of values: (n, in) */
  float *scales;  /* shape of scales: (n, in / ACTIVATION_GROUP) */
  int32_t *bias;  /* shape of bias: (n, in / ACTIVATION_GROUP) */
  float *sums;    /* shape of sums: (n, in / group) */
} QuantizedRows;

/* Return the addresses of quantized row `row` in the scratch buffer. */
INLINE QuantizedRows quantized_rows(const LinearArgs *p, long row) {
  const long x_groups = p->in / ACTIVATION_GROUP, groups = p->in / p->group;
  int8_t *values = p->scratch;
  float *scales = (float *)(values + p->n * p->in);
  int32_t *bias = (int32_t *)(scales + p->n * x_groups);
  float *sums = (float *)(bias + p->n * x_groups);
  return (QuantizedRows){values + row * p->in, scales + row * x_groups, bias + row * x_groups, sums + row * groups};
}

/* Convert n values of `dtype` to float32; n must be a multiple of 8. */
INLINE void convert_to_fp32(const void *x, long dtype, long n, float *y) {
  if (dtype == FP32) memcpy(y, x, 4 * n);
  if (dtype == BF16)
    for (long i = 0; i < n; i++) y[i] = as_float((uint32_t)((const bf16_t *)x)[i] << 16);
  if (dtype == FP16)
    for (long i = 0; i < n; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i))));
}

/* Quantize v, the values of one activation group of x, into group x_group of quantized row `row`. If int8_per_activation is
 * 2, replace v by its rounding errors, which a second call quantizes. If v contains NaN or infinity, the scale is not
 * finite, and so all outputs of the row are not finite. */
INLINE void quantize_group(const LinearArgs *p, float v[ACTIVATION_GROUP], long row, long x_group) {
  const QuantizedRows q = quantized_rows(p, row);
  /* The mask clears sign bits, so that magnitudes can be compared as integers. NaN then counts as the largest. */
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i lanes8 = _mm256_setzero_si256(), sum = lanes8, values[4];
  UNROLL(i, 4) lanes8 = _mm256_max_epi32(lanes8, _mm256_and_si256(magnitude, _mm256_loadu_si256((const __m256i *)(v + 8 * i))));
  __m128i lanes4 = _mm_max_epi32(_mm256_castsi256_si128(lanes8), _mm256_extracti128_si256(lanes8, 1));
  lanes4 = _mm_max_epi32(lanes4, _mm_shuffle_epi32(lanes4, 0x4e));
  lanes4 = _mm_max_epi32(lanes4, _mm_shuffle_epi32(lanes4, 0xb1));
  const float largest = as_float(_mm_cvtsi128_si32(lanes4)), scale = (largest < 1e-30f ? 1e-30f : largest) / 127,
              factor = 1 / scale;
  UNROLL(i, 4) {
    const __m256 x = _mm256_loadu_ps(v + 8 * i);
    values[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(factor)));
    sum = _mm256_add_epi32(sum, values[i]);
    if (p->int8_per_activation == 2)
      _mm256_storeu_ps(v + 8 * i, _mm256_sub_ps(x, _mm256_mul_ps(_mm256_cvtepi32_ps(values[i]), _mm256_set1_ps(scale))));
  }
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(values[0], values[1]), _mm256_packs_epi32(values[2], values[3]));
  /* The pack instructions interleave the 128-bit halves of the registers; the permutation restores the order of the inputs. */
  _mm256_storeu_si256((__m256i *)(q.values + x_group * ACTIVATION_GROUP),
                      _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0)));
  lanes4 = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  lanes4 = _mm_add_epi32(lanes4, _mm_shuffle_epi32(lanes4, 0x4e));
  const int32_t total = _mm_cvtsi128_si32(_mm_add_epi32(lanes4, _mm_shuffle_epi32(lanes4, 0xb1)));
  q.scales[x_group] = scale;
  q.bias[x_group] = -(p->format == INT8 ? 128 : 8) * total;
  q.sums[x_group * ACTIVATION_GROUP / p->group] += scale * (float)total;
}

/* Quantize the row at address x into quantized row `row`. If int8_per_activation is 2, the second int8 of each activation goes
 * into row + 1. */
INLINE void quantize_row(const LinearArgs *p, const void *x, long row) {
  const int size = p->x_dtype == FP32 ? 4 : 2;
  for (long d = 0; d < p->int8_per_activation; d++) memset(quantized_rows(p, row + d).sums, 0, p->in / p->group * 4);
  for (long x_group = 0; x_group < p->in / ACTIVATION_GROUP; x_group++) {
    float v[ACTIVATION_GROUP];
    convert_to_fp32((const char *)x + x_group * ACTIVATION_GROUP * size, p->x_dtype, ACTIVATION_GROUP, v);
    for (long d = 0; d < p->int8_per_activation; d++) quantize_group(p, v, row + d, x_group);
  }
}
