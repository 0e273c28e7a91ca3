/* Weights into the blocks that products.c and avx2.c read (native.h), quantized as quantize.py says, to the same values. native.py
 * fills the structure; no size and no address is checked here. */

#include "native.h"

enum { WIDEST = 128, RANGES = 6 }; /* inputs of a group; what fit4 tries */

typedef struct Packing {
  long kind, numbers;      /* of the blocks; of the rows */
  const void *const *rows; /* the addresses of the weight's rows, (out), each of `in` numbers */
  uint8_t *weight;         /* the blocks, of `width` inputs and of outputs up to a multiple of OUT; what is beyond the weight is 0 */
  bf16_t *scales;
  long group, in, width, out, next;
} Packing;

INLINE float widened(bf16_t x) { return as_float((uint32_t)x << 16); }
INLINE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* INT8: a group's largest value becomes 127, as its scale is rounded. */
static void fit8(const float *v, long group, uint8_t *bytes, bf16_t *scales) {
  float largest = 1e-30f * 127;
  for (long i = 0; i < group; i++) largest = fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
  *scales = to_bf16(largest / 127);
  const float scale = widened(*scales);
  for (long i = 0; i < group; i++) bytes[i] = (uint8_t)(128 + (int)clamped(rintf(v[i] / scale), -127, 127));
}

/* INT4: of some shares of a group's range the one with the least squared error. */
static void fit4(const float *v, long group, uint8_t *bytes, bf16_t *scales) {
  static const float ranges[RANGES] = {1.0f, 0.98f, 0.96f, 0.94f, 0.92f, 0.9f};
  float low = v[0], high = v[0], least = INFINITY;
  for (long i = 0; i < group; i++) low = v[i] < low ? v[i] : low, high = v[i] > high ? v[i] : high;
  for (int r = 0; r < RANGES; r++) {
    const float part = ranges[r] / 15, wanted = (high - low) * part;
    const bf16_t s = to_bf16(wanted < 1e-30f ? 1e-30f : wanted), z = to_bf16((high + low + widened(s)) / 2);
    const float scale = widened(s), zero = widened(z);
    float whole[WIDEST], errors[8] = {0}, error = 0;
    for (long i = 0; i < group; i++) whole[i] = clamped(rintf((v[i] - zero) / scale), -8, 7);
    for (long i = 0; i < group; i += 8)
      for (int j = 0; j < 8; j++) {
        const float d = whole[i + j] * scale + zero - v[i + j];
        errors[j] += d * d;
      }
    for (int j = 0; j < 8; j++) error += errors[j];
    if (error < least) {
      least = error, scales[0] = s, scales[1] = z;
      for (long i = 0; i < group; i++) bytes[i] = (uint8_t)(8 + (int)whole[i]);
    }
  }
}

/* Columns k to k + count of OUT rows, 4 bytes of each beside those of the next. */
static void block_columns(const Packing *p, long b, long k, long count) {
  uint8_t bytes[OUT][2 * WIDEST] __attribute__((aligned(64)));
  const long per = p->kind == BF16 ? 2 : p->kind == INT8 ? 4 : 8, size = p->numbers == FP32 ? 4 : 2;
  const long there = p->in - k < count ? p->in - k : count;
  bf16_t *scales = p->scales + (p->kind == INT4 ? 2 : 1) * (b * OUT * (p->width / p->group) + k / p->group * OUT);
  for (long o = 0; o < OUT; o++) {
    const char *row = b * OUT + o < p->out && there > 0 ? (const char *)p->rows[b * OUT + o] + k * size : 0;
    if (p->kind == BF16) {
      memset(bytes[o], 0, 2 * count);
      if (row) memcpy(bytes[o], row, 2 * there);
      continue;
    }
    float v[WIDEST] = {0};
    if (row && there == count) to_floats(row, p->numbers, count, v);
    else if (row) {
      char last[4 * WIDEST] = {0};
      memcpy(last, row, there * size);
      to_floats(last, p->numbers, count, v);
    }
    if (p->kind == INT8) {
      fit8(v, count, bytes[o], scales + o);
    } else {
      uint8_t whole[WIDEST];
      fit4(v, count, whole, scales + 2 * o);
      for (long i = 0; i < count; i += 8)
        for (int j = 0; j < 4; j++) bytes[o][i / 2 + j] = whole[i + j] | whole[i + 4 + j] << 4;
    }
  }
  uint8_t *to = p->weight + (b * p->width + k) / per * 4 * OUT;
  for (long i = 0; i < count / per; i++)
    for (long o = 0; o < OUT; o++) memcpy(to + (i * OUT + o) * 4, bytes[o] + 4 * i, 4);
}

static void pack_blocks(void *shared) { /* a thread: the next block */
  Packing *p = shared;
  for (long b; (b = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < (p->out + OUT - 1) / OUT;)
    for (long k = 0; k < p->width; k += p->group) block_columns(p, b, k, p->width - k < p->group ? p->width - k : p->group);
}

void pack(Parallel parallel, unsigned threads, const Packing *given) {
  Packing p = *given;
  p.next = 0;
  parallel(pack_blocks, &p, threads, 0);
}

/* What native.py is to find; and whether this CPU has it all. */
const long interface[] = {SOURCE, sizeof(Packing)};

int serves(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
