/* Linear layers on CPUs with AMX, which multiplies tiles: matrices of up to 16 rows of 64 bytes. A tile of x is multiplied by
 * tiles of a packed bfloat16 weight, 32 inputs of 16 outputs each. int8 and int4 weights are converted to bfloat16 first, if
 * the field `dequantize` asks for it.
 *
 * AMX adds in another order than linear_avx512.c. It is therefore used for any number of rows, even one, so that the sums of a
 * row do not depend on the other rows. */

#include "amx.h"
#include "linear_avx512.h"

#include <sys/syscall.h>
#include <unistd.h>

static const float BYTE_OFFSET = 1 << 15;

enum {
  CHUNK_ROWS = 256, /* number of rows of x in a task */
  MAX_GROUP = 4,    /* number of blocks in a task, so that x is read only once for all of them */
  PANEL = 256       /* number of inputs of a block that are multiplied at a time by all rows: they fit in the L1 cache */
};

/* The rows of x that a task multiplies. They are in tiles, or if there is only one tile, in rows. */
typedef struct TiledRows {
  const char *x;
  long n;         /* number of rows */
  long stride;    /* bytes from a row of a tile to the next */
  long next_tile; /* bytes from a tile to the one with the next TILE_INPUTS inputs of the same rows */
  long tile_rows; /* bytes from a tile to the one with the same inputs of the next TILE_ROWS rows */
} TiledRows;

/* Multiply two tiles of rows by 32 outputs. This needs fewer loads of tiles for each product. */
static void multiply_2_tiles(const TiledRows *rows, const char *x, const char *w, long inputs, int is_first, char *y) {
  char *next_y = y + TILE_ROWS * STRIDE;
  BEGIN_SUMS(is_first, y, y + 64, next_y, next_y + 64)
  for (long k = 0; k < inputs; k += TILE_INPUTS, x += rows->next_tile, w += TILE_ROWS * STRIDE) {
    LOAD_TILE(4, x, rows->stride);
    LOAD_TILE(6, w, STRIDE);
    ADD_PRODUCT(0, 4, 6);
    LOAD_TILE(7, w + 64, STRIDE);
    ADD_PRODUCT(1, 4, 7);
    LOAD_TILE(5, x + rows->tile_rows, rows->stride);
    ADD_PRODUCT(2, 5, 6);
    ADD_PRODUCT(3, 5, 7);
  }
  STORE_SUMS(y, y + 64, next_y, next_y + 64)
}

/* Multiply inputs `begin` to `end` - 1 of all rows by the same inputs of a block at address w, and add to y (n, 64). */
static void multiply_panel(const TiledRows *rows, const char *w, long begin, long end, char *y) {
  const char *x = rows->x + begin / TILE_INPUTS * rows->next_tile;
  const long tiles = (rows->n + TILE_ROWS - 1) / TILE_ROWS;
  for (long half = 0; half < 256; half += 128)
    for (long tile = 0; tile + 1 < tiles; tile += 2)
      multiply_2_tiles(rows, x + tile * rows->tile_rows, w + half, end - begin, !begin, y + tile * TILE_ROWS * STRIDE + half);
  if (tiles % 2)
    multiply_tile(x + (tiles - 1) * rows->tile_rows, rows->stride, rows->next_tile, w, STRIDE, end - begin, !begin,
                  y + (tiles - 1) * TILE_ROWS * STRIDE);
}

/* Return 16 bytes of x, each plus 2^15, as floats: a byte is in bits 8 to 15 of a float whose last bit counts 2^-8. The second
 * byte of each lane of `numbers` says which byte. The instruction is part of AVX512-VBMI, which every CPU with AMX has. */
INLINE __m512 pick_bytes(__m512i numbers, __m512i x) {
  __m512 y = _mm512_set1_ps(BYTE_OFFSET);
  __asm__("vpermb %2, %1, %0%{%3%}" : "+v"(y) : "v"(numbers), "v"(x), "Yk"((__mmask64)0x2222222222222222));
  return y;
}

/* Dequantize a group of 16 outputs: for each pair of adjacent inputs, store 16 outputs with 2 inputs each in bfloat16. words,
 * scales and panel are the addresses of the first of the 16 outputs. */
INLINE void dequantize_group(const int format, const uint8_t *words, const bf16_t *scales, long inputs, bf16_t *panel) {
  const long inputs_per_word = format == INT8 ? 4 : 8, next_pair = 2 * BLOCK_OUTPUTS;
  /* In the order of the pairs: lane 2 * i + j of register k has input j of output 8 * k + i. */
  const __m512i outputs = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), eight = _mm512_set1_epi32(8);
  const __m512i bytes = _mm512_add_epi32(_mm512_slli_epi32(outputs, 2), _mm512_set1_epi64(1LL << 32));
  __m512 scale[2], offset[2], zero[2], all_scales, all_zeros = _mm512_setzero_ps();
  load_scales(format, scales, &all_scales, &all_zeros);
  UNROLL(k, 2) {
    const __m512i lanes = k ? _mm512_add_epi32(outputs, eight) : outputs;
    scale[k] = _mm512_permutexvar_ps(lanes, all_scales), zero[k] = _mm512_permutexvar_ps(lanes, all_zeros);
    offset[k] = _mm512_mul_ps(scale[k], _mm512_set1_ps((format == INT8 ? -128 : -8) - BYTE_OFFSET)); /* exact */
  }
  for (long i = 0; i < inputs; i += inputs_per_word, words += 4 * BLOCK_OUTPUTS) {
    prefetch_ahead(words);
    const __m512i stored = _mm512_loadu_si512(words), low = _mm512_set1_epi8(15);
    UNROLL(half, 2) {
      if (half == 1 && format == INT8) continue; /* only int4 has two inputs in a byte */
      const __m512i values =
          format == INT8 ? stored : _mm512_and_si512(half ? _mm512_srli_epi16(stored, 4) : stored, low);
      UNROLL(pair, 2) {
        __m512 v[2];
        UNROLL(k, 2) {
          const __m512i numbers = _mm512_add_epi32(bytes, _mm512_set1_epi32(32 * k + 2 * pair));
          v[k] = _mm512_fmadd_ps(pick_bytes(_mm512_slli_epi32(numbers, 8), values), scale[k], offset[k]);
          if (format == INT4) v[k] = _mm512_add_ps(v[k], zero[k]);
        }
        _mm512_store_si512(panel, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
        panel += next_pair;
      }
    }
  }
}

/* Convert inputs `begin` to `end` - 1 of block b of an int8 or int4 weight to a packed bfloat16 weight. */
INLINE void dequantize_panel(const LinearArgs *p, const int format, long b, long begin, long end, bf16_t *panel) {
  const long group_bytes = p->group * BLOCK_OUTPUTS / (format == INT8 ? 1 : 2), per_output = format == INT8 ? 1 : 2;
  const uint8_t *words = (const uint8_t *)p->weight + (b * p->in + begin) * BLOCK_OUTPUTS / per_output;
  const bf16_t *scales = p->scales + (b * p->in + begin) / p->group * BLOCK_OUTPUTS * per_output;
  for (long k = begin; k < end; k += p->group) {
    UNROLL(i, BLOCK_VECTORS)
      dequantize_group(format, words + 4 * LANES * i, scales + LANES * per_output * i, p->group, panel + 2 * LANES * i);
    words += group_bytes, scales += BLOCK_OUTPUTS * per_output, panel += p->group * BLOCK_OUTPUTS;
  }
}

/* Multiply n_blocks blocks from b on by all rows, and store the sums in y (n_blocks, CHUNK_ROWS, 64). */
static void multiply_blocks(const LinearArgs *p, const TiledRows *rows, long b, long n_blocks,
                            __m512 y[][CHUNK_ROWS][BLOCK_VECTORS]) {
  static _Thread_local bf16_t panel[PANEL * BLOCK_OUTPUTS] __attribute__((aligned(64)));
  /* For one or two tiles of rows, the weight comes from memory: it is read in one go, so that it can be prefetched. */
  const long width = p->format == BF16 && rows->n <= 2 * TILE_ROWS ? p->in : PANEL;
  for (long begin = 0; begin < p->in; begin += width) {
    const long end = begin + width < p->in ? begin + width : p->in;
    for (long i = 0; i < n_blocks; i++) {
      const long block = b + i;
      if (p->format == INT8) dequantize_panel(p, INT8, block, begin, end, panel);
      if (p->format == INT4) dequantize_panel(p, INT4, block, begin, end, panel);
      const bf16_t *weight = p->format == BF16 ? (const bf16_t *)p->weight + (block * p->in + begin) * BLOCK_OUTPUTS : panel;
      multiply_panel(rows, (const char *)weight, begin, end, (char *)y[i]);
    }
  }
}

/* The function that each thread runs: multiply claimed groups of blocks by CHUNK_ROWS rows. */
static void tiles_worker(void *shared) {
  LinearArgs *p = shared;
  const long blocks = (p->out + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS, chunks = (p->n + CHUNK_ROWS - 1) / CHUNK_ROWS;
  const long largest = p->gated ? MAX_GROUP / 2 : MAX_GROUP, share = blocks * chunks / (4 * p->threads),
             group = share < 1 ? 1 : share < largest ? share : largest, groups = (blocks + group - 1) / group;
  /* 256 KB: too much for the stack of some threads. */
  static _Thread_local __m512 y[MAX_GROUP][CHUNK_ROWS][BLOCK_VECTORS];
  TileShapes shapes;
  const TileShapes before = begin_tiles(&shapes, TILE_ROWS);
  for (long t, end; (t = claim_tasks(&p->next, p->threads, groups * chunks, &end)) < groups * chunks;)
    for (; t < end; t++) {
      const long b = t % groups * group, first = t / groups * CHUNK_ROWS, n_blocks = blocks - b < group ? blocks - b : group;
      TiledRows rows = {.n = p->n - first < CHUNK_ROWS ? p->n - first : CHUNK_ROWS};
      rows.x = (const char *)(p->tiled ? p->scratch : p->x) + 2 * first * p->in;
      rows.stride = p->tiled ? 64 : 2 * p->in, rows.next_tile = p->tiled ? 64 * TILE_ROWS : 64;
      rows.tile_rows = 2 * TILE_ROWS * p->in;
      set_rows(&shapes, p->tiled ? TILE_ROWS : rows.n);
      multiply_blocks(p, &rows, b, n_blocks, y);
      if (p->gated) multiply_blocks(p, &rows, b + blocks, n_blocks, y + largest);
      for (long i = 0; i < n_blocks; i++) store_block(p, b + i, first, rows.n, y[i], y[p->gated ? largest + i : i]);
    }
  end_tiles(before);
}

/* Return 1 if this process may use AMX. The kernel must allow it, because tiles add 8 KB to the state of a thread. */
static int amx_allowed(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0; /* AMX-BF16 and AMX-TILE */
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

int amx_in_use;

/* Use AMX from now on if `wanted` and the CPU has it. Return 1 if it is in use. */
int use_amx(int wanted) { return amx_in_use = wanted && amx_allowed(); }

Worker choose_amx(LinearArgs *p) {
  const int converts = p->dequantize && p->x_dtype == BF16 && p->int8_per_activation == 1 && PANEL % p->group == 0,
            fits = amx_in_use && (p->format == BF16 || converts);
  p->tiled = fits && p->n > TILE_ROWS;
  return fits ? tiles_worker : 0;
}
