/* A decode step of a few rows in bfloat16, piece by piece, on CPUs with AVX-512's instructions for bfloat16 and 8 bits: weights
 * are read once, at the rate at which memory gives them, and between them as little as can be.
 *
 * A weight lies as oneDNN or PyTorch packed it, in blocks of 64 outputs by all inputs. All numbers are rounded and summed as
 * PyTorch does, so that what comes of it is the same to the last bit, but for attention and for weights of 4 bits, whose sums
 * go in an order of their own, and for numbers below bfloat16's normal ones, which are 0. native.py fills the structures; no
 * size and no address is checked here. */

#include "native.h"

enum { OUT = 64, LANES = 16, PARTS = OUT / LANES, MOST = 4 }; /* outputs of a block, and of a register; rows at once */

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load(const bf16_t *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m512 rounded(__m512 x) { return widen(narrow(x)); }
INLINE void store(bf16_t *y, __m512 x) { _mm256_storeu_si256((__m256i *)y, narrow(x)); }

INLINE __m512i spread(const void *x) { /* 4 bytes, to each lane */
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

INLINE __mmask16 mask(long left) { return left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0; } /* the lanes there are */

/* Within one unit of float32's last place; with SLEEF's coefficients, as PyTorch's. */
INLINE __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(104), _mm512_max_ps(_mm512_set1_ps(-104), x)); /* infinity, 0; of NaN they leave it */
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695040888963407f)), 8);
  __m512 s = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  s = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606765330187045e-06f), s);
  static const float coefficients[] = {0.00139304355252534151077271f, 0.00833336077630519866943359f,
                                       0.0416664853692054748535156f, 0.166666671633720397949219f, 0.5f};
  __m512 u = _mm512_set1_ps(0.000198527617612853646278381f);
  EACH(i, 5) u = _mm512_fmadd_ps(u, s, _mm512_set1_ps(coefficients[i]));
  u = _mm512_add_ps(_mm512_set1_ps(1), _mm512_fmadd_ps(_mm512_mul_ps(s, s), u, s));
  return _mm512_scalef_ps(u, n);
}

/* x (width) / sqrt(mean of squares + eps) * weight, with squares in 8 sums, as torch.linalg.vector_norm has them. */
static void normalize(const bf16_t *x, const bf16_t *weight, float eps, long width, bf16_t *y) {
  __m256 sum = _mm256_setzero_ps();
  for (long k = 0; k < width; k += LANES) {
    const __m512 v = load(x + k), square = _mm512_mul_ps(v, v);
    sum = _mm256_add_ps(sum, _mm512_castps512_ps256(square));
    sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(square, 1));
  }
  float lanes[8], squares = 0;
  _mm256_storeu_ps(lanes, sum);
  for (int i = 0; i < 8; i++) squares += lanes[i];
  const float root = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(squares))), mean = root * root / (float)width + eps;
  const __m512 factor = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean))));
  for (long k = 0; k < width; k += LANES)
    store(y + k, _mm512_mul_ps(rounded(_mm512_mul_ps(load(x + k), factor)), load(weight + k)));
}

INLINE __m512 gated(__m512 x, __m512 up) { /* silu(x) * up */
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  return _mm512_mul_ps(rounded(_mm512_div_ps(x, below)), up);
}

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

/* ---- products ---- */

enum { BF16, INT8, INT4 };

typedef struct Product {
  long kind;
  const void *weight;
  const float *scales;  /* int8: (out) */
  const int32_t *sums;  /* int8: (out), of a weight's numbers */
  const bf16_t *groups; /* int4: (out / 64, in / group, 64, 2), scale and zero */
  long group, chunk;    /* int4: inputs of a group; bf16: inputs that are summed before they are added to the others */
  long in, out;         /* where it is gated, out is half of what is multiplied */
  long gated;           /* y = silu(first half of the outputs) * second half */
  const bf16_t *norm;   /* (in), or none: what the rows are normalized by before */
  float eps, unused;
  const bf16_t *x;        /* (n, in) */
  bf16_t *y;              /* (n, out) */
  const bf16_t *residual; /* (n, out), or none: what is added; may be y */
  const float *largest;   /* int8: (n), or none: the largest number of each row, where x has parts of rows */
  bf16_t *normed;         /* room for (n, in) */
  uint8_t *room;          /* for (n, in + 4) bytes */
  long n, threads, next;
} Product;

static float largest_of(const bf16_t *x, long in) {
  uint32_t most = 0; /* as bits, of which those of infinity and NaN are the largest */
  for (long k = 0; k < in; k++) most = (x[k] & 0x7fffu) > most ? x[k] & 0x7fffu : most;
  most <<= 16;
  float largest;
  memcpy(&largest, &most, 4);
  return largest;
}

/* A row as 8 bit numbers, unsigned, 128 more than they stand for; and the scale of those: the largest over 126, rounded. */
static float in_8_bits(const bf16_t *x, float largest, uint8_t *row, long in) {
  const float scale = _mm512_cvtss_f32(rounded(_mm512_set1_ps(largest / 126 < 1e-30f ? 1e-30f : largest / 126)));
  const __m512 factor = _mm512_set1_ps(1 / scale), half = _mm512_set1_ps(128.5f); /* cut after this, it is rounded */
  for (long k = 0; k < in; k += LANES) {
    const __m512i whole = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(load(x + k), factor), half));
    _mm_storeu_si128((__m128i *)(row + k), _mm512_cvtepi32_epi8(whole));
  }
  return scale;
}

static void sum_groups(const Product *p, const bf16_t *x, float *sums) {
  for (long k = 0; k < p->in;) {
    __m512 sum = _mm512_setzero_ps();
    for (const long end = k + p->group; k < end; k += LANES) sum = _mm512_add_ps(sum, load(x + k));
    *sums++ = _mm512_reduce_add_ps(sum);
  }
}

/* The kernels: y of outputs 64 b and on, of rows first to first + n. */

/* Weight (out / 64, in / 2, 64, 2). */
INLINE void bf16(const Product *p, long b, long first, const int n, __m512 y[MOST][PARTS]) {
  const bf16_t *w = (const bf16_t *)p->weight + b * OUT * p->in, *x = p->x + first * p->in;
  for (long k = 0, end; k < p->in;) {
    __m512 sum[MOST][PARTS] = {0};
    const int begun = k > 0;
    for (end = k + p->chunk < p->in ? k + p->chunk : p->in; k < end; k += 2, w += 2 * OUT) {
      ahead(w);
      EACH(i, PARTS) {
        const __m512bh v = (__m512bh)_mm512_loadu_si512(w + 2 * LANES * i);
        EACH(r, n) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)spread(x + r * p->in + k), v);
      }
    }
    EACH(r, n) EACH(i, PARTS) y[r][i] = begun ? _mm512_add_ps(y[r][i], sum[r][i]) : sum[r][i];
  }
}

/* Weight (out / 64, in / 4, 64, 4). */
INLINE void int8(const Product *p, long b, long first, const int n, __m512 y[MOST][PARTS]) {
  const int8_t *w = (const int8_t *)p->weight + b * OUT * p->in;
  const uint8_t *x = p->room + first * p->in;
  const float *row_scales = (const float *)(p->room + p->n * p->in) + first;
  __m512i sum[MOST][PARTS] = {0};
  for (long k = 0; k < p->in; k += 4, w += 4 * OUT) {
    ahead(w);
    EACH(i, PARTS) {
      const __m512i v = _mm512_loadu_si512(w + 4 * LANES * i);
      EACH(r, n) sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], spread(x + r * p->in + k), v);
    }
  }
  EACH(i, PARTS) {
    const long at = b * OUT + i * LANES;
    const __m512i more = _mm512_slli_epi32(_mm512_loadu_si512(p->sums + at), 7);
    const __m512 scale = _mm512_loadu_ps(p->scales + at);
    EACH(r, n) { /* oneDNN's product is rounded before the row's scale */
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][i], more));
      y[r][i] = _mm512_mul_ps(rounded(_mm512_mul_ps(whole, scale)), _mm512_set1_ps(row_scales[r]));
    }
  }
}

/* Weight (out / 64, in, 32): a byte has outputs o and o + 32, each 0..15 for -8..7. In the last bits of 128's mantissa 4 bits
 * make 128 to 143 of it, as bfloat16: 136 too many. */
INLINE void int4(const Product *p, long b, long first, const int n, __m512 y[MOST][PARTS]) {
  const uint8_t *w = (const uint8_t *)p->weight + b * OUT / 2 * p->in;
  const bf16_t *x = p->x + first * p->in;
  const long groups = p->in / p->group;
  const float *row_sums = (const float *)p->room + first * groups;
  /* Of 64 bytes, two inputs of 64 outputs, those of 16 outputs: each one's two bytes, apart. */
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i pick = _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(32 << 16));
  const __m512i next = _mm512_add_epi32(pick, _mm512_set1_epi32(16 << 16 | 16));
  const __m512i four = _mm512_set1_epi16(15), magic = _mm512_set1_epi16(0x4300);
  for (long g = 0, k = 0; g < groups; g++) {
    __m512 sum[MOST][PARTS];
    EACH(r, n) EACH(i, PARTS) sum[r][i] = _mm512_set1_ps(-136 * row_sums[r * groups + g]);
    for (; k < (g + 1) * p->group; k += 2, w += OUT) {
      const __m512i bytes = _mm512_loadu_si512(w);
      ahead(w);
      const __m512i pairs[] = {_mm512_permutexvar_epi8(pick, bytes), _mm512_permutexvar_epi8(next, bytes)};
      EACH(i, PARTS) {
        const __m512i low = i < 2 ? pairs[i] : _mm512_srli_epi16(pairs[i - 2], 4);
        const __m512bh v = (__m512bh)_mm512_ternarylogic_epi32(low, four, magic, 0xea); /* low & four | magic */
        EACH(r, n) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)spread(x + r * p->in + k), v);
      }
    }
    EACH(i, PARTS) {
      const __m512i both = _mm512_loadu_si512(p->groups + 2 * ((b * groups + g) * OUT + i * LANES));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
      EACH(r, n) {
        y[r][i] = _mm512_fmadd_ps(scale, sum[r][i], y[r][i]);
        y[r][i] = _mm512_fmadd_ps(zero, _mm512_set1_ps(row_sums[r * groups + g]), y[r][i]);
      }
    }
  }
}

#define ROWS(kernel) /* by the number of rows that are left, which decides how many registers there must be */ \
  static void kernel##_rows(const Product *p, long b, long first, __m512 y[MOST][PARTS]) {                  \
    switch (p->n - first) {                                                                                 \
      case 1: kernel(p, b, first, 1, y); break;                                                             \
      case 2: kernel(p, b, first, 2, y); break;                                                             \
      case 3: kernel(p, b, first, 3, y); break;                                                             \
      default: kernel(p, b, first, MOST, y);                                                                \
    }                                                                                                       \
  }
ROWS(bf16)
ROWS(int8)
ROWS(int4)

/* y of 64 outputs of MOST rows, from the kernel's sums. */
static void outputs(const Product *p, long b, long first) {
  static void (*const kernels[])(const Product *, long, long, __m512[MOST][PARTS]) = {bf16_rows, int8_rows, int4_rows};
  __m512 y[MOST][PARTS] = {0}, up[MOST][PARTS] = {0};
  kernels[p->kind](p, b, first, y);
  if (p->gated) kernels[p->kind](p, b + p->out / OUT, first, up);
  for (long r = 0; r < MOST && first + r < p->n; r++) EACH(i, PARTS) {
    const long at = (first + r) * p->out + b * OUT + i * LANES;
    const __mmask16 those = mask(p->out - b * OUT - i * LANES);
    __m512 v = rounded(y[r][i]);
    if (p->gated) v = gated(v, rounded(up[r][i]));
    if (p->residual) v = _mm512_add_ps(widen(_mm256_maskz_loadu_epi16(those, p->residual + at)), v);
    _mm256_mask_storeu_epi16(p->y + at, those, narrow(v));
  }
}

static void products(void *shared) { /* what a thread does */
  Product *p = shared;
  const long blocks = (p->out + OUT - 1) / OUT;
  for (long b, end; (b = take(&p->next, p->threads, blocks, &end)) < blocks;)
    for (; b < end; b++)
      for (long first = 0; first < p->n; first += MOST) outputs(p, b, first); /* rows that follow find the block in a cache */
}

void multiply(Parallel parallel, unsigned threads, const Product *given) {
  Product p = *given;
  if (p.norm) {
    for (long r = 0; r < p.n; r++) normalize(p.x + r * p.in, p.norm, p.eps, p.in, p.normed + r * p.in);
    p.x = p.normed;
  }
  for (long r = 0; r < p.n && p.kind != BF16; r++) {
    const bf16_t *x = p.x + r * p.in;
    if (p.kind == INT4) sum_groups(&p, x, (float *)p.room + r * (p.in / p.group));
    if (p.kind == INT8)
      ((float *)(p.room + p.n * p.in))[r] = in_8_bits(x, p.largest ? p.largest[r] : largest_of(x, p.in), p.room + r * p.in, p.in);
  }
  p.next = 0, p.threads = threads;
  parallel(products, &p, threads, 0);
}

/* ---- attention ---- */

typedef struct Attention {
  bf16_t *q;            /* (n, K, G, hd) at a stride; with turns, behind it the id's own keys and values, (2, K, hd) */
  const float *turns;   /* (n, hd / 2, 2), cosines and sines; none: all is turned and written already */
  bf16_t *keys, *values; /* (rows, K, slots, hd) */
  const long *at;       /* (n, 2): row, and the position, which is the last slot that is seen */
  float *scores;        /* room for (n, K, G, slots) */
  bf16_t *y;            /* (n, K, G, hd) */
  long n, K, G, hd, slots, q_stride, row_stride, head_stride, next;
} Attention;

INLINE void turn(bf16_t *x, const float *turns, long hd) { /* adjacent pairs, as complex numbers, in place */
  for (long k = 0; k < hd; k += LANES) {
    const __m512 v = load(x + k), by = _mm512_loadu_ps(turns + k);
    const __m512 direct = _mm512_mul_ps(v, _mm512_moveldup_ps(by)), across = _mm512_mul_ps(v, _mm512_movehdup_ps(by));
    const __m512 crossed = _mm512_permute_ps(across, 0xb1);
    store(x + k, _mm512_mask_add_ps(_mm512_sub_ps(direct, crossed), 0xaaaa, direct, crossed));
  }
}

/* The products of a query and n keys, 1 or 4. */
INLINE void score(const bf16_t *q, const bf16_t *keys, long hd, const int n, float *scores) {
  __m512 s[4] = {0};
  for (long k = 0; k < hd; k += 2 * LANES)
    EACH(i, n) s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)_mm512_loadu_si512(q + k), (__m512bh)_mm512_loadu_si512(keys + i * hd + k));
  if (n == 1) {
    *scores = _mm512_reduce_add_ps(s[0]);
    return;
  }
  EACH(i, 2) s[2 * i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
  const __m512d a = _mm512_castps_pd(s[0]), b = _mm512_castps_pd(s[2]);
  const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  _mm_storeu_ps(scores, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}

/* y = the sum of values (end, hd) times weights (end), of n registers of hd. */
INLINE void mix(const float *weights, const bf16_t *values, long hd, long end, const int n, __m512 by, bf16_t *y) {
  __m512 sum[4] = {0};
  for (long slot = 0; slot < end; slot++)
    EACH(i, n) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[slot]), load(values + slot * hd + i * LANES), sum[i]);
  EACH(i, n) store(y + i * LANES, _mm512_mul_ps(sum[i], by));
}

/* The G queries of a row's key/value head over slots 0..end. */
static void attend_head(const Attention *a, const bf16_t *q, const bf16_t *keys, const bf16_t *values, float *scores, bf16_t *y,
                        long end) {
  const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)a->hd))));
  long slot = 0; /* each key is read once */
  for (; slot + 4 <= end; slot += 4)
    for (long g = 0; g < a->G; g++) score(q + g * a->hd, keys + slot * a->hd, a->hd, 4, scores + g * a->slots + slot);
  for (; slot < end; slot++)
    for (long g = 0; g < a->G; g++) score(q + g * a->hd, keys + slot * a->hd, a->hd, 1, scores + g * a->slots + slot);
  for (long g = 0; g < a->G; g++) {
    float *s = scores + g * a->slots;
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long k = 0; k < end; k += LANES)
      most = _mm512_mask_max_ps(most, mask(end - k), most, _mm512_maskz_loadu_ps(mask(end - k), s + k));
    const __m512 top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), scale);
    for (long k = 0; k < end; k += LANES) {
      const __m512 e = exponential(_mm512_sub_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask(end - k), s + k), scale), top));
      sum = _mm512_mask_add_ps(sum, mask(end - k), sum, e);
      _mm512_mask_storeu_ps(s + k, mask(end - k), e);
    }
    const __m512 by = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    long k = 0;
    for (; k + 4 * LANES <= a->hd; k += 4 * LANES) mix(s, values + k, a->hd, end, 4, by, y + g * a->hd + k);
    for (; k < a->hd; k += 2 * LANES) mix(s, values + k, a->hd, end, 2, by, y + g * a->hd + k);
  }
}

static void heads(void *shared) { /* a thread: the next key/value head of a row */
  Attention *a = shared;
  for (long i; (i = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->n * a->K;) {
    const long r = i / a->K, head = i % a->K, group = a->G * a->hd, row = a->at[2 * r], last = a->at[2 * r + 1];
    bf16_t *q = a->q + r * a->q_stride + head * group;
    bf16_t *keys = a->keys + row * a->row_stride + head * a->head_stride;
    bf16_t *values = a->values + row * a->row_stride + head * a->head_stride;
    if (a->turns) {
      const float *turns = a->turns + r * a->hd;
      bf16_t *key = a->q + r * a->q_stride + a->K * group + head * a->hd, *value = key + a->K * a->hd;
      turn(key, turns, a->hd);
      for (long g = 0; g < a->G; g++) turn(q + g * a->hd, turns, a->hd);
      memcpy(keys + last * a->hd, key, 2 * a->hd);
      memcpy(values + last * a->hd, value, 2 * a->hd);
    }
    attend_head(a, q, keys, values, a->scores + i * a->G * a->slots, a->y + i * group, last + 1);
  }
}

void attend(Parallel parallel, unsigned threads, const Attention *given) {
  Attention a = *given;
  a.next = 0;
  parallel(heads, &a, threads, 0);
}

/* ---- the layers of a model ---- */

/* Of each layer four products, its norms, gate and residuals among them, and attention after the first. */
void layers(Parallel parallel, unsigned threads, const Product *products, const Attention *attentions, long n) {
  for (const Product *p = products; p < products + 4 * n; p++) {
    multiply(parallel, threads, p);
    if ((p - products) % 4 == 0) attend(parallel, threads, attentions++);
  }
}

/* What native.py is to find; and whether this CPU has it all. */
const long interface[] = {SOURCE, sizeof(Rows), sizeof(Product), sizeof(Attention)};

int serves(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
