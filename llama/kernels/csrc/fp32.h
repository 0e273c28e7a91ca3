/* Multiply float32 rows by unpacked float32 weights (out, in) with AVX-512. Each function enables its instructions with an
 * attribute, so that a file compiled for AVX2 can include this header after common.h. */

#define FP32_TARGET __attribute__((target("avx512f,avx512dq")))
enum { FP32_OUTPUTS = 4, FP32_ROWS = 4 }; /* Outputs and rows of a tile; the sums of a tile fill half of the registers. */

/* Return the sums of the lanes of four registers. */
FP32_TARGET INLINE __m128 sum_4_registers(const __m512 s[4]) {
  __m512 pairs[2];
  UNROLL(i, 2) pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
  const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
  const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

/* Compute m outputs of n rows of x, where w points to the weight's row of the first output. The sums of a row do not depend
 * on n. With 1 or 2 rows, prefetching in software would take a tenth longer (measured on Zen 5), because the hardware
 * prefetcher is sufficient. */
FP32_TARGET INLINE void fp32_tile(const float *w, const float *x, long in, const int m, const int n, __m128 y[FP32_ROWS]) {
  __m512 sum[FP32_ROWS][FP32_OUTPUTS];
  UNROLL(r, n)
    UNROLL(i, FP32_OUTPUTS) sum[r][i] = _mm512_setzero_ps();
  for (long k = 0; k < in; k += 16) {
    __m512 v[FP32_ROWS];
    UNROLL(r, n) v[r] = _mm512_loadu_ps(x + r * in + k);
    UNROLL(r, n) __asm__("" : "+v"(v[r])); /* Keep v[r] in a register; otherwise GCC loads v[r] again for each output. */
    UNROLL(i, m) {
      /* Prefetch the weights of the next m outputs. */
      if (n > 2) _mm_prefetch((const char *)(w + (i + m) * in + k), _MM_HINT_T0);
      const __m512 weight = _mm512_loadu_ps(w + i * in + k);
      UNROLL(r, n) sum[r][i] = _mm512_fmadd_ps(weight, v[r], sum[r][i]);
    }
  }
  UNROLL(r, n) y[r] = sum_4_registers(sum[r]);
}

/* Call `fp32_tile` with constant numbers of outputs and rows, which the compiler needs to unroll loops. m is 1 or
 * FP32_OUTPUTS; n is 1 to FP32_ROWS. */
FP32_TARGET static inline void fp32_multiply(const float *w, const float *x, long in, long m, long n, __m128 y[FP32_ROWS]) {
  if (m < FP32_OUTPUTS)
    for (long r = 0; r < n; r++) fp32_tile(w, x + r * in, in, 1, 1, y + r);
  else switch (n) {
      case 1: fp32_tile(w, x, in, FP32_OUTPUTS, 1, y); break;
      case 2: fp32_tile(w, x, in, FP32_OUTPUTS, 2, y); break;
      case 3: fp32_tile(w, x, in, FP32_OUTPUTS, 3, y); break;
      default: fp32_tile(w, x, in, FP32_OUTPUTS, FP32_ROWS, y);
    }
}
