/* Pack weights into the block layout of common.h, and quantize them to int8 or int4 with the same results as
 * llama/quantization/quantize.py. blocked_linear.py fills PackArgs; the C code checks neither sizes nor addresses. */

#include "common.h"

/* MAX_GROUP: the largest number of inputs in a group. quantize_int4 tries N_CUTS cuts of each end of a range, and N_REFITS
 * least-squares refits. */
enum { MAX_GROUP = 128, N_CUTS = 4, N_REFITS = 3 };

typedef struct PackArgs {
  long format, dtype;      /* format code of the packed weight, dtype code of the rows */
  const void *const *rows; /* addresses of the weight's rows (out), each with `in` values */
  uint8_t *weight;         /* the packed weight (layout: common.h), with padding to whole blocks and groups */
  bf16_t *scales;          /* scales of the packed weight; for INT4, pairs of scale and zero */
  long group, in;          /* group: inputs that share a scale; in: inputs of a row */
  long width, out, next;   /* width: inputs with padding; out: outputs; next: the first block that no thread has claimed */
} PackArgs;

INLINE float bf16_to_fp32(bf16_t x) { return as_float((uint32_t)x << 16); }
INLINE __m256 broadcast(float x) { return _mm256_set1_ps(x); }
INLINE __m256 round_and_clamp(__m256 x, float low, float high) {
  return _mm256_max_ps(broadcast(low),
                       _mm256_min_ps(broadcast(high), _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}

/* Add the 8 lanes in ascending order, as quantize.py does. */
INLINE float sum_lanes(__m256 x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, x);
  for (int j = 1; j < 8; j++) lanes[0] += lanes[j];
  return lanes[0];
}

/* Set `low` and `high` to the smallest and largest of `group` values. */
INLINE void min_and_max(const float *v, long group, float *low, float *high) {
  __m256 minimum = _mm256_loadu_ps(v), maximum = minimum;
  for (long i = 8; i < group; i += 8) {
    minimum = _mm256_min_ps(minimum, _mm256_loadu_ps(v + i));
    maximum = _mm256_max_ps(maximum, _mm256_loadu_ps(v + i));
  }
  float lanes[2][8];
  _mm256_storeu_ps(lanes[0], minimum);
  _mm256_storeu_ps(lanes[1], maximum);
  *low = lanes[0][0], *high = lanes[1][0];
  for (int j = 1; j < 8; j++) {
    *low = lanes[0][j] < *low ? lanes[0][j] : *low;
    *high = lanes[1][j] > *high ? lanes[1][j] : *high;
  }
}

/* Quantize a group to int8. The largest magnitude becomes 127, even if rounding to bfloat16 makes the scale smaller. */
static void quantize_int8(const float *v, long group, uint8_t *bytes, bf16_t *scales) {
  float low, high;
  min_and_max(v, group, &low, &high);
  const float largest = high > -low ? high : -low, exact_scale = largest / 127;
  *scales = to_bf16(exact_scale < 1e-30f ? 1e-30f : exact_scale);
  const __m256 scale = broadcast(bf16_to_fp32(*scales));
  int32_t values[MAX_GROUP];
  for (long i = 0; i < group; i += 8)
    _mm256_storeu_si256((__m256i *)(values + i),
                        _mm256_cvtps_epi32(round_and_clamp(_mm256_div_ps(_mm256_loadu_ps(v + i), scale), -127, 127)));
  for (long i = 0; i < group; i++) bytes[i] = (uint8_t)(values[i] + 128);
}

/* A scale and a zero for INT4, with the sum of the squared errors in a group. */
typedef struct Int4Fit {
  float scale, zero, error;
} Int4Fit;

/* Return the int4 values of 8 weights, as float32; `factor` is 1 / scale. */
INLINE __m256 quantize_8_values(const float *v, float factor, float zero) {
  return round_and_clamp(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(v), broadcast(zero)), broadcast(factor)), -8, 7);
}

/* Replace `best` by this scale and zero, rounded to bfloat16, if their squared error is smaller. */
INLINE void try_scale(const float *v, long group, float scale, float zero, Int4Fit *best) {
  const float s = bf16_to_fp32(to_bf16(scale < 1e-30f ? 1e-30f : scale)), z = bf16_to_fp32(to_bf16(zero)), factor = 1 / s;
  __m256 errors = _mm256_setzero_ps();
  for (long i = 0; i < group; i += 8) {
    const __m256 value = _mm256_add_ps(_mm256_mul_ps(quantize_8_values(v + i, factor, z), broadcast(s)), broadcast(z));
    const __m256 d = _mm256_sub_ps(value, _mm256_loadu_ps(v + i));
    errors = _mm256_add_ps(errors, _mm256_mul_ps(d, d));
  }
  const float error = sum_lanes(errors);
  if (error < best->error) *best = (Int4Fit){s, z, error};
}

/* Quantize a group to int4 with the scale and zero of the smallest squared error. The candidates are ranges with each end
 * cut off by 0, 2, 4 or 6% of the full range, followed by least-squares refits of the best candidate. */
static void quantize_int4(const float *v, long group, uint8_t *bytes, bf16_t *scales) {
  float low, high;
  min_and_max(v, group, &low, &high);
  Int4Fit best = {1e-30f, 0, INFINITY};
  for (int a = 0; a < N_CUTS; a++)
    for (int b = 0; b < N_CUTS; b++) {
      const float range_low = low + a * 0.02f * (high - low), range_high = high - b * 0.02f * (high - low),
                  scale = (range_high - range_low) / 15;
      try_scale(v, group, scale, range_low + 8 * scale, &best);
    }
  __m256 x = _mm256_setzero_ps();
  for (long i = 0; i < group; i += 8) x = _mm256_add_ps(x, _mm256_loadu_ps(v + i));
  for (int refit = 0; refit < N_REFITS; refit++) {
    __m256 q = _mm256_setzero_ps(), qq = q, qx = q;
    for (long i = 0; i < group; i += 8) {
      const __m256 n = quantize_8_values(v + i, 1 / best.scale, best.zero);
      q = _mm256_add_ps(q, n);
      qq = _mm256_add_ps(qq, _mm256_mul_ps(n, n));
      qx = _mm256_add_ps(qx, _mm256_mul_ps(n, _mm256_loadu_ps(v + i)));
    }
    const float sum_q = sum_lanes(q), sum_x = sum_lanes(x), denominator = group * sum_lanes(qq) - sum_q * sum_q;
    const float scale = (group * sum_lanes(qx) - sum_q * sum_x) / denominator;
    if (!(denominator > 0 && scale > 1e-30f)) continue;
    try_scale(v, group, scale, (sum_x - bf16_to_fp32(to_bf16(scale)) * sum_q) / group, &best);
  }
  scales[0] = to_bf16(best.scale), scales[1] = to_bf16(best.zero);
  int32_t values[MAX_GROUP];
  for (long i = 0; i < group; i += 8)
    _mm256_storeu_si256((__m256i *)(values + i), _mm256_cvtps_epi32(quantize_8_values(v + i, 1 / best.scale, best.zero)));
  for (long i = 0; i < group; i++) bytes[i] = (uint8_t)(values[i] + 8);
}

/* Pack inputs k to k + count - 1 of the BLOCK_OUTPUTS rows of block b. In the block, each word of 4 bytes is followed by the
 * word of the next row. */
static void pack_columns(const PackArgs *p, long b, long k, long count) {
  uint8_t bytes[BLOCK_OUTPUTS][2 * MAX_GROUP] __attribute__((aligned(64)));
  const long inputs_per_word = p->format == BF16 ? 2 : p->format == INT8 ? 4 : 8, size = p->dtype == FP32 ? 4 : 2;
  const long n_inputs = p->in - k < count ? p->in - k : count;
  bf16_t *scales =
      p->scales + (p->format == INT4 ? 2 : 1) * (b * BLOCK_OUTPUTS * (p->width / p->group) + k / p->group * BLOCK_OUTPUTS);
  for (long o = 0; o < BLOCK_OUTPUTS; o++) {
    const char *row =
        b * BLOCK_OUTPUTS + o < p->out && n_inputs > 0 ? (const char *)p->rows[b * BLOCK_OUTPUTS + o] + k * size : 0;
    if (p->format == BF16) {
      memset(bytes[o], 0, 2 * count);
      if (row) memcpy(bytes[o], row, 2 * n_inputs);
      continue;
    }
    float v[MAX_GROUP] = {0};
    if (row && n_inputs == count) convert_to_fp32(row, p->dtype, count, v);
    else if (row) {
      char padded[4 * MAX_GROUP] = {0};
      memcpy(padded, row, n_inputs * size);
      convert_to_fp32(padded, p->dtype, count, v);
    }
    if (p->format == INT8) {
      quantize_int8(v, count, bytes[o], scales + o);
    } else {
      uint8_t values[MAX_GROUP];
      quantize_int4(v, count, values, scales + 2 * o);
      for (long i = 0; i < count; i += 8)
        for (int j = 0; j < 4; j++) bytes[o][i / 2 + j] = values[i + j] | values[i + 4 + j] << 4;
    }
  }
  uint8_t *words = p->weight + (b * p->width + k) / inputs_per_word * 4 * BLOCK_OUTPUTS;
  for (long i = 0; i < count / inputs_per_word; i++)
    for (long o = 0; o < BLOCK_OUTPUTS; o++) memcpy(words + (i * BLOCK_OUTPUTS + o) * 4, bytes[o] + 4 * i, 4);
}

/* The function that each thread runs: pack one block after another. */
static void pack_worker(void *shared) {
  PackArgs *p = shared;
  for (long b; (b = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < (p->out + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;)
    for (long k = 0; k < p->width; k += p->group) pack_columns(p, b, k, p->width - k < p->group ? p->width - k : p->group);
}

void pack_weight(Parallel parallel, unsigned threads, const PackArgs *args) {
  PackArgs p = *args;
  p.next = 0;
  parallel(pack_worker, &p, threads, 0);
}

/* c_extension.py compares these values with the checksum of the C files and with the size of its ctypes structure. */
const long abi_info[] = {SOURCE, sizeof(PackArgs)};

int cpu_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
