/* Products of float32 rows by float32 weights as they are stored, (out, in), with AVX-512. Each function names the instructions it
 * needs, so that a file compiled for AVX2 may include this one, after common.h. */

#define FP32_TARGET __attribute__((target("avx512f,avx512dq")))
enum { FP32_OUTPUTS = 4, FP32_ROWS = 4 }; /* outputs and rows at once: their sums fill half of the registers */

/* The totals of four registers, side by side. */
FP32_TARGET INLINE __m128 four_totals(const __m512 s[4]) {
  __m512 pairs[2];
  EACH(i, 2) pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
  const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
  const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

/* y: m outputs, from the row of the weight at w on, of n rows of x. A row's sums are the same for any n. With 1 or 2 rows the CPU
 * itself reads far enough ahead, and prefetching costs a tenth (Zen 5). */
FP32_TARGET INLINE void fp32_tile(const float *w, const float *x, long in, const int m, const int n, __m128 y[FP32_ROWS]) {
  __m512 sum[FP32_ROWS][FP32_OUTPUTS];
  EACH(r, n) EACH(i, FP32_OUTPUTS) sum[r][i] = _mm512_setzero_ps();
  for (long k = 0; k < in; k += 16) {
    __m512 v[FP32_ROWS];
    EACH(r, n) v[r] = _mm512_loadu_ps(x + r * in + k);
    EACH(r, n) __asm__("" : "+v"(v[r])); /* in a register: GCC would load it again for each output */
    EACH(i, m) {
      if (n > 2) _mm_prefetch((const char *)(w + (i + m) * in + k), _MM_HINT_T0); /* of the next outputs */
      const __m512 weight = _mm512_loadu_ps(w + i * in + k);
      EACH(r, n) sum[r][i] = _mm512_fmadd_ps(weight, v[r], sum[r][i]);
    }
  }
  EACH(r, n) y[r] = four_totals(sum[r]);
}

/* The same by the number of rows, at most FP32_ROWS, with m 1 or FP32_OUTPUTS. */
FP32_TARGET static inline void fp32_outputs(const float *w, const float *x, long in, long m, long n, __m128 y[FP32_ROWS]) {
  if (m < FP32_OUTPUTS)
    for (long r = 0; r < n; r++) fp32_tile(w, x + r * in, in, 1, 1, y + r);
  else switch (n) {
      case 1: fp32_tile(w, x, in, FP32_OUTPUTS, 1, y); break;
      case 2: fp32_tile(w, x, in, FP32_OUTPUTS, 2, y); break;
      case 3: fp32_tile(w, x, in, FP32_OUTPUTS, 3, y); break;
      default: fp32_tile(w, x, in, FP32_OUTPUTS, FP32_ROWS, y);
    }
}
