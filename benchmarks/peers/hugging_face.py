"""The peer transformers: load a model with `from_pretrained`, and decode greedily with the KV cache of transformers.

A loop in this module replaces transformers' own `generate`, which computes the same tokens but does more work between steps.
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
        unequal = any(len(p) < longest for p in prompts)
        start = time.perf_counter()
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, generated, first = DynamicCache(config=self.model.config), [], 0.0
        for step in range(new):
            # Rows of equal length need neither mask nor positions, and the model is faster without them.
            padding = {"attention_mask": mask, "position_ids": positions} if unequal else {}
            logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **padding).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            generated.append(tokens)
            if step == 0:
                tokens.tolist()  # wait until the device has computed the tokens
                first = time.perf_counter()
            mask, positions = torch.cat([mask, torch.ones_like(tokens)], dim=1), positions[:, -1:] + 1
        result = torch.cat(generated, dim=1).tolist()
        return Answer(first - start, time.perf_counter() - first, result)
