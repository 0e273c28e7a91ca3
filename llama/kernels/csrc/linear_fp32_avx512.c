/* Linear layers in float32 with unpacked weights for a few rows, including the RMSNorm before and the SwiGLU or residual
 * after the product. Weights are read once, at the speed of memory. The sums of a row are added in the same order for any
 * number of rows. llama/backends/cpu.py fills LinearArgs; the C code checks neither sizes nor addresses. */

/* GCC schedules instructions for znver2 in an order that is a sixth faster on Zen 5 with 4 rows. */
#pragma GCC target("tune=znver2")

#include "avx512.h"
#include "fp32.h"

enum { TASK_OUTPUTS = 16 }; /* number of outputs in a task */

/* Return the address of the weight's row for output o. */
static const float *weight_row(const LinearArgs *p, long o) {
  long part = 0;
  while (o >= p->ends[part]) part++;
  return p->parts[part] + (part ? o - p->ends[part - 1] : o) * p->in;
}

/* Return silu(x) * up. */
static __m128 swiglu_fp32(__m128 x, __m128 up) {
  const __m512 x16 = _mm512_castps128_ps512(x), denominator = exp_fp32(_mm512_sub_ps(_mm512_setzero_ps(), x16));
  return _mm_mul_ps(_mm_div_ps(x, _mm_add_ps(_mm_set1_ps(1), _mm512_castps512_ps128(denominator))), up);
}

/* Compute outputs `o` to `end` - 1 of all rows. For SwiGLU, a first call with second = 0 writes the first half of the outputs
 * to y; a call with second = 1 combines the values in y with the second half. */
static void compute_outputs(const LinearArgs *p, long o, long end, int second) {
  for (; o < end; o += FP32_OUTPUTS)
    for (long first = 0; first < p->n; first += FP32_ROWS) {
      const long n = p->n - first < FP32_ROWS ? p->n - first : FP32_ROWS;
      __m128 v[FP32_ROWS];
      fp32_multiply(weight_row(p, second ? p->out + o : o), (const float *)p->x + first * p->in, p->in, FP32_OUTPUTS, n, v);
      for (long r = 0; r < n; r++) {
        float *y = (float *)p->y + (first + r) * p->out + o;
        if (second) v[r] = swiglu_fp32(_mm_loadu_ps(y), v[r]);
        if (p->residual) v[r] = _mm_add_ps(v[r], _mm_loadu_ps((const float *)p->residual + (y - (float *)p->y)));
        _mm_storeu_ps(y, v[r]);
      }
    }
}

/* The function that each thread runs: compute claimed ranges of outputs. For SwiGLU, the rows of a range are read from
 * the first half of the weight, then from the second half. */
static void linear_fp32_worker(void *shared) {
  LinearArgs *p = shared;
  for (long t, end, tasks = p->out / TASK_OUTPUTS; (t = claim_tasks(&p->next, p->threads, tasks, &end)) < tasks;)
    for (int second = 0; second <= p->gated; second++) compute_outputs(p, t * TASK_OUTPUTS, end * TASK_OUTPUTS, second);
}

/* RMSNorm in float32: y = x / sqrt(mean(x * x) + eps) * weight, for one row x of `width` values. */
static void rms_norm_fp32(const float *x, const float *weight, float eps, long width, float *y) {
  __m512 squares = _mm512_setzero_ps();
  for (long k = 0; k < width; k += LANES) squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k), squares);
  const float mean = _mm512_reduce_add_ps(squares) / (float)width + eps;
  const __m512 factor = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean))));
  for (long k = 0; k < width; k += LANES)
    _mm512_storeu_ps(y + k, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor), _mm512_loadu_ps(weight + k)));
}

void linear_fp32(Parallel parallel, unsigned threads, const LinearArgs *args) {
  LinearArgs p = *args;
  if (p.norm) {
    for (long r = 0; r < p.n; r++)
      rms_norm_fp32((const float *)p.x + r * p.in, (const float *)p.norm, p.eps, p.in, (float *)p.normed + r * p.in);
    p.x = p.normed;
  }
  p.next = 0, p.threads = threads;
  parallel(linear_fp32_worker, &p, threads, 0);
}
