/* Declare what linear_avx512.c and linear_amx.c share. */

enum { BLOCK_VECTORS = BLOCK_OUTPUTS / LANES /* number of registers that contain the outputs of a block */ };

typedef void (*Worker)(void *);

/* Return the function by which threads multiply with AMX, and set p->tiled to the form of x that it needs. Return 0 if AMX is
 * not used for these arguments. */
Worker choose_amx(LinearArgs *p);

/* Copy row `row` of x, in bfloat16, into its tiles for AMX: the scratch buffer has tiles in the order (n / 16, in / 32). */
INLINE void copy_row_into_tiles(const LinearArgs *p, const bf16_t *x, long row) {
  bf16_t *y = (bf16_t *)p->scratch + row / TILE_ROWS * TILE_ROWS * p->in + row % TILE_ROWS * TILE_INPUTS;
  for (long k = 0; k < p->in; k += TILE_INPUTS) _mm512_storeu_si512(y + k * TILE_ROWS, _mm512_loadu_si512(x + k));
}

/* Load the scales of 16 outputs of a weight, and for INT4 the zeros. */
INLINE void load_scales(const int format, const bf16_t *scales, __m512 *scale, __m512 *zero) {
  if (format == INT8) {
    *scale = load_bf16(scales);
  } else {
    const __m512i scales_and_zeros = _mm512_loadu_si512(scales);
    *scale = _mm512_castsi512_ps(_mm512_slli_epi32(scales_and_zeros, 16));
    *zero = _mm512_castsi512_ps(_mm512_and_si512(scales_and_zeros, _mm512_set1_epi32((int)0xffff0000)));
  }
}

/* Store y for the outputs of block b and for n rows, including SwiGLU or the addition of the residual. */
INLINE void store_block(const LinearArgs *p, long b, long first, long n, __m512 (*y)[BLOCK_VECTORS],
                        __m512 (*up)[BLOCK_VECTORS]) {
  for (long r = 0; r < n; r += p->int8_per_activation)
    UNROLL(i, BLOCK_VECTORS) {
      const long index = (first + r) / p->int8_per_activation * p->out + b * BLOCK_OUTPUTS + i * LANES;
      const __mmask16 valid = tail_mask(p->out - b * BLOCK_OUTPUTS - i * LANES);
      __m512 sum = y[r][i], up_sum = up[r][i];
      if (p->int8_per_activation == 2) sum = _mm512_add_ps(sum, y[r + 1][i]), up_sum = _mm512_add_ps(up_sum, up[r + 1][i]);
      if (p->y_dtype == FP32) {
        _mm512_mask_storeu_ps((float *)p->y + index, valid, sum);
      } else if (p->y_dtype == FP16) {
        _mm256_mask_storeu_epi16((uint16_t *)p->y + index, valid, _mm512_cvtps_ph(sum, 0));
      } else {
        __m512 v = round_to_bf16(sum);
        if (p->gated) v = swiglu(v, round_to_bf16(up_sum));
        if (p->residual) v = _mm512_add_ps(widen(_mm256_maskz_loadu_epi16(valid, p->residual + index)), v);
        _mm256_mask_storeu_epi16((bf16_t *)p->y + index, valid, narrow(v));
      }
    }
}
