/* Linear layers for any number of rows, with packed bfloat16, int8 and int4 weights (layout: common.h), on CPUs with AVX-512
 * for bfloat16 and int8. For a few rows, weights are read once, at the speed of memory. For many rows, tiles of TILE rows
 * are multiplied by one block of the weight after another, while the block stays in the cache. The sums of a row are added
 * in the same order for any number of rows. blocked_linear.py fills LinearArgs; the C code checks neither sizes nor
 * addresses. */

#include "avx512.h"
#include "linear_avx512.h"

enum {
  TILE = 4,             /* number of rows in a tile: its 16 sums and the operands fit in the registers */
  TASK_ROWS = 32 * TILE /* number of rows of x in a task */
};

/* Return a register with the 4 bytes at x in each lane. */
INLINE __m512i broadcast_4_bytes(const void *x) {
  int32_t inputs;
  memcpy(&inputs, x, 4);
  return _mm512_set1_epi32(inputs);
}

/* Add dot products of 4 unsigned and 4 signed bytes to each lane. Inline assembly replaces _mm512_dpbusd_epi32, around which
 * GCC inserts copies of registers. */
INLINE __m512i dot_int8(__m512i sum, __m512i weight, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
  return sum;
}

/* The addresses to prefetch while a block is multiplied by a tile of rows. If there is only one tile, they are
 * PREFETCH_DISTANCE bytes ahead in the weight. If there are several tiles, the present block is in the cache, and each tile
 * prefetches its share of the next block, so that memory is read at a steady rate. */
typedef struct PrefetchPlan {
  const char *address;
  long step;        /* bytes to advance for each 256 bytes of the block */
  long second_line; /* each prefetch loads two addresses: the second is this many bytes after the first */
} PrefetchPlan;

INLINE PrefetchPlan plan_prefetch(const LinearArgs *p, const void *w, long bytes, long first) {
  const long tiles = (p->n + TILE - 1) / TILE, tile = first / TILE;
  if (tiles == 1 || tiles > TASK_ROWS / TILE) return (PrefetchPlan){(const char *)w + PREFETCH_DISTANCE, 4 * BLOCK_OUTPUTS, 0};
  return (PrefetchPlan){(const char *)w + bytes + bytes * tile / tiles, 4 * BLOCK_OUTPUTS / tiles, 64};
}

INLINE void prefetch_next(PrefetchPlan *plan) {
  _mm_prefetch(plan->address, _MM_HINT_T1);
  _mm_prefetch(plan->address + plan->second_line, _MM_HINT_T1);
  plan->address += plan->step;
}

/* The kernels multiply_bf16, multiply_int8 and multiply_int4 compute y for the outputs of block b and for rows `first` to
 * `first` + n - 1. */

INLINE void multiply_bf16(const LinearArgs *p, long b, long first, const int n, __m512 y[TILE][BLOCK_VECTORS]) {
  const bf16_t *w = (const bf16_t *)p->weight + b * BLOCK_OUTPUTS * p->in, *x = (const bf16_t *)p->x + first * p->in;
  PrefetchPlan plan = plan_prefetch(p, w, 2 * BLOCK_OUTPUTS * p->in, first);
  __m512 sum[TILE][BLOCK_VECTORS];
  UNROLL(r, n)
    UNROLL(i, BLOCK_VECTORS) sum[r][i] = _mm512_setzero_ps();
  for (long k = 0; k < p->in; k += 2, w += 2 * BLOCK_OUTPUTS) {
    prefetch_next(&plan);
    __m512bh v[BLOCK_VECTORS];
    UNROLL(i, BLOCK_VECTORS) v[i] = (__m512bh)_mm512_loadu_si512(w + 2 * LANES * i);
    UNROLL(r, n) {
      const __m512bh pair = (__m512bh)broadcast_4_bytes(x + r * p->in + k);
      UNROLL(i, BLOCK_VECTORS) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], v[i], pair);
    }
  }
  UNROLL(r, n)
    UNROLL(i, BLOCK_VECTORS) y[r][i] = sum[r][i];
}

/* Multiply 4 inputs of all outputs of a block and add the products to the sums of n rows. */
#define ADD_4_INPUTS(k)                                                                                \
  UNROLL(r, n) {                                                                                       \
    const __m512i inputs = broadcast_4_bytes(x.values + r * p->in + x_group * ACTIVATION_GROUP + (k)); \
    UNROLL(i, BLOCK_VECTORS) sum[r][i] = dot_int8(sum[r][i], v[i], inputs);                            \
  }

/* Multiply int8 or int4 weights. The integer sum of an activation group is multiplied by the scale of x and added to
 * `partial`. At the end of a group of the weight, `partial` is multiplied by the scale of the weight and added to y. */
INLINE void multiply_quantized(const LinearArgs *p, long b, long first, const int format, const int n,
                               __m512 y[TILE][BLOCK_VECTORS]) {
  const QuantizedRows x = quantized_rows(p, first);
  const long x_groups = p->in / ACTIVATION_GROUP, groups = p->in / p->group, x_groups_per_group = p->group / ACTIVATION_GROUP,
             inputs_per_word = format == INT8 ? 4 : 8;
  const uint8_t *w = (const uint8_t *)p->weight + b * BLOCK_OUTPUTS * p->in * 4 / inputs_per_word;
  const bf16_t *scales = p->scales + b * BLOCK_OUTPUTS * groups * (format == INT8 ? 1 : 2);
  const __m512i low = _mm512_set1_epi8(15);
  PrefetchPlan plan = plan_prefetch(p, w, BLOCK_OUTPUTS * p->in * 4 / inputs_per_word, first);
  float partial[TILE][BLOCK_VECTORS][LANES] __attribute__((aligned(64)));
  UNROLL(r, n)
    UNROLL(i, BLOCK_VECTORS) y[r][i] = _mm512_setzero_ps();
  for (long g = 0, x_group = 0; g < groups; g++) {
    for (long group_index = 0; group_index < x_groups_per_group; group_index++, x_group++) {
      __m512i sum[TILE][BLOCK_VECTORS];
      UNROLL(r, n)
        UNROLL(i, BLOCK_VECTORS) sum[r][i] = _mm512_set1_epi32(x.bias[r * x_groups + x_group]);
      UNROLL(j, 8) {
        if (j >= ACTIVATION_GROUP / inputs_per_word) continue;
        prefetch_next(&plan);
        __m512i v[BLOCK_VECTORS], bytes[BLOCK_VECTORS];
        UNROLL(i, BLOCK_VECTORS) {
          bytes[i] = _mm512_loadu_si512(w + 64 * i);
          v[i] = format == INT8 ? bytes[i] : _mm512_and_si512(bytes[i], low);
        }
        ADD_4_INPUTS(inputs_per_word * j)
        if (format == INT4) {
          UNROLL(i, BLOCK_VECTORS) v[i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), low);
          ADD_4_INPUTS(inputs_per_word * j + 4)
        }
        w += 4 * BLOCK_OUTPUTS;
      }
      /* In the first activation group of a weight's group, there is no earlier partial sum to add. */
      const __mmask16 has_partial = group_index ? 0xffff : 0;
      UNROLL(i, BLOCK_VECTORS)
        UNROLL(r, n) {
          const __m512 scale = _mm512_set1_ps(x.scales[r * x_groups + x_group]),
                       previous = _mm512_maskz_load_ps(has_partial, partial[r][i]);
          _mm512_store_ps(partial[r][i], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][i]), scale, previous));
        }
      /* Force `y` and `partial` into memory, so that the registers are free for the sums. */
      __asm__ volatile("" ::: "memory");
    }
    UNROLL(i, BLOCK_VECTORS) {
      __m512 scale, zero = _mm512_setzero_ps();
      load_scales(format, scales + (g * BLOCK_OUTPUTS + i * LANES) * (format == INT8 ? 1 : 2), &scale, &zero);
      UNROLL(r, n) {
        y[r][i] = _mm512_fmadd_ps(_mm512_load_ps(partial[r][i]), scale, y[r][i]);
        if (format == INT4) y[r][i] = _mm512_fmadd_ps(zero, _mm512_set1_ps(x.sums[r * groups + g]), y[r][i]);
      }
    }
  }
}
INLINE void multiply_int8(const LinearArgs *p, long b, long first, const int n, __m512 y[TILE][BLOCK_VECTORS]) {
  multiply_quantized(p, b, first, INT8, n, y);
}
INLINE void multiply_int4(const LinearArgs *p, long b, long first, const int n, __m512 y[TILE][BLOCK_VECTORS]) {
  multiply_quantized(p, b, first, INT4, n, y);
}

/* Define a function that calls a kernel with a constant number of rows, which determines the number of registers. */
#define DEFINE_DISPATCH_BY_ROWS(kernel)                                                                \
  static void __attribute__((noinline)) kernel##_rows(const LinearArgs *p, long b, long first, long n, \
                                                      __m512 y[TILE][BLOCK_VECTORS]) {                 \
    switch (n) {                                                                                       \
      case 1: kernel(p, b, first, 1, y); break;                                                        \
      case 2: kernel(p, b, first, 2, y); break;                                                        \
      case 3: kernel(p, b, first, 3, y); break;                                                        \
      default: kernel(p, b, first, TILE, y);                                                           \
    }                                                                                                  \
  }
DEFINE_DISPATCH_BY_ROWS(multiply_bf16)
DEFINE_DISPATCH_BY_ROWS(multiply_int8)
DEFINE_DISPATCH_BY_ROWS(multiply_int4)

/* Compute and store y for the outputs of block b and for n rows, including SwiGLU or the addition of the residual. */
static void compute_block(const LinearArgs *p, long b, long first, long n) {
  static void (*const kernels[])(const LinearArgs *, long, long, long, __m512[TILE][BLOCK_VECTORS]) = {
      multiply_bf16_rows, 0, 0, multiply_int8_rows, multiply_int4_rows};
  __m512 y[TILE][BLOCK_VECTORS], up[TILE][BLOCK_VECTORS] = {0};
  kernels[p->format](p, b, first, n, y);
  if (p->gated) kernels[p->format](p, b + p->out / BLOCK_OUTPUTS, first, n, up);
  store_block(p, b, first, n, y, up);
}

/* The function that each thread runs: normalize rows of x if there is an RMSNorm; then quantize them, or copy them into tiles
 * for AMX, or leave them as they are. */
static void prepare_rows_worker(void *shared) {
  LinearArgs *p = shared;
  const int size = p->x_dtype == FP32 ? 4 : 2;
  for (long r; (r = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n / p->int8_per_activation;) {
    const void *x = (const char *)p->x + r * p->in * size;
    if (p->norm) {
      rms_norm(x, p->norm, p->eps, p->in, p->normed + r * p->in);
      x = p->normed + r * p->in;
    }
    if (p->tiled) copy_row_into_tiles(p, x, r);
    else if (p->quantizes_x) quantize_row(p, x, r * p->int8_per_activation);
  }
}

#include "tiles.h"

void linear_fp32(Parallel parallel, unsigned threads, const LinearArgs *args);

void linear(Parallel parallel, unsigned threads, const LinearArgs *args) {
  if (args->format == FP32) return linear_fp32(parallel, threads, args);
  LinearArgs p = *args;
  const Worker amx_worker = choose_amx(&p);
  p.quantizes_x = p.format != BF16 && !amx_worker;
  if (p.norm || p.quantizes_x || p.tiled) prepare_rows(parallel, threads, &p);
  if (p.norm) p.x = p.normed;
  p.next = 0, p.threads = threads;
  parallel(amx_worker ? amx_worker : blocks_worker, &p, threads, 0);
}
