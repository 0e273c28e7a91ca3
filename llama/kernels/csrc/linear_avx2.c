/* Linear layers on CPUs with AVX2. Unpacked float16, bfloat16 and float32 weights (out, in) are read once and multiplied by
 * a few rows in float32; packed int8 and int4 weights (layout: common.h) are multiplied by any number of rows. avx2.py and
 * blocked_linear.py fill LinearArgs; the C code checks neither sizes nor addresses. The sums of a row do not depend on the
 * other rows. */

#include "common.h"
#include "fp32.h"

/* Sizes for unpacked weights. TASK_OUTPUTS: outputs of a task; MAX_TILE: the largest number of rows, and of outputs, in a
 * tile. */
enum { TASK_OUTPUTS = 16, MAX_TILE = 4 };

/* Load 8 values of a format from index k on, converted to float32. */
INLINE __m256 load_as_fp32(const int format, const void *x, long k) {
  if (format == FP32) return _mm256_loadu_ps((const float *)x + k);
  const __m128i values = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + k));
  if (format == FP16) return _mm256_cvtph_ps(values);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

INLINE void store_output(const LinearArgs *p, long r, long o, float y) {
  const long index = r * p->out + o;
  if (p->y_dtype == FP32) ((float *)p->y)[index] = y;
  if (p->y_dtype == FP16) ((uint16_t *)p->y)[index] = _cvtss_sh(y, 0);
  if (p->y_dtype == BF16) ((bf16_t *)p->y)[index] = to_bf16(y);
}

/* Store n outputs of row r, from output o on. */
INLINE void store_outputs(const LinearArgs *p, long r, long o, long n, const float *y) {
  switch (p->y_dtype) {
    case FP32: memcpy((float *)p->y + r * p->out + o, y, 4 * n); break;
    case BF16:
      for (long i = 0; i < n; i++) ((bf16_t *)p->y)[r * p->out + o + i] = to_bf16(y[i]);
      break;
    default:
      for (long i = 0; i < n; i++) ((uint16_t *)p->y)[r * p->out + o + i] = _cvtss_sh(y[i], 0);
  }
}

INLINE float sum_lanes(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* ---- unpacked weights: tiles of m outputs and n rows ---- */

INLINE void multiply_unpacked(const LinearArgs *p, const int format, long o, long first, const int m, const int n) {
  const long bytes = format == FP32 ? 4 : 2;
  const char *w = (const char *)p->weight + o * p->in * bytes;
  const float *x = (const float *)p->scratch + first * p->in;
  __m256 sum[MAX_TILE][MAX_TILE];
  UNROLL(i, m)
    UNROLL(r, n) sum[i][r] = _mm256_setzero_ps();
  for (long k = 0; k < p->in; k += 32)
    UNROLL(i, m) {
      /* Prefetch the weights of the next m outputs. */
      _mm_prefetch(w + ((i + m) * p->in + k) * bytes, _MM_HINT_T1);
      UNROLL(j, 4) {
        const __m256 v = load_as_fp32(format, w + i * p->in * bytes, k + 8 * j);
        UNROLL(r, n) sum[i][r] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + r * p->in + k + 8 * j), sum[i][r]);
      }
    }
  UNROLL(i, m)
    UNROLL(r, n) store_output(p, first + r, o + i, sum_lanes(sum[i][r]));
}

/* Compute outputs `o` to `end` - 1 of n rows: m outputs at a time, then the remaining outputs one by one. */
INLINE void multiply_outputs(const LinearArgs *p, const int format, long o, long end, long first, const int m, const int n) {
  for (; o + m <= end; o += m) multiply_unpacked(p, format, o, first, m, n);
  for (; o < end; o++) multiply_unpacked(p, format, o, first, 1, n);
}

/* Define a kernel for one format that computes outputs `o` to `end` - 1 of all rows. */
#define DEFINE_UNPACKED_KERNEL(name, format)                                                  \
  static void name(const LinearArgs *p, long o, long end) {                                   \
    for (long first = 0; first < p->n; first += MAX_TILE) switch (p->n - first) {             \
        case 1: multiply_outputs(p, format, o, end, first, format == FP32 ? 4 : 2, 1); break; \
        case 2: multiply_outputs(p, format, o, end, first, 2, 2); break;                      \
        case 3: multiply_outputs(p, format, o, end, first, 2, 3); break;                      \
        default: multiply_outputs(p, format, o, end, first, 2, MAX_TILE);                     \
      }                                                                                       \
  }
DEFINE_UNPACKED_KERNEL(unpacked_bf16, BF16)
DEFINE_UNPACKED_KERNEL(unpacked_fp16, FP16)
DEFINE_UNPACKED_KERNEL(unpacked_fp32, FP32)

/* Compute outputs `o` to `end` - 1 of all rows with a float32 weight, on CPUs that also have AVX-512. */
FP32_TARGET static void unpacked_fp32_avx512(const LinearArgs *p, long o, long end) {
  while (o < end) {
    const long m = end - o < FP32_OUTPUTS ? 1 : FP32_OUTPUTS;
    for (long first = 0; first < p->n; first += FP32_ROWS) {
      const long n = p->n - first < FP32_ROWS ? p->n - first : FP32_ROWS;
      __m128 y[FP32_ROWS];
      fp32_multiply((const float *)p->weight + o * p->in, (const float *)p->scratch + first * p->in, p->in, m, n, y);
      for (long r = 0; r < n; r++)
        for (long i = 0; i < m; i++) store_output(p, first + r, o + i, y[r][i]);
    }
    o += m;
  }
}

/* The function that each thread runs: compute claimed ranges of outputs with an unpacked weight. */
static void unpacked_worker(void *shared) {
  LinearArgs *p = shared;
  const int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  static void (*const kernels[])(const LinearArgs *, long, long) = {unpacked_bf16, unpacked_fp16, unpacked_fp32};
  void (*const kernel)(const LinearArgs *, long, long) =
      p->format == FP32 && has_avx512 ? unpacked_fp32_avx512 : kernels[p->format];
  for (long b, end, tasks = (p->out + TASK_OUTPUTS - 1) / TASK_OUTPUTS;
       (b = claim_tasks(&p->next, p->threads, tasks, &end)) < tasks;)
    for (; b < end; b++) kernel(p, b * TASK_OUTPUTS, b + 1 < tasks ? (b + 1) * TASK_OUTPUTS : p->out);
}

/* ---- packed int8 and int4 weights ---- */

/* BLOCK_VECTORS: registers that contain the outputs of a block; TASK_ROWS: rows of x in a task, which `compute_block` gets in
 * one call (TILE). Fewer rows than MIN_MANY_ROWS are multiplied FEW_ROWS at a time, and more rows ROWS at a time. */
enum { LANES = 8, BLOCK_VECTORS = BLOCK_OUTPUTS / LANES, TASK_ROWS = 96, TILE = TASK_ROWS };
enum { MIN_MANY_ROWS = 8, FEW_ROWS = 3, ROWS = 4 };

/* Return a register with the 4 bytes at x in each lane. */
INLINE __m256i broadcast_4_bytes(const int8_t *x) {
  int32_t inputs;
  memcpy(&inputs, x, 4);
  return _mm256_set1_epi32(inputs);
}

/* ---- a few rows: multiply the weight as it is read ---- */

/* Compute y for n rows and for the outputs that fill `vectors` registers. INT4 products are added in 16 bits without
 * overflow: a 16-bit lane receives 16 products of at most 15 * 127 for each activation group, in total at most 30,480, which
 * is less than 32,768. */
INLINE void multiply_quantized(const LinearArgs *p, const uint8_t *w, const bf16_t *scales, long first, const int format,
                               const int vectors, const int n, float y[][BLOCK_OUTPUTS]) {
  const QuantizedRows x = quantized_rows(p, first);
  const long x_groups = p->in / ACTIVATION_GROUP, groups = p->in / p->group, x_groups_per_group = p->group / ACTIVATION_GROUP;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8((char)128);
  UNROLL(r, n)
    UNROLL(i, vectors) _mm256_storeu_ps(y[r] + i * LANES, _mm256_setzero_ps());
  for (long g = 0, x_group = 0; g < groups; g++) {
    const bf16_t *group_scales = scales + g * BLOCK_OUTPUTS * (format == INT8 ? 1 : 2);
    for (const long end = x_group + x_groups_per_group; x_group < end; x_group++) {
      __m256i sum[FEW_ROWS][BLOCK_VECTORS];
      UNROLL(r, n)
        UNROLL(i, vectors) sum[r][i] = _mm256_setzero_si256();
      for (int k = 0; k < ACTIVATION_GROUP; k += format == INT8 ? 4 : 8, w += 4 * BLOCK_OUTPUTS) {
        /* Prefetch every cache line (64 bytes) that is read below: fewer leave a single row waiting for memory (Zen 5). */
        UNROLL(i, vectors / 2) prefetch_ahead(w + 64 * i);
        if (format == INT8) {
          __m256i inputs[FEW_ROWS];
          UNROLL(r, n) inputs[r] = broadcast_4_bytes(x.values + r * p->in + x_group * ACTIVATION_GROUP + k);
          UNROLL(i, vectors) {
            const __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + 32 * i)), offset),
                          size = _mm256_abs_epi8(v);
            UNROLL(r, n)
              sum[r][i] = _mm256_add_epi32(sum[r][i],
                                           _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(inputs[r], v)), ones));
          }
        } else {
          __m256i inputs[FEW_ROWS], next_inputs[FEW_ROWS];
          UNROLL(r, n) {
            inputs[r] = broadcast_4_bytes(x.values + r * p->in + x_group * ACTIVATION_GROUP + k);
            next_inputs[r] = broadcast_4_bytes(x.values + r * p->in + x_group * ACTIVATION_GROUP + k + 4);
          }
          UNROLL(i, vectors) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
            const __m256i v = _mm256_and_si256(bytes, low), u = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
            UNROLL(r, n)
              sum[r][i] = _mm256_add_epi16(
                  sum[r][i], _mm256_add_epi16(_mm256_maddubs_epi16(v, inputs[r]), _mm256_maddubs_epi16(u, next_inputs[r])));
          }
        }
      }
      UNROLL(i, vectors) {
        __m256 scale;
        if (format == INT8) scale = load_as_fp32(BF16, group_scales, i * LANES);
        else
          scale =
              _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(group_scales + 2 * i * LANES)), 16));
        UNROLL(r, n) {
          __m256i v = sum[r][i];
          if (format == INT4)
            v = _mm256_add_epi32(_mm256_madd_epi16(v, ones), _mm256_set1_epi32(x.bias[r * x_groups + x_group]));
          const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(x.scales[r * x_groups + x_group]));
          _mm256_storeu_ps(y[r] + i * LANES, _mm256_fmadd_ps(product, scale, _mm256_loadu_ps(y[r] + i * LANES)));
        }
      }
    }
    if (format == INT4)
      UNROLL(i, vectors) {
        const __m256i scales_and_zeros = _mm256_loadu_si256((const __m256i *)(group_scales + 2 * i * LANES));
        const __m256 zero = _mm256_castsi256_ps(_mm256_and_si256(scales_and_zeros, _mm256_set1_epi32((int)0xffff0000)));
        UNROLL(r, n)
          _mm256_storeu_ps(y[r] + i * LANES,
                           _mm256_fmadd_ps(zero, _mm256_set1_ps(x.sums[r * groups + g]), _mm256_loadu_ps(y[r] + i * LANES)));
      }
  }
}

/* Compute y of block b for n rows, at most FEW_ROWS, `vectors` registers of outputs at a time. */
INLINE void multiply_few_rows(const LinearArgs *p, const int format, long b, long first, const int vectors, const int n,
                              float y[][BLOCK_OUTPUTS]) {
  const long groups = p->in / p->group;
  for (int begin = 0; begin < BLOCK_OUTPUTS; begin += vectors * LANES) {
    const uint8_t *w = (const uint8_t *)p->weight + b * BLOCK_OUTPUTS * p->in / (format == INT8 ? 1 : 2) + 4 * begin;
    float part[FEW_ROWS][BLOCK_OUTPUTS];
    multiply_quantized(p, w, p->scales + (b * BLOCK_OUTPUTS * groups + begin) * (format == INT8 ? 1 : 2), first, format,
                       vectors, n, part);
    UNROLL(r, n) memcpy(y[r] + begin, part[r], vectors * LANES * sizeof(float));
  }
}

/* ---- many rows: unpack the weights of an activation group once, and multiply them by all rows of a task ---- */

/* STEPS: steps in which the inputs of an activation group are multiplied. A step multiplies the 4 bytes of each lane: two
 * 16-bit inputs for INT8, four 8-bit inputs for INT4. */
INLINE int steps(const int format) { return format == INT8 ? ACTIVATION_GROUP / 2 : ACTIVATION_GROUP / 4; }

/* The weights of one activation group, unpacked, and where to find the rows of x. */
typedef struct UnpackedGroup {
  __m256i values[BLOCK_VECTORS / 2][ACTIVATION_GROUP / 2][2]; /* 2 registers for each step, in the order of reading */
  __m256 scales[BLOCK_VECTORS], zeros[BLOCK_VECTORS];         /* of the weight's group; zeros only for INT4 */
  QuantizedRows x;                                            /* the activation group in the first row of the task */
  long in, x_groups, groups; /* distances between rows of x: of values, of scales and biases, of sums */
  int ends_group;            /* 1 if a group of the weight ends here */
} UnpackedGroup;

/* Extend the bytes of x to 16 bits: bytes 0 and 2 of each lane into even, bytes 1 and 3 into odd. */
INLINE void split_bytes(__m256i x, __m256i *even, __m256i *odd) {
  *even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  *odd = _mm256_srai_epi16(x, 8);
}

/* Multiply 2 registers of weights by the 4 bytes at x, and add the products to their sums: for each lane 2 products of 16 bits
 * (INT8), or for each half of a lane 2 products of 8 bits (INT4). Written in assembly because GCC loads x for all steps ahead,
 * for which there are too few registers. */
INLINE void add_products(const int format, __m256i sum[2], __m256i w0, __m256i w1, const int32_t *x) {
  __m256i inputs, products;
#define ADD_PRODUCTS(multiply, add)                                                                                 \
  __asm__("vpbroadcastd %6, %2\n\t" multiply " %2, %4, %3\n\t" add " %3, %0, %0\n\t" multiply " %2, %5, %3\n\t" add \
          " %3, %1, %1"                                                                                             \
          : "+&x"(sum[0]), "+&x"(sum[1]), "=&x"(inputs), "=&x"(products)                                            \
          : "x"(w0), "x"(w1), "m"(*x))
  if (format == INT8) ADD_PRODUCTS("vpmaddwd", "vpaddd");
  else ADD_PRODUCTS("vpmaddubsw", "vpaddw");
}

/* Unpack the words w of one activation group, and the scales and zeros of its weight's group. */
INLINE void unpack_group(const int format, const uint8_t *w, const bf16_t *scales, UnpackedGroup *u) {
  const __m256i low = _mm256_set1_epi8(15), offset = _mm256_set1_epi8((char)128);
  for (int word = 0; word < steps(format) / 2; word++, w += 4 * BLOCK_OUTPUTS)
    UNROLL(i, BLOCK_VECTORS) {
      prefetch_ahead(w + 32 * i);
      const __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
      __m256i *value = &u->values[i / 2][2 * word][i % 2], *next = &u->values[i / 2][2 * word + 1][i % 2];
      if (format == INT8) split_bytes(_mm256_xor_si256(bytes, offset), value, next);
      else *value = _mm256_and_si256(bytes, low), *next = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    }
  UNROLL(i, BLOCK_VECTORS) {
    if (format == INT8) {
      u->scales[i] = load_as_fp32(BF16, scales, i * LANES);
    } else {
      const __m256i pairs = _mm256_loadu_si256((const __m256i *)(scales + 2 * i * LANES));
      u->scales[i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      u->zeros[i] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
    }
  }
}

/* Add the products of n rows, from row `row` of the task on, and at the end of a weight's group the zeros, to y. */
INLINE void multiply_group(const int format, const UnpackedGroup *u, long row, const int n, float y[][BLOCK_OUTPUTS]) {
  const int8_t *values = u->x.values + row * u->in;
  const float *scales = u->x.scales + row * u->x_groups, *sums = u->x.sums + row * u->groups;
  const int32_t *bias = u->x.bias + row * u->x_groups;
  const __m256i ones = _mm256_set1_epi16(1);
  int32_t inputs[ROWS][ACTIVATION_GROUP / 2] __attribute__((aligned(32))); /* the 4 bytes of each row and step */
  UNROLL(r, n) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)(values + r * u->in));
    __m256i even = bytes, odd;
    if (format == INT8) {
      /* Steps alternate between even and odd inputs, as `unpack_group` orders the weights. */
      split_bytes(bytes, &even, &odd);
      const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
      _mm256_store_si256((__m256i *)inputs[r], _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_store_si256((__m256i *)inputs[r] + 1, _mm256_permute2x128_si256(low, high, 0x31));
    } else {
      _mm256_store_si256((__m256i *)inputs[r], bytes);
    }
  }
  for (int pair = 0; pair < BLOCK_VECTORS / 2; pair++) {
    __m256i sum[ROWS][2];
    UNROLL(r, n) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int step = 0; step < steps(format); step++) {
      const __m256i w0 = u->values[pair][step][0], w1 = u->values[pair][step][1];
      UNROLL(r, n) add_products(format, sum[r], w0, w1, &inputs[r][step]);
    }
    UNROLL(r, n) {
      const __m256 x_scale = _mm256_set1_ps(scales[r * u->x_groups]);
      UNROLL(i, 2) {
        float *total = y[row + r] + (2 * pair + i) * LANES;
        __m256i v = sum[r][i];
        if (format == INT4) v = _mm256_add_epi32(_mm256_madd_epi16(v, ones), _mm256_set1_epi32(bias[r * u->x_groups]));
        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(v), x_scale);
        __m256 value = _mm256_fmadd_ps(product, u->scales[2 * pair + i], _mm256_loadu_ps(total));
        if (format == INT4 && u->ends_group)
          value = _mm256_fmadd_ps(u->zeros[2 * pair + i], _mm256_set1_ps(sums[r * u->groups]), value);
        _mm256_storeu_ps(total, value);
      }
    }
  }
}

/* Define a function that multiplies n rows, ROWS at a time. It is not inlined, so that the registers are free for the sums. */
#define DEFINE_MULTIPLY_GROUP(name, format)                                                              \
  static void __attribute__((noinline)) name(const UnpackedGroup *u, long n, float y[][BLOCK_OUTPUTS]) { \
    long row = 0;                                                                                        \
    for (; row + ROWS <= n; row += ROWS) multiply_group(format, u, row, ROWS, y);                        \
    switch (n - row) {                                                                                   \
      case 1: multiply_group(format, u, row, 1, y); break;                                               \
      case 2: multiply_group(format, u, row, 2, y); break;                                               \
      case 3: multiply_group(format, u, row, 3, y);                                                      \
    }                                                                                                    \
  }
DEFINE_MULTIPLY_GROUP(multiply_int8_group, INT8)
DEFINE_MULTIPLY_GROUP(multiply_int4_group, INT4)

/* Compute y of block b for n rows, at most TASK_ROWS. */
INLINE void multiply_many_rows(const LinearArgs *p, const int format, long b, long first, long n, float y[][BLOCK_OUTPUTS]) {
  const long x_groups = p->in / ACTIVATION_GROUP, groups = p->in / p->group, x_groups_per_group = p->group / ACTIVATION_GROUP,
             group_bytes = BLOCK_OUTPUTS * ACTIVATION_GROUP / (format == INT8 ? 1 : 2);
  const uint8_t *w = (const uint8_t *)p->weight + b * x_groups * group_bytes;
  const bf16_t *scales = p->scales + b * groups * BLOCK_OUTPUTS * (format == INT8 ? 1 : 2);
  UnpackedGroup u = {.x = quantized_rows(p, first), .in = p->in, .x_groups = x_groups, .groups = groups};
  memset(y, 0, n * sizeof(*y));
  for (long g = 0; g < groups; g++, u.x.sums++, scales += BLOCK_OUTPUTS * (format == INT8 ? 1 : 2))
    for (long i = 1; i <= x_groups_per_group; i++, w += group_bytes) {
      unpack_group(format, w, scales, &u);
      u.ends_group = i == x_groups_per_group;
      (format == INT8 ? multiply_int8_group : multiply_int4_group)(&u, n, y);
      u.x.values += ACTIVATION_GROUP, u.x.scales++, u.x.bias++;
    }
}

/* Compute y of block b for n rows, at most TASK_ROWS. The numbers of rows are constants, which the compiler needs to unroll
 * loops. */
INLINE void multiply_block(const LinearArgs *p, const int format, long b, long first, long n, float y[][BLOCK_OUTPUTS]) {
  if (n >= MIN_MANY_ROWS) return multiply_many_rows(p, format, b, first, n, y);
  for (long r = 0; r < n; r += FEW_ROWS) switch (n - r) {
      case 1: multiply_few_rows(p, format, b, first + r, BLOCK_VECTORS, 1, y + r); break;
      case 2: multiply_few_rows(p, format, b, first + r, BLOCK_VECTORS / 2, 2, y + r); break;
      default: multiply_few_rows(p, format, b, first + r, BLOCK_VECTORS / 2, FEW_ROWS, y + r);
    }
}

/* Compute and store the outputs of block b for n rows. */
static void compute_block(const LinearArgs *p, long b, long first, long n) {
  float y[TASK_ROWS][BLOCK_OUTPUTS] __attribute__((aligned(64)));
  if (p->format == INT8) multiply_block(p, INT8, b, first, n, y);
  else multiply_block(p, INT4, b, first, n, y);
  const long o = b * BLOCK_OUTPUTS, count = p->out - o < BLOCK_OUTPUTS ? p->out - o : BLOCK_OUTPUTS;
  for (long r = 0; r < n; r += p->int8_per_activation) {
    if (p->int8_per_activation == 2)
      for (long i = 0; i < BLOCK_OUTPUTS; i++) y[r][i] += y[r + 1][i];
    store_outputs(p, (first + r) / p->int8_per_activation, o, count, y[r]);
  }
}

/* The function that each thread runs: quantize rows of x to int8, or convert them to float32. */
static void prepare_rows_worker(void *shared) {
  LinearArgs *p = shared;
  const int size = p->x_dtype == FP32 ? 4 : 2;
  for (long r; (r = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n / p->int8_per_activation;) {
    const char *x = (const char *)p->x + r * p->in * size;
    if (p->format == INT8 || p->format == INT4) quantize_row(p, x, r * p->int8_per_activation);
    else convert_to_fp32(x, p->x_dtype, p->in, (float *)p->scratch + r * p->in);
  }
}

#include "tiles.h"

void linear(Parallel parallel, unsigned threads, const LinearArgs *args) {
  LinearArgs p = *args;
  prepare_rows(parallel, threads, &p);
  parallel(p.format == INT8 || p.format == INT4 ? blocks_worker : unpacked_worker, &p, threads, 0);
}

/* c_extension.py compares these values with the checksum of the C files and with the size of its ctypes structure. */
const long abi_info[] = {SOURCE, sizeof(LinearArgs)};

int cpu_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
