/* Divide the blocks of a packed weight among threads. The including file defines TILE, TASK_ROWS, `compute_block` and
 * `prepare_rows_worker` first. */

/* Up to this number of int8 rows, one thread prepares all rows, because starting the other threads would take longer. */
enum { MAX_SERIAL_ROWS = 8 };

/* The function that each thread runs: multiply claimed blocks of the weight by TASK_ROWS rows, TILE rows at a time. */
static void blocks_worker(void *shared) {
  LinearArgs *p = shared;
  const long tile = TILE / p->int8_per_activation * p->int8_per_activation, chunks = (p->n + TASK_ROWS - 1) / TASK_ROWS,
             tasks = (p->out + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS * chunks;
  for (long t, end; (t = claim_tasks(&p->next, p->threads, tasks, &end)) < tasks;)
    for (; t < end; t++) {
      const long first_row = t % chunks * TASK_ROWS, end_row = first_row + TASK_ROWS < p->n ? first_row + TASK_ROWS : p->n;
      for (long row = first_row; row < end_row; row += tile)
        compute_block(p, t / chunks, row, end_row - row < tile ? end_row - row : tile);
    }
}

/* Normalize, quantize or convert all rows of x, on several threads if there are many rows. */
static void prepare_rows(Parallel parallel, unsigned threads, LinearArgs *p) {
  p->next = 0, p->threads = threads;
  if (p->n <= MAX_SERIAL_ROWS) prepare_rows_worker(p);
  else parallel(prepare_rows_worker, p, threads, 0);
  p->next = 0;
}
