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

/* BLOCK_VECTORS: number of registers that contain the outputs of a block; TILE: rows of a tile; TASK_ROWS: rows of x in a
 * task */
enum { LANES = 8, BLOCK_VECTORS = BLOCK_OUTPUTS / LANES, TILE = 3, TASK_ROWS = 32 * TILE };

/* Return a register with the 4 bytes at x in each lane. */
INLINE __m256i broadcast_4_bytes(const int8_t *x) {
  int32_t inputs;
  memcpy(&inputs, x, 4);
  return _mm256_set1_epi32(inputs);
}

/* Compute y for n rows and for the outputs that fill `vectors` registers. INT4 products are added in 16 bits without
 * overflow: a 16-bit lane receives 16 products of at most 15 * 127 for each activation group, in total at most 30,480, which
 * is less than 32,768. */
INLINE void multiply_quantized(const LinearArgs *p, const uint8_t *w, const bf16_t *scales, long first, const int format,
                               const int vectors, const int n, float y[TILE][BLOCK_OUTPUTS]) {
  const QuantizedRows x = quantized_rows(p, first);
  const long x_groups = p->in / ACTIVATION_GROUP, groups = p->in / p->group, x_groups_per_group = p->group / ACTIVATION_GROUP;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8((char)128);
  UNROLL(r, n)
    UNROLL(i, vectors) _mm256_storeu_ps(y[r] + i * LANES, _mm256_setzero_ps());
  for (long g = 0, x_group = 0; g < groups; g++) {
    const bf16_t *group_scales = scales + g * BLOCK_OUTPUTS * (format == INT8 ? 1 : 2);
    for (const long end = x_group + x_groups_per_group; x_group < end; x_group++) {
      __m256i sum[TILE][BLOCK_VECTORS];
      UNROLL(r, n)
        UNROLL(i, vectors) sum[r][i] = _mm256_setzero_si256();
      for (int k = 0; k < ACTIVATION_GROUP; k += format == INT8 ? 4 : 8, w += 4 * BLOCK_OUTPUTS) {
        /* Prefetch every cache line (64 bytes) that is read below: fewer leave a single row waiting for memory (Zen 5). */
        UNROLL(i, vectors / 2) prefetch_ahead(w + 64 * i);
        if (format == INT8) {
          __m256i inputs[TILE];
          UNROLL(r, n) inputs[r] = broadcast_4_bytes(x.values + r * p->in + x_group * ACTIVATION_GROUP + k);
          UNROLL(i, vectors) {
            const __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + 32 * i)), offset),
                          size = _mm256_abs_epi8(v);
            UNROLL(r, n)
              sum[r][i] = _mm256_add_epi32(sum[r][i],
                                           _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(inputs[r], v)), ones));
          }
        } else {
          __m256i inputs[TILE], next_inputs[TILE];
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

/* Compute and store the outputs of block b for n rows, `vectors` registers of outputs at a time. */
INLINE void compute_block_rows(const LinearArgs *p, const int format, long b, long first, const int vectors, const int n) {
  const long groups = p->in / p->group;
  float y[TILE][BLOCK_OUTPUTS];
  for (int begin = 0; begin < BLOCK_OUTPUTS; begin += vectors * LANES) {
    const uint8_t *w = (const uint8_t *)p->weight + b * BLOCK_OUTPUTS * p->in / (format == INT8 ? 1 : 2) + 4 * begin;
    multiply_quantized(p, w, p->scales + (b * BLOCK_OUTPUTS * groups + begin) * (format == INT8 ? 1 : 2), first, format,
                       vectors, n, y);
    for (long r = 0; r < n; r += p->int8_per_activation)
      for (long i = 0; i < vectors * LANES && b * BLOCK_OUTPUTS + begin + i < p->out; i++)
        store_output(p, (first + r) / p->int8_per_activation, b * BLOCK_OUTPUTS + begin + i,
                     p->int8_per_activation == 2 ? y[r][i] + y[r + 1][i] : y[r][i]);
  }
}

/* Call compute_block_rows with a constant format and number of rows, which the compiler needs to unroll loops. */
static void compute_block(const LinearArgs *p, long b, long first, long n) {
  const int format = p->format;
  switch (n) {
    case 1:
      format == INT8 ? compute_block_rows(p, INT8, b, first, BLOCK_VECTORS, 1)
                     : compute_block_rows(p, INT4, b, first, BLOCK_VECTORS, 1);
      break;
    case 2:
      format == INT8 ? compute_block_rows(p, INT8, b, first, BLOCK_VECTORS / 2, 2)
                     : compute_block_rows(p, INT4, b, first, BLOCK_VECTORS / 2, 2);
      break;
    default:
      format == INT8 ? compute_block_rows(p, INT8, b, first, BLOCK_VECTORS / 2, TILE)
                     : compute_block_rows(p, INT4, b, first, BLOCK_VECTORS / 2, TILE);
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
