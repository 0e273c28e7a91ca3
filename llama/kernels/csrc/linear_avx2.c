/* Products on CPUs with AVX2: of a few rows by weights of 32 and 16 bits as they lie, (out, in), read once and multiplied in
 * float32; and of any number of rows by weights of 8 and 4 bits that lie in blocks (native.h). avx2.py and blocks.py fill the
 * structure; no size and no address is checked here. A row's sums are the same whatever rows there are beside it. */

#include "common.h"
#include "fp32.h"

enum { OUTS = 16, MOST = 4 }; /* of weights as they lie: outputs of a task, and rows and outputs at once */

INLINE __m256 load(const int kind, const void *x, long k) {
  if (kind == FP32) return _mm256_loadu_ps((const float *)x + k);
  const __m128i eight = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + k));
  if (kind == FP16) return _mm256_cvtph_ps(eight);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

INLINE void store(const Product *p, long r, long o, float y) {
  const long at = r * p->out + o;
  if (p->y_numbers == FP32) ((float *)p->y)[at] = y;
  if (p->y_numbers == FP16) ((uint16_t *)p->y)[at] = _cvtss_sh(y, 0);
  if (p->y_numbers == BF16) ((bf16_t *)p->y)[at] = to_bf16(y);
}

INLINE float total(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* ---- weights as they lie: m outputs of n rows ---- */

INLINE void floats(const Product *p, const int kind, long o, long first, const int m, const int n) {
  const long bytes = kind == FP32 ? 4 : 2;
  const char *w = (const char *)p->weight + o * p->in * bytes;
  const float *x = (const float *)p->room + first * p->in;
  __m256 sum[MOST][MOST];
  EACH(i, m) EACH(r, n) sum[i][r] = _mm256_setzero_ps();
  for (long k = 0; k < p->in; k += 32)
    EACH(i, m) {
      _mm_prefetch(w + ((i + m) * p->in + k) * bytes, _MM_HINT_T1); /* of the next outputs */
      EACH(j, 4) {
        const __m256 v = load(kind, w + i * p->in * bytes, k + 8 * j);
        EACH(r, n) sum[i][r] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + r * p->in + k + 8 * j), sum[i][r]);
      }
    }
  EACH(i, m) EACH(r, n) store(p, first + r, o + i, total(sum[i][r]));
}

INLINE void outputs_in_turn(const Product *p, const int kind, long o, long end, long first, const int m, const int n) {
  for (; o + m <= end; o += m) floats(p, kind, o, first, m, n);
  for (; o < end; o++) floats(p, kind, o, first, 1, n);
}

#define KIND(name, kind)                                                            \
  static void name(const Product *p, long o, long end) {                            \
    for (long first = 0; first < p->n; first += MOST) switch (p->n - first) {       \
        case 1: outputs_in_turn(p, kind, o, end, first, kind == FP32 ? 4 : 2, 1); break;       \
        case 2: outputs_in_turn(p, kind, o, end, first, 2, 2); break;                          \
        case 3: outputs_in_turn(p, kind, o, end, first, 2, 3); break;                          \
        default: outputs_in_turn(p, kind, o, end, first, 2, MOST);                             \
      }                                                                             \
  }
KIND(bf16, BF16)
KIND(fp16, FP16)
KIND(fp32, FP32)

/* The same of float32 where there is AVX-512. */
FP32_TARGET static void fp32_wide(const Product *p, long o, long end) {
  while (o < end) {
    const long m = end - o < FP32_OUTPUTS ? 1 : FP32_OUTPUTS;
    for (long first = 0; first < p->n; first += FP32_ROWS) {
      const long n = p->n - first < FP32_ROWS ? p->n - first : FP32_ROWS;
      __m128 y[FP32_ROWS];
      fp32_outputs((const float *)p->weight + o * p->in, (const float *)p->room + first * p->in, p->in, m, n, y);
      for (long r = 0; r < n; r++)
        for (long i = 0; i < m; i++) store(p, first + r, o + i, y[r][i]);
    }
    o += m;
  }
}

static void as_they_lie(void *shared) { /* what a thread does */
  Product *p = shared;
  const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  static void (*const kinds[])(const Product *, long, long) = {bf16, fp16, fp32};
  void (*const kernel)(const Product *, long, long) = p->kind == FP32 && wide ? fp32_wide : kinds[p->kind];
  for (long b, end, tasks = (p->out + OUTS - 1) / OUTS; (b = take(&p->next, p->threads, tasks, &end)) < tasks;)
    for (; b < end; b++) kernel(p, b * OUTS, b + 1 < tasks ? (b + 1) * OUTS : p->out);
}

/* ---- weights in blocks ---- */

enum { LANES = 8, PARTS = OUT / LANES, TILE = 3, CHUNK = 32 * TILE }; /* as in products.c */

INLINE __m256i spread(const int8_t *x) { /* 4 bytes, to each lane */
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

/* y of `parts` registers of outputs, of n rows. INT4 is summed in 16 bits: a lane takes 16 products of a step, each at most
 * 15 * 127, together 30,480, which is below 32,768. */
INLINE void multiply_quantized(const Product *p, const uint8_t *w, const bf16_t *scales, long first, const int kind,
                               const int parts, const int n, float y[TILE][OUT]) {
  const QuantizedRows x = quantized(p, first);
  const long steps = p->in / STEP, groups = p->in / p->group, of_group = p->group / STEP;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8((char)128);
  EACH(r, n) EACH(i, parts) _mm256_storeu_ps(y[r] + i * LANES, _mm256_setzero_ps());
  for (long g = 0, s = 0; g < groups; g++) {
    const bf16_t *of = scales + g * OUT * (kind == INT8 ? 1 : 2);
    for (const long end = s + of_group; s < end; s++) {
      __m256i sum[TILE][PARTS];
      EACH(r, n) EACH(i, parts) sum[r][i] = _mm256_setzero_si256();
      for (int k = 0; k < STEP; k += kind == INT8 ? 4 : 8, w += 4 * OUT) {
        ahead(w);
        if (kind == INT8) {
          __m256i four[TILE];
          EACH(r, n) four[r] = spread(x.values + r * p->in + s * STEP + k);
          EACH(i, parts) {
            const __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + 32 * i)), offset), size = _mm256_abs_epi8(v);
            EACH(r, n) sum[r][i] = _mm256_add_epi32(
                sum[r][i], _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(four[r], v)), ones));
          }
        } else {
          __m256i four[TILE], next[TILE];
          EACH(r, n) {
            four[r] = spread(x.values + r * p->in + s * STEP + k);
            next[r] = spread(x.values + r * p->in + s * STEP + k + 4);
          }
          EACH(i, parts) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
            const __m256i v = _mm256_and_si256(bytes, low), u = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
            EACH(r, n) sum[r][i] = _mm256_add_epi16(
                sum[r][i], _mm256_add_epi16(_mm256_maddubs_epi16(v, four[r]), _mm256_maddubs_epi16(u, next[r])));
          }
        }
      }
      EACH(i, parts) {
        __m256 scale;
        if (kind == INT8) scale = load(BF16, of, i * LANES);
        else scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(of + 2 * i * LANES)), 16));
        EACH(r, n) {
          __m256i v = sum[r][i];
          if (kind == INT4) v = _mm256_add_epi32(_mm256_madd_epi16(v, ones), _mm256_set1_epi32(x.bias[r * steps + s]));
          const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(x.scales[r * steps + s]));
          _mm256_storeu_ps(y[r] + i * LANES, _mm256_fmadd_ps(product, scale, _mm256_loadu_ps(y[r] + i * LANES)));
        }
      }
    }
    if (kind == INT4) EACH(i, parts) {
      const __m256i both = _mm256_loadu_si256((const __m256i *)(of + 2 * i * LANES));
      const __m256 zero = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
      EACH(r, n) _mm256_storeu_ps(y[r] + i * LANES, _mm256_fmadd_ps(zero, _mm256_set1_ps(x.sums[r * groups + g]),
                                                                    _mm256_loadu_ps(y[r] + i * LANES)));
    }
  }
}

INLINE void block(const Product *p, const int kind, long b, long first, const int parts, const int n) {
  const long groups = p->in / p->group;
  float y[TILE][OUT];
  for (int begin = 0; begin < OUT; begin += parts * LANES) {
    const uint8_t *w = (const uint8_t *)p->weight + b * OUT * p->in / (kind == INT8 ? 1 : 2) + 4 * begin;
    multiply_quantized(p, w, p->scales + (b * OUT * groups + begin) * (kind == INT8 ? 1 : 2), first, kind, parts, n, y);
    for (long r = 0; r < n; r += p->digits)
      for (long i = 0; i < parts * LANES && b * OUT + begin + i < p->out; i++)
        store(p, (first + r) / p->digits, b * OUT + begin + i, p->digits == 2 ? y[r][i] + y[r + 1][i] : y[r][i]);
  }
}

static void outputs(const Product *p, long b, long first, long n) {
  const int kind = p->kind;
  switch (n) {
    case 1: kind == INT8 ? block(p, INT8, b, first, PARTS, 1) : block(p, INT4, b, first, PARTS, 1); break;
    case 2: kind == INT8 ? block(p, INT8, b, first, PARTS / 2, 2) : block(p, INT4, b, first, PARTS / 2, 2); break;
    default: kind == INT8 ? block(p, INT8, b, first, PARTS / 2, TILE) : block(p, INT4, b, first, PARTS / 2, TILE);
  }
}

static void make_ready(void *shared) { /* what a thread does: the next row, in 8 bits, or in float32 */
  Product *p = shared;
  const int size = p->numbers == FP32 ? 4 : 2;
  for (long r; (r = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n / p->digits;) {
    const char *x = (const char *)p->x + r * p->in * size;
    if (p->kind == INT8 || p->kind == INT4) quantize_row(p, x, r * p->digits);
    else to_floats(x, p->numbers, p->in, (float *)p->room + r * p->in);
  }
}

#include "tiles.h"

void multiply(Parallel parallel, unsigned threads, const Product *given) {
  Product p = *given;
  prepare(parallel, threads, &p);
  parallel(p.kind == INT8 || p.kind == INT4 ? in_tiles : as_they_lie, &p, threads, 0);
}

/* What library.py checks; and whether this CPU has it all. */
const long abi_info[] = {SOURCE, sizeof(Product)};

int cpu_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
