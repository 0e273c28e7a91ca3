/* Products of a few float32 rows by float32 weights as they are stored, with the norm, gate and residual around them.
 *
 * Weights are read once, at the rate of memory. A row's sums go in the same order whatever rows are beside it. cpu.py fills the
 * structure; no size and no address is checked here. */

#pragma GCC target("tune=znver2") /* GCC's order of instructions for it is faster on Zen 5 by a sixth with 4 rows */

#include "avx512.h"
#include "fp32.h"

enum { TASK = 16 }; /* outputs of a task */

static const float *weight_row(const Product *p, long o) {
  long part = 0;
  while (o >= p->ends[part]) part++;
  return p->parts[part] + (part ? o - p->ends[part - 1] : o) * p->in;
}

static __m128 gated_fp32(__m128 x, __m128 up) { /* silu(x) * up */
  const __m512 wide = _mm512_castps128_ps512(x), below = exponential(_mm512_sub_ps(_mm512_setzero_ps(), wide));
  return _mm_mul_ps(_mm_div_ps(x, _mm_add_ps(_mm_set1_ps(1), _mm512_castps512_ps128(below))), up);
}

/* Outputs o to end of all rows; the second half of a gated product multiplies what the first has written. */
static void outputs(const Product *p, long o, long end, int second) {
  for (; o < end; o += FP32_OUTPUTS)
    for (long first = 0; first < p->n; first += FP32_ROWS) {
      const long n = p->n - first < FP32_ROWS ? p->n - first : FP32_ROWS;
      __m128 v[FP32_ROWS];
      fp32_outputs(weight_row(p, second ? p->out + o : o), (const float *)p->x + first * p->in, p->in, FP32_OUTPUTS, n, v);
      for (long r = 0; r < n; r++) {
        float *y = (float *)p->y + (first + r) * p->out + o;
        if (second) v[r] = gated_fp32(_mm_loadu_ps(y), v[r]);
        if (p->residual) v[r] = _mm_add_ps(v[r], _mm_loadu_ps((const float *)p->residual + (y - (float *)p->y)));
        _mm_storeu_ps(y, v[r]);
      }
    }
}

static void in_rows(void *shared) { /* what a thread does: each half in one long run, as memory is read best */
  Product *p = shared;
  for (long t, end, tasks = p->out / TASK; (t = take(&p->next, p->threads, tasks, &end)) < tasks;)
    for (int second = 0; second <= p->gated; second++) outputs(p, t * TASK, end * TASK, second);
}

static void normalize_fp32(const float *x, const float *weight, float eps, long width, float *y) {
  __m512 squares = _mm512_setzero_ps();
  for (long k = 0; k < width; k += LANES) squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k), squares);
  const float mean = _mm512_reduce_add_ps(squares) / (float)width + eps;
  const __m512 factor = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean))));
  for (long k = 0; k < width; k += LANES)
    _mm512_storeu_ps(y + k, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor), _mm512_loadu_ps(weight + k)));
}

void multiply_fp32(Parallel parallel, unsigned threads, const Product *given) {
  Product p = *given;
  if (p.norm) {
    for (long r = 0; r < p.n; r++)
      normalize_fp32((const float *)p.x + r * p.in, (const float *)p.norm, p.eps, p.in, (float *)p.normed + r * p.in);
    p.x = p.normed;
  }
  p.next = 0, p.threads = threads;
  parallel(in_rows, &p, threads, 0);
}
