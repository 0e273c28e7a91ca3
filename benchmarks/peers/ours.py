"""The peer named `ours`: run models with this library, through its public functions."""

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
        # CUDA graphs contain the address of the KV cache. So a GPU keeps one cache, which is large enough for all workloads.
        sizes = (job.context, job.rows) if job.device == "cuda" else (512, 1)
        self.llama = Llama.build(job.ckpt, job.tokenizer, *sizes, device=job.device, dtype=job.dtype, **options)
        self.llama.tokenizer.eos_id = -2  # no token counts as EOS, so that no row ends early

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        if self.device == "cpu":
            self._resize_cache(len(prompts), max(len(p) for p in prompts) + new)
        self.llama.clear_prefix_cache()  # no prompt may profit from an earlier measurement
        start = time.perf_counter()
        stream = self.llama.generate_stream(prompts, new, temperature=0)
        generated = [next(stream) for _ in prompts]
        first = time.perf_counter()
        generated += stream  # the stream copies every token to the host, so that all GPU work is done when the clock stops
        end = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts]
        for token in generated:
            tokens[token.prompt_index].append(token.token)
        return Answer(first - start, end - first, tokens)

    def _resize_cache(self, rows: int, length: int) -> None:
        """Enlarge the KV cache, if it is too small for a workload. length: tokens of the longest row with its answer.

        A cache for the largest batch and the longest context of all workloads would need more memory than the weights of 7B.
        """
        model, args = self.llama.model, self.llama.model.params
        if rows > args.max_batch_size or length > args.max_seq_len:
            args.max_batch_size, args.max_seq_len = rows, length
            model.freqs_cis = precompute_freqs_cis(args.head_dim, 2 * length, args.rope_theta)
            for layer in model.layers:  # the next call allocates the engine's KV cache in the shapes of these tensors
                attention = layer.attention
                shape = rows, length, attention.n_local_kv_heads, attention.head_dim
                attention.cache_k, attention.cache_v = (torch.empty(shape, device="meta") for _ in range(2))
