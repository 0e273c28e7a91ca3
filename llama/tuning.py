"""Constants found by measurement on some machines. All are only about speed and memory, except where a line says otherwise.

Read them as `tuning.NAME`, so that one place decides.
"""

# --- prefill and scoring: bounds of what activations take -------------------------------------------------------------------

PREFILL_CHUNK = 2048  # tokens of prompts in one forward: enough to keep any machine busy
ATTENTION_CHUNK = 128  # query positions whose scores are in memory at once; prompts are cut at its multiples
LOGPROB_CHUNK = 512  # positions whose logits are in memory at once

# --- decode steps on CUDA ---------------------------------------------------------------------------------------------------

MIN_GRAPH_CONTEXT = 128  # positions that the smallest captured step attends to; larger ones double
MAX_CAPTURED_STEPS = 64  # kept at a time, as each has its own memory for activations
INT8_CUDA_ROWS = 512  # rows that an int8 product rounds at a time, so that its intermediates stay small
INT4_CUDA_MAX_ROWS = 128  # up to which PyTorch's int4 kernel is faster than unpacking the weight once (H100)

# --- products on CPUs -------------------------------------------------------------------------------------------------------

MIN_PACKED_BYTES = 1 << 19  # of a weight; smaller ones are fastest with F.linear (Zen 4)
ONEDNN_MIN_ROWS = 4  # for fewer, oneDNN takes kernels slower by a third (Zen 4), and for 1 row one that rounds differently
INT4_CPU_MAX_ROWS = 96  # up to which PyTorch's int4 kernel is faster than unpacking the weight once
AVX2_MAX_ROWS_16BIT = 96  # up to which csrc/linear_avx2.c is faster than converting a 16-bit weight to float32 once
AVX2_MAX_ROWS_FP32 = 16  # the same for float32 weights against MKL
MAX_SINGLE_ROWS = 4  # up to which one F.linear per row is faster than converting a 16-bit weight to float32 once
PIECE_BYTES = 1 << 21  # of converted weights per thread, which stay in its cache until they are multiplied
MAX_COPY_BYTES = 1 << 26  # that copies of x for several threads may take

# --- loading ----------------------------------------------------------------------------------------------------------------

QUANTIZE_AT_ONCE = 1 << 20  # weights whose intermediates stay in a cache
QUANTIZE_SHARDS_AT_ONCE = 1 << 24  # weights joined from several shards at a time
