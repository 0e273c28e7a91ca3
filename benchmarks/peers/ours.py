"""This library, by its public calls."""

import time

import torch

from llama import Llama
from llama.model import precompute_freqs_cis
from peers import Answer, Job


class Ours:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.device = job.device
        options = {"compile": job.variant.endswith("compile"), "quantize": job.quantize}
        # On a GPU captured steps point into the cache: it gets the one for all workloads at once.
        sizes = (job.window, job.rows) if job.device == "cuda" else (512, 1)
        self.llama = Llama.build(job.ckpt, job.tokenizer, *sizes, device=job.device, dtype=job.dtype, **options)
        self.llama.tokenizer.eos_id = -2  # nothing ends a row

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        if self.device == "cpu":
            self._make_room(len(prompts), max(len(p) for p in prompts) + new)
        begun = time.perf_counter()
        stream = self.llama.generate_stream(prompts, new, temperature=0)
        tokens = [next(stream) for _ in prompts]
        first = time.perf_counter()
        tokens += stream  # each id is read by the host as it is made: nothing is left to wait for
        ended = time.perf_counter()
        ids: list[list[int]] = [[] for _ in prompts]
        for token in tokens:
            ids[token.prompt_index].append(token.token)
        return Answer(first - begun, ended - first, ids)

    def _make_room(self, rows: int, length: int) -> None:
        """A cache of the workload's own size, unless it fits into the one there is: one for all workloads would take more
        memory than 7B's weights."""
        model, args = self.llama.model, self.llama.model.params
        if rows > args.max_batch_size or length > args.max_seq_len:
            args.max_batch_size, args.max_seq_len = rows, length
            model.freqs_cis = precompute_freqs_cis(args.head_dim, 2 * length, args.rope_theta)
            for layer in model.layers:  # the next call makes the engine's cache of these sizes
                attention = layer.attention
                shape = rows, length, attention.n_local_kv_heads, attention.head_dim
                attention.cache_k, attention.cache_v = (torch.empty(shape, device="meta") for _ in range(2))
