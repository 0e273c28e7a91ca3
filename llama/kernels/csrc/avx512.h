/* What native.c and products.c share: bfloat16 in registers of 16 lanes, rounded as PyTorch does. Numbers below bfloat16's normal
 * ones are 0. */

#include "common.h"

enum { LANES = 16 };

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load(const bf16_t *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m512 rounded(__m512 x) { return widen(narrow(x)); }
INLINE void store(bf16_t *y, __m512 x) { _mm256_storeu_si256((__m256i *)y, narrow(x)); }

/* The same of what is bfloat16 or float32, from the k-th on. */
INLINE long size_of(const int numbers) { return numbers == FP32 ? 4 : 2; }
INLINE void *element(const int numbers, const void *x, long k) { return (char *)x + k * size_of(numbers); }
INLINE __m512 load_as(const int numbers, const void *x, long k) {
  return numbers == FP32 ? _mm512_loadu_ps((const float *)x + k) : load((const bf16_t *)x + k);
}
INLINE void store_as(const int numbers, void *y, long k, __m512 x) {
  if (numbers == FP32) _mm512_storeu_ps((float *)y + k, x);
  else store((bf16_t *)y + k, x);
}
INLINE __m512 rounded_as(const int numbers, __m512 x) { return numbers == FP32 ? x : rounded(x); }

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
static inline void normalize(const bf16_t *x, const bf16_t *weight, float eps, long width, bf16_t *y) {
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
