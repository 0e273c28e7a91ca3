/* Define what prompt_attention_avx512.c and prompt_attention_amx.c share: causal attention for prefill in bfloat16. */

enum { BLOCK_KEYS = 64 /* positions in a block of packed keys or values */ };

/* B: batch size; S: query positions; K: key/value heads; G: queries for each key/value head; hd: head_dim; L: key positions.
 * Strides are counted in values: q_batch and kv_batch between rows of the batch, q_stride and kv_stride between positions, and
 * kv_head between heads. */
typedef struct PromptAttentionArgs {
  const bf16_t *q;             /* queries (B, S, K, G, hd), with strides between rows of the batch and between positions */
  const bf16_t *keys, *values; /* keys and values (B, K, L, hd), with strides between rows of the batch, heads and positions */
  bf16_t *y;                   /* output y: (B, S, K, G, hd) */
  bf16_t *packed_kv;           /* buffer (2, B, K, blocks, 64, hd) for packed keys and values, in blocks of 64 positions */
  float *scores;               /* buffer of `scores_size` floats for each thread: scores and weights of a few queries */
  long B, S, K, G, hd, L, q_batch, q_stride, kv_batch, kv_head, kv_stride;
  long scores_size;
  long threads_started, next; /* the number of threads that have started, and the first task that no thread has claimed */
} PromptAttentionArgs;

static inline long n_blocks(const PromptAttentionArgs *a) { return (a->L + BLOCK_KEYS - 1) / BLOCK_KEYS; }

/* The function that each thread runs if AMX is in use: compute TILE_ROWS query rows at a time. */
void prompt_attention_amx_worker(void *shared);
