/* How products of blocks are shared among threads; what includes this has TILE, CHUNK, `outputs` and `make_ready`. */

enum { FEW = 8 }; /* rows that one thread makes ready alone */

static void in_tiles(void *shared) { /* what a thread does: blocks, and of each the rows by chunks */
  Product *p = shared;
  const long tile = TILE / p->digits * p->digits, chunks = (p->n + CHUNK - 1) / CHUNK, tasks = (p->out + OUT - 1) / OUT * chunks;
  for (long t, end; (t = take(&p->next, p->threads, tasks, &end)) < tasks;)
    for (; t < end; t++) {
      const long begin = t % chunks * CHUNK, stop = begin + CHUNK < p->n ? begin + CHUNK : p->n;
      for (long r = begin; r < stop; r += tile) outputs(p, t / chunks, r, stop - r < tile ? stop - r : tile);
    }
}

static void prepare(Parallel parallel, unsigned threads, Product *p) {
  p->next = 0, p->threads = threads;
  if (p->n <= FEW) make_ready(p);
  else parallel(make_ready, p, threads, 0);
  p->next = 0;
}
