"""Build each checkpoint in float32 on any number of ranks; write the logits and greedy answers of rank 0 to a file.

greedy_worker.py OUT.pt TOKENIZER CKPT[::ADAPTER] [CKPT[::ADAPTER] ...]
"""

import sys

import torch

from llama import Llama

PROMPTS = [[1, *range(5, 35)], [1, *range(60, 120, 2)]]  # of equal length
NEW_TOKENS = 100

if __name__ == "__main__":
    out, tokenizer, *folders = sys.argv[1:]
    results = {}
    for folder in folders:
        ckpt_dir, _, adapter = folder.partition("::")
        llama = Llama.build(ckpt_dir, tokenizer, 160, 2, device="cpu", dtype="float32", adapter=adapter or None)
        logits = llama.model.forward(torch.tensor(PROMPTS), 0)
        results[folder] = logits, llama.generate(PROMPTS, NEW_TOKENS, temperature=0, ignore_eos=True)[0]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(results, out)
