/* Define the instructions of AMX, which multiplies tiles: matrices of up to 16 rows of 64 bytes. The function `use_amx`
 * switches AMX on. A function that uses tiles must call `begin_tiles` before and `end_tiles` after. */

#include "avx512.h"

enum {
  STRIDE = 256 /* bytes of a row of 64 float32 sums, or of 64 pairs of bfloat16 values of the second factor */
};

/* The instructions as bytes, since many assemblers and compilers do not know AMX. t, a, b and c are numbers of tiles. The
 * address is in rax, and the stride, in bytes, in rdx. */
#define ZERO_TILE(t) __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, %c0" ::"i"(0xc0 | (t) << 3))
#define LOAD_TILE(t, address, stride)                                                                                   \
  __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, %c2, 0x10" ::"a"(address), "d"((long)(stride)), "i"(0x04 | (t) << 3) \
                   : "memory")
#define STORE_TILE(t, address) \
  __asm__ volatile(".byte 0xc4, 0xe2, 0x7a, 0x4b, %c2, 0x10" ::"a"(address), "d"((long)STRIDE), "i"(0x04 | (t) << 3) : "memory")
/* Add the product of tiles a and b, in bfloat16, to tile c. */
#define ADD_PRODUCT(c, a, b)                                                                               \
  __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"(0x02 | (~(b) & 15) << 3), "i"(0xc0 | (c) << 3 | (a)))

/* Begin the sums in tiles 0 to 3: at 0 if these are the first inputs, otherwise with the sums at the four addresses. */
#define BEGIN_SUMS(is_first, address0, address1, address2, address3) \
  if (is_first) {                                                    \
    ZERO_TILE(0);                                                    \
    ZERO_TILE(1);                                                    \
    ZERO_TILE(2);                                                    \
    ZERO_TILE(3);                                                    \
  } else {                                                           \
    LOAD_TILE(0, address0, STRIDE);                                  \
    LOAD_TILE(1, address1, STRIDE);                                  \
    LOAD_TILE(2, address2, STRIDE);                                  \
    LOAD_TILE(3, address3, STRIDE);                                  \
  }
#define STORE_SUMS(address0, address1, address2, address3) \
  STORE_TILE(0, address0);                                 \
  STORE_TILE(1, address1);                                 \
  STORE_TILE(2, address2);                                 \
  STORE_TILE(3, address3);

/* The shapes of the 8 tiles, as the CPU reads them. Tiles 0 to 3 are sums, 4 and 5 x, 6 and 7 the weight. */
typedef struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} TileShapes;

INLINE void load_shapes(const TileShapes *shapes) {
  __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" ::"a"(shapes), "m"(*shapes)); /* ldtilecfg */
}

/* Set the number of rows in tiles of x and of sums. */
INLINE void set_rows(TileShapes *shapes, long rows) {
  if (shapes->rows[0] == rows) return;
  *shapes = (TileShapes){.palette = 1};
  for (int t = 0; t < 8; t++) shapes->row_bytes[t] = 64, shapes->rows[t] = t < 6 ? rows : TILE_ROWS;
  load_shapes(shapes);
}

/* Set the shapes of tiles for `rows` rows of x and of sums, and return the shapes that were set before. */
INLINE TileShapes begin_tiles(TileShapes *shapes, long rows) {
  TileShapes before;
  __asm__ volatile(".byte 0xc4, 0xe2, 0x79, 0x49, 0x00" : "=m"(before) : "a"(&before)); /* sttilecfg */
  *shapes = (TileShapes){0};
  set_rows(shapes, rows);
  return before;
}

/* Set the shapes that were set before: oneDNN's kernels expect that no other code changes them. */
INLINE void end_tiles(TileShapes before) { load_shapes(&before); }

/* Multiply a tile of rows of x by a matrix w of pairs (inputs / 2, 64), and add to the sums y (16, 64), or begin them if these
 * are the first inputs. x_stride, w_stride: bytes from a row to the next. next_tile: bytes from a tile of x to the one with the
 * next TILE_INPUTS inputs. The matrix is prefetched, since a weight may come from memory. */
INLINE void multiply_tile(const char *x, long x_stride, long next_tile, const char *w, long w_stride, long inputs, int is_first,
                          char *y) {
  BEGIN_SUMS(is_first, y, y + 64, y + 128, y + 192)
  for (long k = 0; k < inputs; k += TILE_INPUTS, x += next_tile, w += TILE_ROWS * w_stride) {
    UNROLL(i, TILE_ROWS) prefetch_ahead(w + i * w_stride);
    LOAD_TILE(4, x, x_stride);
    LOAD_TILE(6, w, w_stride);
    ADD_PRODUCT(0, 4, 6);
    LOAD_TILE(7, w + 64, w_stride);
    ADD_PRODUCT(1, 4, 7);
    LOAD_TILE(6, w + 128, w_stride);
    ADD_PRODUCT(2, 4, 6);
    LOAD_TILE(7, w + 192, w_stride);
    ADD_PRODUCT(3, 4, 7);
  }
  STORE_SUMS(y, y + 64, y + 128, y + 192)
}
