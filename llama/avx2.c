/* Products of a few rows on CPUs with AVX2: weights of 16, 8 and 4 bits are read once, as they lie, and multiplied in float32,
 * or in 4 bits in whole numbers. avx2.py fills the structure; no size and no address is checked here. A row's sums are the same
 * whatever rows there are beside it. */

#include "native.h"

#include <cpuid.h>

enum { BF16, FP16, FP32, INT8, INT4 };   /* kinds of numbers */
enum { OUT = 16, MOST = 4, GROUP = 64 }; /* outputs of a block, rows at once, inputs of a group of int4 */

typedef struct Product {
  long kind, numbers; /* of the weight; of x and y */
  const void *weight; /* (out, in); int4: (out, in / 2), inputs 2 i and 2 i + 1 in a byte, each 0..15 for -8..7 */
  const void *scales; /* int8: (out), in float32; int4: (out, in / 64, 2), scale and zero, in bfloat16 */
  long in, out;
  const void *x; /* (n, in) */
  void *y;       /* (n, out) */
  float *room;   /* for (n, in) */
  long n, threads, next;
} Product;

INLINE float number(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE __m256 load(const int kind, const void *x, long k) {
  if (kind == FP32) return _mm256_loadu_ps((const float *)x + k);
  if (kind == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)x + k))));
  const __m128i eight = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + k));
  if (kind == FP16) return _mm256_cvtph_ps(eight);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

static void store(const Product *p, long r, long o, float y) {
  uint32_t bits;
  memcpy(&bits, &y, 4);
  const long at = r * p->out + o;
  if (p->numbers == FP32) ((float *)p->y)[at] = y;
  if (p->numbers == FP16) ((uint16_t *)p->y)[at] = _cvtss_sh(y, 0);
  if (p->numbers == BF16) ((bf16_t *)p->y)[at] = y == y ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

INLINE float total(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* ---- rows, made ready ---- */

static void widen(const Product *p, const void *x, long k, long n, float *y) {
  if (p->numbers == FP32) memcpy(y, (const float *)x + k, 4 * n);
  if (p->numbers == FP16)
    for (long i = 0; i < n; i += 8) _mm256_storeu_ps(y + i, load(FP16, x, k + i));
  if (p->numbers == BF16)
    for (long i = 0; i < n; i += 8) _mm256_storeu_ps(y + i, load(BF16, x, k + i));
}

/* A row of int4: each group becomes numbers of 15 bits, 128 times high plus low, which are those of x, of 16 bits, divided
 * by a power of 2: exactly, but for some last bits of those below a 64th (float16: an 8th) of the largest. */
typedef struct Group {
  int8_t high[2][GROUP / 2], low[2][GROUP / 2]; /* inputs 0, 2, 4, ..; 1, 3, 5, .. */
} Group;

static void in_15_bits(const Product *p, const void *x, Group *groups, float *scales, float *sums) {
  for (long g = 0; g < p->in / GROUP; g++) {
    float numbers[GROUP];
    uint32_t most = 0, bits; /* as bits, of which those of infinity and NaN are the largest */
    widen(p, x, g * GROUP, GROUP, numbers);
    for (int i = 0; i < GROUP; i++) {
      memcpy(&bits, numbers + i, 4);
      most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
    }
    const float power = number(most & 0x7f800000), scale = power > 0x1p127f ? NAN : fmaxf(power, 0x1p-99f) / 8192;
    const float factor = 1 / scale;
    uint32_t sum = 0; /* as of what is no number it overflows */
    for (int i = 0; i < GROUP; i++) {
      const int32_t whole = _mm_cvtss_si32(_mm_set_ss(numbers[i] * factor));
      groups[g].high[i % 2][i / 2] = whole >> 7;
      groups[g].low[i % 2][i / 2] = whole & 127;
      sum += whole;
    }
    scales[g] = scale;
    sums[g] = scale * (float)(int32_t)sum;
  }
}

/* ---- the kernels: m outputs of n rows ---- */

INLINE void floats(const Product *p, const int kind, long o, long first, const int m, const int n) {
  const long bytes = kind == INT8 ? 1 : 2;
  const char *w = (const char *)p->weight + o * p->in * bytes;
  const float *x = p->room + first * p->in;
  __m256 sum[MOST][MOST];
  EACH(i, m) EACH(r, n) sum[i][r] = _mm256_setzero_ps();
  for (long k = 0; k < p->in; k += 32)
    EACH(i, m) {
      ahead(w + (i * p->in + k) * bytes);
      EACH(j, 4) {
        const __m256 v = load(kind, w + i * p->in * bytes, k + 8 * j);
        EACH(r, n) sum[i][r] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + r * p->in + k + 8 * j), sum[i][r]);
      }
    }
  EACH(i, m) EACH(r, n) store(p, first + r, o + i, total(sum[i][r]) * (kind == INT8 ? ((const float *)p->scales)[o + i] : 1));
}

/* Sums of four products, each at most 15 * 128. */
INLINE __m256i pairs(__m256i even, __m256i odd, const int8_t by[2][GROUP / 2]) {
  return _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256((const __m256i *)by[0])),
                          _mm256_maddubs_epi16(odd, _mm256_loadu_si256((const __m256i *)by[1])));
}

/* The sum of what weights of 0 stand for, times the groups' sums, of n groups. */
INLINE __m256 of_zeros(const int32_t *both, const float *sums, long n) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  __m256 sum = _mm256_setzero_ps();
  for (long g = 0; g < n; g += 8) {
    const __m256i those = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - g), lanes), pairs = _mm256_maskload_epi32(both + g, those);
    const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    const __m256 zero = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
    sum = _mm256_fmadd_ps(_mm256_fnmadd_ps(_mm256_set1_ps(8), scale, zero), _mm256_maskload_ps(sums + g, those), sum);
  }
  return sum;
}

INLINE void nibbles(const Product *p, long o, long first, const int m, const int n) {
  const long n_groups = p->in / GROUP;
  const uint8_t *w = (const uint8_t *)p->weight + o * p->in / 2;
  const int32_t *both = (const int32_t *)p->scales + o * n_groups; /* scale and zero */
  const __m256i four = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), many = _mm256_set1_epi16(128);
  const Group *x[MOST];
  const float *scales[MOST];
  EACH(r, n) {
    x[r] = (const Group *)(p->room + (first + r) * p->in);
    scales[r] = (const float *)(x[r] + n_groups);
  }
  __m256 sum[MOST][MOST];
  EACH(i, m) EACH(r, n) sum[i][r] = of_zeros(both + i * n_groups, scales[r] + n_groups, n_groups);
  for (long g = 0; g < n_groups; g++)
    EACH(i, m) {
      const uint8_t *at = w + i * p->in / 2 + g * GROUP / 2;
      const __m256i bytes = _mm256_loadu_si256((const __m256i *)at);
      ahead(at);
      const __m256i even = _mm256_and_si256(bytes, four), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four);
      const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi32(both[i * n_groups + g]), 16));
      EACH(r, n) {
        const __m256i high = pairs(even, odd, x[r][g].high), low = pairs(even, odd, x[r][g].low);
        const __m256i whole = _mm256_add_epi32(_mm256_madd_epi16(high, many), _mm256_madd_epi16(low, ones));
        sum[i][r] = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(scales[r][g])), _mm256_cvtepi32_ps(whole), sum[i][r]);
      }
    }
  EACH(i, m) EACH(r, n) store(p, first + r, o + i, total(sum[i][r]));
}

INLINE void outputs(const Product *p, const int kind, long o, long end, long first, const int m, const int n) {
  for (; o + m <= end; o += m) kind == INT4 ? nibbles(p, o, first, m, n) : floats(p, kind, o, first, m, n);
  for (; o < end; o++) kind == INT4 ? nibbles(p, o, first, 1, n) : floats(p, kind, o, first, 1, n);
}

#define KIND(name, kind, alone) /* `alone`: outputs at once for a single row, so many as memory is read best with */ \
  static void name(const Product *p, long o, long end) {                                                             \
    for (long first = 0; first < p->n; first += MOST) switch (p->n - first) {                                        \
        case 1: outputs(p, kind, o, end, first, alone, 1); break;                                                    \
        case 2: outputs(p, kind, o, end, first, 2, 2); break;                                                        \
        case 3: outputs(p, kind, o, end, first, kind == INT4 ? 1 : 2, 3); break;                                     \
        default: outputs(p, kind, o, end, first, kind == INT4 ? 1 : 2, MOST);                                        \
      }                                                                                                              \
  }
KIND(bf16, BF16, 2)
KIND(fp16, FP16, 2)
KIND(int8, INT8, 4)
KIND(int4, INT4, 2)

static void products(void *shared) { /* what a thread does */
  Product *p = shared;
  static void (*const kinds[])(const Product *, long, long) = {bf16, fp16, 0, int8, int4};
  for (long b, end, blocks = (p->out + OUT - 1) / OUT; (b = take(&p->next, p->threads, blocks, &end)) < blocks;)
    for (; b < end; b++) kinds[p->kind](p, b * OUT, b + 1 < blocks ? (b + 1) * OUT : p->out);
}

void multiply(Parallel parallel, unsigned threads, const Product *given) {
  Product p = *given;
  const long size = p.numbers == FP32 ? 4 : 2;
  for (long r = 0; r < p.n; r++) {
    float *row = p.room + r * p.in;
    const char *x = (const char *)p.x + r * p.in * size;
    if (p.kind == INT4) {
      float *scales = (float *)((Group *)row + p.in / GROUP); /* and behind them the sums */
      in_15_bits(&p, x, (Group *)row, scales, scales + p.in / GROUP);
    } else {
      widen(&p, x, 0, p.in, row);
    }
  }
  p.next = 0, p.threads = threads;
  parallel(products, &p, threads, 0);
}

/* What avx2.py is to find; and whether this CPU has it all, of which F16C has no name in older compilers. */
const long interface[] = {SOURCE, sizeof(Product)};

int serves(void) {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
