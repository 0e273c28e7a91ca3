/* Decode steps for a few rows in bfloat16 or float32, on CPUs with AVX-512 for bfloat16 and int8: RMSNorm, SwiGLU, rotary
 * embeddings, attention, and a loop over all layers of a model. Weights are read once. SwiGLU gives the same bfloat16 results
 * as PyTorch, except for subnormal values; RMSNorm and attention add in another order than PyTorch.
 * avx512.py and llama/backends/cpu.py fill the structures; the C code checks neither sizes nor addresses. */

#include "avx512.h"
#include "fp32.h"

/* ---- RMSNorm and SwiGLU, row by row ---- */

typedef struct RowsArgs {
  long gated;           /* 1 for SwiGLU: y = silu(first half of x) * second half; 0 for RMSNorm */
  const bf16_t *x;      /* input x: (n, width) for RMSNorm, (n, 2, width) for SwiGLU */
  const bf16_t *weight; /* weight of the RMSNorm: (width) */
  bf16_t *y;            /* output y: (n, width) */
  float eps, unused;    /* eps of the RMSNorm */
  long n, width, next;  /* next: the first row that no thread has claimed */
} RowsArgs;

/* The function that each thread runs: normalize or gate one row after another. */
static void rows_worker(void *shared) {
  RowsArgs *a = shared;
  const long width = a->width;
  for (long r; (r = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->n;) {
    if (!a->gated) {
      rms_norm(a->x + r * width, a->weight, a->eps, width, a->y + r * width);
      continue;
    }
    const bf16_t *x = a->x + 2 * r * width;
    for (long k = 0; k < width; k += LANES)
      store_bf16(a->y + r * width + k, swiglu(load_bf16(x + k), load_bf16(x + width + k)));
  }
}

void normalize_or_gate_rows(Parallel parallel, unsigned threads, const RowsArgs *args) {
  RowsArgs a = *args;
  a.next = 0;
  parallel(rows_worker, &a, threads < a.n ? threads : a.n, 0);
}

/* ---- attention of one query per token ---- */

/* n: tokens of the batch, those of a row of the cache adjacent and in order; K: key/value heads; G: queries for each key/value
 * head; hd: head_dim. Strides are counted in values. */
typedef struct AttentionArgs {
  void *q;                /* queries (n, K, G, hd); with rotations, each row also has its new key and value, (2, K, hd) */
  const float *rotations; /* cosines and sines (n, hd / 2, 2), or NULL if q is rotated and all keys and values are cached */
  void *keys, *values;    /* keys and values of the cache: (rows, K, max_seq_len, hd) */
  const long *rows_and_positions; /* pairs (n, 2): the row of the cache, and the position of the query */
  float *scores;                  /* buffer (n, K, G, max_seq_len) for attention scores */
  void *y;                        /* output y: (n, K, G, hd) */
  long dtype;                     /* BF16 or FP32: the dtype of q, keys, values and y */
  long n, K, G, hd, max_seq_len, q_stride, row_stride, head_stride, next;
} AttentionArgs;

/* Rotate adjacent pairs of values in place: each pair is a complex number that is multiplied by a complex number of
 * `rotations`. */
INLINE void apply_rope(const int dtype, void *x, const float *rotations, long hd) {
  for (long k = 0; k < hd; k += LANES) {
    const __m512 v = load_values(dtype, x, k), factor = _mm512_loadu_ps(rotations + k);
    const __m512 direct = _mm512_mul_ps(v, _mm512_moveldup_ps(factor)), across = _mm512_mul_ps(v, _mm512_movehdup_ps(factor));
    const __m512 crossed = _mm512_permute_ps(across, 0xb1);
    store_values(dtype, x, k, _mm512_mask_add_ps(_mm512_sub_ps(direct, crossed), 0xaaaa, direct, crossed));
  }
}

/* Compute the dot products of one query with n keys; n is 1 or 4. */
INLINE void dot_products(const int dtype, const void *q, const void *keys, long hd, const int n, float *scores) {
  __m512 s[4] = {0};
  if (dtype == FP32)
    for (long k = 0; k < hd; k += LANES)
      UNROLL(i, n) s[i] = _mm512_fmadd_ps(load_values(FP32, q, k), load_values(FP32, keys, i * hd + k), s[i]);
  else
    for (long k = 0; k < hd; k += 2 * LANES)
      UNROLL(i, n)
        s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)_mm512_loadu_si512(element(BF16, q, k)),
                                (__m512bh)_mm512_loadu_si512(element(BF16, keys, i * hd + k)));
  if (n == 1) *scores = _mm512_reduce_add_ps(s[0]);
  else _mm_storeu_ps(scores, sum_4_registers(s));
}

/* Compute 16 * n features of the attention output y: the sum over positions of weights (kv_len) times values (kv_len, hd). */
INLINE void weighted_sum(const int dtype, const float *weights, const void *values, long hd, long kv_len, const int n,
                         void *y) {
  __m512 sum[4] = {0};
  for (long position = 0; position < kv_len; position++)
    UNROLL(i, n)
      sum[i] =
          _mm512_fmadd_ps(_mm512_set1_ps(weights[position]), load_values(dtype, values, position * hd + i * LANES), sum[i]);
  UNROLL(i, n) store_values(dtype, y, i * LANES, sum[i]);
}

/* Compute attention for the G queries of one key/value head for one token of the batch, over positions 0 to kv_len - 1. */
INLINE void attend_one_head(const AttentionArgs *a, const int dtype, const void *q, const void *keys, const void *values,
                            float *scores, void *y, long kv_len) {
  const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss((float)a->hd))));
  /* Each key is read once for all G queries. */
  long position = 0;
  for (; position + 4 <= kv_len; position += 4)
    for (long g = 0; g < a->G; g++)
      dot_products(dtype, element(dtype, q, g * a->hd), element(dtype, keys, position * a->hd), a->hd, 4,
                   scores + g * a->max_seq_len + position);
  for (; position < kv_len; position++)
    for (long g = 0; g < a->G; g++)
      dot_products(dtype, element(dtype, q, g * a->hd), element(dtype, keys, position * a->hd), a->hd, 1,
                   scores + g * a->max_seq_len + position);
  for (long g = 0; g < a->G; g++) {
    float *s = scores + g * a->max_seq_len;
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    /* In bfloat16, scores are rounded before and after the scaling, as in Meta's reference code. */
    for (long k = 0; k < kv_len; k += LANES) {
      const __m512 x = round_to_dtype(
          dtype, _mm512_mul_ps(round_to_dtype(dtype, _mm512_maskz_loadu_ps(tail_mask(kv_len - k), s + k)), scale));
      largest = _mm512_mask_max_ps(largest, tail_mask(kv_len - k), largest, x);
      _mm512_mask_storeu_ps(s + k, tail_mask(kv_len - k), x);
    }
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (long k = 0; k < kv_len; k += LANES) {
      const __m512 e = exp_fp32(_mm512_sub_ps(_mm512_maskz_loadu_ps(tail_mask(kv_len - k), s + k), maximum));
      sum = _mm512_mask_add_ps(sum, tail_mask(kv_len - k), sum, e);
      _mm512_mask_storeu_ps(s + k, tail_mask(kv_len - k), e);
    }
    const __m512 factor = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    for (long k = 0; k < kv_len; k += LANES)
      _mm512_mask_storeu_ps(s + k, tail_mask(kv_len - k),
                            round_to_dtype(dtype, _mm512_mul_ps(_mm512_maskz_loadu_ps(tail_mask(kv_len - k), s + k), factor)));
    long k = 0;
    for (; k + 4 * LANES <= a->hd; k += 4 * LANES)
      weighted_sum(dtype, s, element(dtype, values, k), a->hd, kv_len, 4, element(dtype, y, g * a->hd + k));
    for (; k < a->hd; k += 2 * LANES)
      weighted_sum(dtype, s, element(dtype, values, k), a->hd, kv_len, 2, element(dtype, y, g * a->hd + k));
  }
}

/* Rotate the queries and the new key of one key/value head of one token, store the new key and value, and compute attention. */
INLINE void decode_head(const AttentionArgs *a, const int dtype, long i) {
  const long r = i / a->K, head = i % a->K, group = a->G * a->hd, row = a->rows_and_positions[2 * r],
             position = a->rows_and_positions[2 * r + 1];
  void *q = element(dtype, a->q, r * a->q_stride + head * group);
  void *keys = element(dtype, a->keys, row * a->row_stride + head * a->head_stride);
  void *values = element(dtype, a->values, row * a->row_stride + head * a->head_stride);
  if (a->rotations) {
    const float *rotations = a->rotations + r * a->hd;
    void *key = element(dtype, a->q, r * a->q_stride + (a->K * a->G + head) * a->hd);
    void *value = element(dtype, key, a->K * a->hd);
    apply_rope(dtype, key, rotations, a->hd);
    for (long g = 0; g < a->G; g++) apply_rope(dtype, element(dtype, q, g * a->hd), rotations, a->hd);
    memcpy(element(dtype, keys, position * a->hd), key, value_bytes(dtype) * a->hd);
    memcpy(element(dtype, values, position * a->hd), value, value_bytes(dtype) * a->hd);
  }
  attend_one_head(a, dtype, q, keys, values, a->scores + i * a->G * a->max_seq_len, element(dtype, a->y, i * group),
                  position + 1);
}

/* Return 1 if token r of the batch is in the same row of the cache as the token before it. */
INLINE int continues_row(const AttentionArgs *a, long r) {
  return r > 0 && r < a->n && a->rows_and_positions[2 * r] == a->rows_and_positions[2 * r - 2];
}

/* The function that each thread runs: compute attention for one key/value head of one row at a time. Of several tokens of a
 * row, each attends to the keys and values that those before it have stored. */
static void decode_attention_worker(void *shared) {
  AttentionArgs *a = shared;
  for (long i; (i = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->n * a->K;) {
    if (continues_row(a, i / a->K)) continue; /* the task of the row's first token computes it */
    do {
      if (a->dtype == FP32) decode_head(a, FP32, i);
      else decode_head(a, BF16, i);
      i += a->K;
    } while (continues_row(a, i / a->K));
  }
}

void decode_attention(Parallel parallel, unsigned threads, const AttentionArgs *args) {
  AttentionArgs a = *args;
  a.next = 0;
  parallel(decode_attention_worker, &a, threads, 0);
}

/* ---- all layers of a model ---- */

void linear(Parallel parallel, unsigned threads, const LinearArgs *args);

/* Run the n layers of a model. For each of them, call `linear` 4 times, including norms, SwiGLU and residuals, and compute
 * attention after the first call. */
void decode_layers(Parallel parallel, unsigned threads, const LinearArgs *linears, const AttentionArgs *attentions, long n) {
  for (const LinearArgs *p = linears; p < linears + 4 * n; p++) {
    linear(parallel, threads, p);
    if ((p - linears) % 4 == 0) decode_attention(parallel, threads, attentions++);
  }
}

/* c_extension.py compares these values with the checksum of the C files and with the sizes of its ctypes structures. The
 * last value is the size of PromptAttentionArgs. */
const long abi_info[] = {SOURCE, sizeof(RowsArgs), sizeof(LinearArgs), sizeof(AttentionArgs), 20 * sizeof(long)};

int cpu_supported(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         has_f16c();
}
