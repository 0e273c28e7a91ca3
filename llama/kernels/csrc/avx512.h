/* Define the functions that all AVX-512 files share: loading, storing and rounding of bfloat16 and float32 values in
 * registers of 16 lanes, exp, RMSNorm and SwiGLU. bfloat16 results are rounded as in PyTorch, except that subnormal bfloat16
 * values become 0. */

#include "common.h"

enum { LANES = 16 };

enum {
  TILE_ROWS = 16,  /* number of rows in a tile, for AMX */
  TILE_INPUTS = 32 /* number of bfloat16 values in a row of a tile */
};
extern int amx_in_use; /* 1 if AMX is in use: see `use_amx` in linear_amx.c */

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load_bf16(const bf16_t *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m512 round_to_bf16(__m512 x) { return widen(narrow(x)); }
INLINE void store_bf16(bf16_t *y, __m512 x) { _mm256_storeu_si256((__m256i *)y, narrow(x)); }

/* The next five functions locate, load, store or round values of type `dtype` (BF16 or FP32); k is the index of the first
 * value. */
INLINE long value_bytes(const int dtype) { return dtype == FP32 ? 4 : 2; }
INLINE void *element(const int dtype, const void *x, long k) { return (char *)x + k * value_bytes(dtype); }
INLINE __m512 load_values(const int dtype, const void *x, long k) {
  return dtype == FP32 ? _mm512_loadu_ps((const float *)x + k) : load_bf16((const bf16_t *)x + k);
}
INLINE void store_values(const int dtype, void *y, long k, __m512 x) {
  if (dtype == FP32) _mm512_storeu_ps((float *)y + k, x);
  else store_bf16((bf16_t *)y + k, x);
}
INLINE __m512 round_to_dtype(const int dtype, __m512 x) { return dtype == FP32 ? x : round_to_bf16(x); }

/* Return a mask of the first `left` lanes, or of all 16 lanes if `left` is larger. */
INLINE __mmask16 tail_mask(long left) { return left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

/* Return exp(x) with an error of at most one unit in the last place of float32. The coefficients are SLEEF's, which PyTorch
 * uses, too. */
INLINE __m512 exp_fp32(__m512 x) {
  /* Clamp x to a range beyond which exp(x) is 0 or infinity in float32. NaN stays NaN. */
  x = _mm512_min_ps(_mm512_set1_ps(104), _mm512_max_ps(_mm512_set1_ps(-104), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695040888963407f)), 8);
  __m512 s = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  s = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606765330187045e-06f), s);
  static const float coefficients[] = {0.00139304355252534151077271f, 0.00833336077630519866943359f,
                                       0.0416664853692054748535156f, 0.166666671633720397949219f, 0.5f};
  __m512 u = _mm512_set1_ps(0.000198527617612853646278381f);
  UNROLL(i, 5) u = _mm512_fmadd_ps(u, s, _mm512_set1_ps(coefficients[i]));
  u = _mm512_add_ps(_mm512_set1_ps(1), _mm512_fmadd_ps(_mm512_mul_ps(s, s), u, s));
  return _mm512_scalef_ps(u, n);
}

/* RMSNorm: y = x / sqrt(mean(x * x) + eps) * weight, for one row x of `width` values. The squares are added in 8 partial
 * sums, in the same order as in torch.linalg.vector_norm. */
static inline void rms_norm(const bf16_t *x, const bf16_t *weight, float eps, long width, bf16_t *y) {
  __m256 sum = _mm256_setzero_ps();
  for (long k = 0; k < width; k += LANES) {
    const __m512 v = load_bf16(x + k), square = _mm512_mul_ps(v, v);
    sum = _mm256_add_ps(sum, _mm512_castps512_ps256(square));
    sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(square, 1));
  }
  float lanes[8], squares = 0;
  _mm256_storeu_ps(lanes, sum);
  for (int i = 0; i < 8; i++) squares += lanes[i];
  const float root = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(squares))), mean = root * root / (float)width + eps;
  const __m512 factor = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean))));
  for (long k = 0; k < width; k += LANES)
    store_bf16(y + k, _mm512_mul_ps(round_to_bf16(_mm512_mul_ps(load_bf16(x + k), factor)), load_bf16(weight + k)));
}

/* Return silu(x) * up. */
INLINE __m512 swiglu(__m512 x, __m512 up) {
  const __m512 denominator = _mm512_add_ps(_mm512_set1_ps(1), exp_fp32(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  return _mm512_mul_ps(round_to_bf16(_mm512_div_ps(x, denominator)), up);
}
