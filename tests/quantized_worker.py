"""Answer the same questions from each checkpoint given, on any number of ranks; rank 0's answers go into a file.

quantized_worker.py OUT.json KIND TOKENIZER CKPT [CKPT ...]
"""

import json
import sys

import torch

from llama import Llama

QUESTIONS = ["What is the capital of France?", "What is 7 + 2?", "How many legs does a spider have?", "Tell me about the sea."]

if __name__ == "__main__":
    out, kind, tokenizer_path, *folders = sys.argv[1:]
    answers = []
    for folder in folders:
        llama = Llama.build(folder, tokenizer_path, 128, 4, device="cpu", dtype="float32", quantize=kind or None)
        dialogs = [[{"role": "user", "content": question}] for question in QUESTIONS]
        answers.append([r["generation"]["content"] for r in llama.chat_completion(dialogs, temperature=0)])
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with open(out, "w") as f:
            json.dump(answers, f)
