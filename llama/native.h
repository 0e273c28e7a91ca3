/* What the files of C share. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16_t;
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, of PyTorch's own threads */

/* Have memory bring what comes 16 kB later: by itself the CPU looks less far. A line of 64 bytes brings its neighbours along. */
INLINE void ahead(const void *weight) { _mm_prefetch((const char *)weight + 16384, _MM_HINT_T1); }

/* Of the blocks that are left a thread takes a share, one after the other: so memory is read best, and nobody waits long. */
INLINE long take(long *next, long threads, long blocks, long *end) {
  for (long first = __atomic_load_n(next, __ATOMIC_RELAXED);;) {
    const long share = 7 * (blocks - first) / (8 * threads);
    *end = first + (share > 1 ? share : 1);
    if (first >= blocks) return first;
    if (__atomic_compare_exchange_n(next, &first, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return first;
  }
}
