/* Weights into the blocks that products.c and avx2.c read (native.h), quantized as quantize.py says, to the same values. blocks.py
 * fills the structure; no size and no address is checked here. */

#include "common.h"

enum { WIDEST = 128, SHARES = 4, REFITS = 3 }; /* inputs of a group; what fit4 tries */

typedef struct Packing {
  long kind, numbers;      /* of the blocks; of the rows */
  const void *const *rows; /* the addresses of the weight's rows, (out), each of `in` numbers */
  uint8_t *weight;         /* the blocks, (width, out rounded up to OUT); weights beyond in and out are packed as if they were 0 */
  bf16_t *scales;
  long group, in, width, out, next;
} Packing;

INLINE float widened(bf16_t x) { return as_float((uint32_t)x << 16); }
INLINE __m256 all(float x) { return _mm256_set1_ps(x); }
INLINE __m256 rounded(__m256 x, float low, float high) {
  return _mm256_max_ps(all(low), _mm256_min_ps(all(high), _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}

/* Sums go by 8 lanes, and these in turn. */
INLINE float total(__m256 x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, x);
  for (int j = 1; j < 8; j++) lanes[0] += lanes[j];
  return lanes[0];
}

INLINE void extremes(const float *v, long group, float *low, float *high) {
  __m256 least = _mm256_loadu_ps(v), most = least;
  for (long i = 8; i < group; i += 8) {
    least = _mm256_min_ps(least, _mm256_loadu_ps(v + i));
    most = _mm256_max_ps(most, _mm256_loadu_ps(v + i));
  }
  float lanes[2][8];
  _mm256_storeu_ps(lanes[0], least);
  _mm256_storeu_ps(lanes[1], most);
  *low = lanes[0][0], *high = lanes[1][0];
  for (int j = 1; j < 8; j++) {
    *low = lanes[0][j] < *low ? lanes[0][j] : *low;
    *high = lanes[1][j] > *high ? lanes[1][j] : *high;
  }
}

/* INT8: the largest magnitude of a group becomes 127, whichever way rounding to bfloat16 moves its scale. */
static void fit8(const float *v, long group, uint8_t *bytes, bf16_t *scales) {
  float low, high;
  extremes(v, group, &low, &high);
  const float largest = high > -low ? high : -low, wanted = largest / 127;
  *scales = to_bf16(wanted < 1e-30f ? 1e-30f : wanted);
  const __m256 scale = all(widened(*scales));
  int32_t values[WIDEST];
  for (long i = 0; i < group; i += 8)
    _mm256_storeu_si256((__m256i *)(values + i),
                        _mm256_cvtps_epi32(rounded(_mm256_div_ps(_mm256_loadu_ps(v + i), scale), -127, 127)));
  for (long i = 0; i < group; i++) bytes[i] = (uint8_t)(values[i] + 128);
}

/* INT4: a scale and a zero, and how much they miss of a group. */
typedef struct Fit {
  float scale, zero, error;
} Fit;

INLINE __m256 rounded_q(const float *v, float factor, float zero) {
  return rounded(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(v), all(zero)), all(factor)), -8, 7);
}

INLINE void attempt(const float *v, long group, float scale, float zero, Fit *best) {
  const float s = widened(to_bf16(scale < 1e-30f ? 1e-30f : scale)), z = widened(to_bf16(zero)), factor = 1 / s;
  __m256 errors = _mm256_setzero_ps();
  for (long i = 0; i < group; i += 8) {
    const __m256 value = _mm256_add_ps(_mm256_mul_ps(rounded_q(v + i, factor, z), all(s)), all(z));
    const __m256 d = _mm256_sub_ps(value, _mm256_loadu_ps(v + i));
    errors = _mm256_add_ps(errors, _mm256_mul_ps(d, d));
  }
  const float error = total(errors);
  if (error < best->error) *best = (Fit){s, z, error};
}

/* The scale and zero of least squared error: of ranges with either end cut by 0, 2, 4 or 6%, then refitted by least squares. */
static void fit4(const float *v, long group, uint8_t *bytes, bf16_t *scales) {
  float low, high;
  extremes(v, group, &low, &high);
  Fit best = {1e-30f, 0, INFINITY};
  for (int a = 0; a < SHARES; a++)
    for (int b = 0; b < SHARES; b++) {
      const float from = low + a * 0.02f * (high - low), to = high - b * 0.02f * (high - low), scale = (to - from) / 15;
      attempt(v, group, scale, from + 8 * scale, &best);
    }
  __m256 x = _mm256_setzero_ps();
  for (long i = 0; i < group; i += 8) x = _mm256_add_ps(x, _mm256_loadu_ps(v + i));
  for (int refit = 0; refit < REFITS; refit++) {
    __m256 q = _mm256_setzero_ps(), qq = q, qx = q;
    for (long i = 0; i < group; i += 8) {
      const __m256 n = rounded_q(v + i, 1 / best.scale, best.zero);
      q = _mm256_add_ps(q, n);
      qq = _mm256_add_ps(qq, _mm256_mul_ps(n, n));
      qx = _mm256_add_ps(qx, _mm256_mul_ps(n, _mm256_loadu_ps(v + i)));
    }
    const float of_q = total(q), of_x = total(x), spread = group * total(qq) - of_q * of_q;
    const float scale = (group * total(qx) - of_q * of_x) / spread;
    if (!(spread > 0 && scale > 1e-30f)) continue;
    attempt(v, group, scale, (of_x - widened(to_bf16(scale)) * of_q) / group, &best);
  }
  scales[0] = to_bf16(best.scale), scales[1] = to_bf16(best.zero);
  int32_t values[WIDEST];
  for (long i = 0; i < group; i += 8)
    _mm256_storeu_si256((__m256i *)(values + i), _mm256_cvtps_epi32(rounded_q(v + i, 1 / best.scale, best.zero)));
  for (long i = 0; i < group; i++) bytes[i] = (uint8_t)(values[i] + 8);
}

/* Columns k to k + count of OUT rows, 4 bytes of each beside those of the next. */
static void block_columns(const Packing *p, long b, long k, long count) {
  uint8_t bytes[OUT][2 * WIDEST] __attribute__((aligned(64)));
  const long per = p->kind == BF16 ? 2 : p->kind == INT8 ? 4 : 8, size = p->numbers == FP32 ? 4 : 2;
  const long there = p->in - k < count ? p->in - k : count;
  bf16_t *scales = p->scales + (p->kind == INT4 ? 2 : 1) * (b * OUT * (p->width / p->group) + k / p->group * OUT);
  for (long o = 0; o < OUT; o++) {
    const char *row = b * OUT + o < p->out && there > 0 ? (const char *)p->rows[b * OUT + o] + k * size : 0;
    if (p->kind == BF16) {
      memset(bytes[o], 0, 2 * count);
      if (row) memcpy(bytes[o], row, 2 * there);
      continue;
    }
    float v[WIDEST] = {0};
    if (row && there == count) to_floats(row, p->numbers, count, v);
    else if (row) {
      char last[4 * WIDEST] = {0};
      memcpy(last, row, there * size);
      to_floats(last, p->numbers, count, v);
    }
    if (p->kind == INT8) {
      fit8(v, count, bytes[o], scales + o);
    } else {
      uint8_t whole[WIDEST];
      fit4(v, count, whole, scales + 2 * o);
      for (long i = 0; i < count; i += 8)
        for (int j = 0; j < 4; j++) bytes[o][i / 2 + j] = whole[i + j] | whole[i + 4 + j] << 4;
    }
  }
  uint8_t *to = p->weight + (b * p->width + k) / per * 4 * OUT;
  for (long i = 0; i < count / per; i++)
    for (long o = 0; o < OUT; o++) memcpy(to + (i * OUT + o) * 4, bytes[o] + 4 * i, 4);
}

static void pack_blocks(void *shared) { /* a thread: the next block */
  Packing *p = shared;
  for (long b; (b = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < (p->out + OUT - 1) / OUT;)
    for (long k = 0; k < p->width; k += p->group) block_columns(p, b, k, p->width - k < p->group ? p->width - k : p->group);
}

void pack(Parallel parallel, unsigned threads, const Packing *given) {
  Packing p = *given;
  p.next = 0;
  parallel(pack_blocks, &p, threads, 0);
}

/* What library.py checks: the sources' checksum and the structure's size; and whether this CPU has it all. */
const long abi_info[] = {SOURCE, sizeof(Packing)};

int cpu_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
