"""transformers: from_pretrained, then its model stepped greedily with its own cache.

A plain loop around the model, not `generate`, which does the same and is slower by what it does between the steps.
"""

import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from peers import Answer, Job


class Transformers:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        dtype, self.device = getattr(torch, job.dtype), job.device
        model = AutoModelForCausalLM.from_pretrained(job.hf, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(job.device).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        longest = max(len(p) for p in prompts)
        ragged = any(len(p) < longest for p in prompts)
        begun = time.perf_counter()
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        cache, made, first = DynamicCache(config=self.model.config), [], 0.0
        for step in range(new):
            # Without padding it needs neither mask nor positions, and is faster.
            padded = {"attention_mask": real, "position_ids": positions} if ragged else {}
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **padded).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
            if step == 0:
                ids.tolist()  # waits for the device
                first = time.perf_counter()
            real, positions = torch.cat([real, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1
        result = torch.cat(made, dim=1).tolist()
        return Answer(first - begun, time.perf_counter() - first, result)
