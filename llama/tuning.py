"""Constants found by measurement. They change only speed and memory, except where a comment says otherwise.

Read them as `tuning.NAME`, so that changing a value here takes effect everywhere.
"""

# --- prefill and scoring: limits of activation memory -----------------------------------------------------------------------

PREFILL_CHUNK = 2048  # maximum prompt tokens in one forward pass: enough to keep any machine busy
PREFILL_CHUNK_BESIDE_DECODING = 256  # the same while other rows decode, whose next tokens wait for the chunk
ATTENTION_CHUNK = 128  # query tokens whose attention scores are in memory at once; prompts are cut at multiples of this number
MIN_SHARED_PREFIX = 8  # minimum number of tokens with which prompts must begin alike, to be copied from row to row
MIN_CACHED_PREFIX = 1024  # `score` uses rows of the cache for prefixes of at least this many tokens
MIN_KEPT_PREFIX = 256  # the same for a call of few sequences, where later calls can use the prefixes that stay in the cache
MIN_AWAITED_PREFIX = 32  # the same to wait for another prompt's prefill: one more forward, which reads all weights
MIN_SAVED_PREFIX = 64  # minimum number of tokens that are saved from a row of the cache that another prompt gets
LOGPROB_CHUNK = 512  # positions whose logits are in memory at once, to compute log probabilities

# --- decode steps on CUDA ---------------------------------------------------------------------------------------------------

MIN_GRAPH_CONTEXT = 128  # positions that the smallest captured decode step attends to; larger steps attend to 256, 512, ...
MAX_CAPTURED_STEPS = 64  # maximum number of captured decode steps; each has its own memory for activations
INT8_CUDA_ROWS = 512  # maximum rows of an int8 product on CUDA; more rows are split, so that temporary tensors stay small
INT4_CUDA_MAX_ROWS = 128  # up to this number of rows, PyTorch's int4 kernel is faster than unpacking the weight once (H100)

# --- products on CPUs -------------------------------------------------------------------------------------------------------

MIN_PACKED_BYTES = 1 << 19  # minimum size of a packed weight; smaller weights are fastest with F.linear (Zen 4)
ONEDNN_MIN_ROWS = 4  # for fewer rows, oneDNN is slower by a third (Zen 4); a single row is also rounded differently
INT4_CPU_MAX_ROWS = 96  # up to this number of rows, PyTorch's int4 kernel is faster than unpacking the weight once
AVX2_MAX_ROWS_16BIT = 96  # up to this number of rows, csrc/linear_avx2.c is faster than converting a 16-bit weight to float32
AVX2_MAX_ROWS_FP32 = 16  # up to this number of rows, csrc/linear_avx2.c is faster than MKL for float32 weights
AVX2_MIN_WIDTH_FP32 = 128  # with fewer inputs, products take microseconds, and MKL adds in the order of Meta's implementation
MAX_SINGLE_ROWS = 4  # up to this number of rows, F.linear row by row is faster than converting a 16-bit weight to float32
PIECE_BYTES = 1 << 21  # bytes of weights that a thread converts at a time; they stay in its cache until they are multiplied
MAX_COPY_BYTES = 1 << 26  # maximum bytes for copies of an input; each thread multiplies a separate copy

# --- loading ----------------------------------------------------------------------------------------------------------------

QUANTIZE_AT_ONCE = 1 << 20  # number of values to quantize at a time, so that temporary tensors stay in a cache
QUANTIZE_SHARDS_AT_ONCE = 1 << 24  # number of values to join from several shards and quantize at a time
