"""This library, by its public calls."""

import time

import torch

from llama import Llama
from peers import MOST_ROWS, WINDOW, Answer, Job


class Ours:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        options = {"compile": True} if job.variant == "compile" else {"quantize": job.variant or None}
        self.llama = Llama.build(job.ckpt, job.tokenizer, 512, 1, device=job.device, dtype=job.dtype, **options)
        self.llama.tokenizer.eos_id = -2  # nothing ends a row

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        self._make_room(len(prompts), max(len(p) for p in prompts) + new)
        begun = time.perf_counter()
        stream = self.llama.tokens(prompts, new, temperature=0)
        tokens = [next(stream) for _ in prompts]
        first = time.perf_counter()
        tokens += stream  # each id is read by the host as it is made: nothing is left to wait for
        ended = time.perf_counter()
        ids: list[list[int]] = [[] for _ in prompts]
        for token in tokens:
            ids[token.row].append(token.id)
        return Answer(first - begun, ended - first, ids)

    def _make_room(self, rows: int, length: int) -> None:
        """A cache of the workload's own size, unless it fits into the one there is.

        One for all workloads, 8 rows of 4096, would take more than 7B's weights. A GPU gets it all the same, once:
        captured steps point into it.
        """
        model, args = self.llama.model, self.llama.model.params
        if rows > args.max_batch_size or length > args.max_seq_len:
            on_gpu = model.device.type == "cuda"
            args.max_batch_size, args.max_seq_len = (MOST_ROWS, WINDOW) if on_gpu else (rows, length)
            model.rope = None  # as long as the window; made anew by the next forward
            model.allocate()
            self.llama = Llama(model, self.llama.tokenizer)  # which takes the window as it is now
