"""Run the same prompts with each checkpoint, on any number of ranks; write the answers of rank 0 to a file.

quantized_worker.py OUT.json TOKENIZER CKPT [CKPT ...]
"""

import json
import sys

import torch

from llama import Llama

QUESTIONS = [
    "What is the capital of France?", "What is 7 + 2?", "How many legs does a spider have?", "Tell me about the sea.",
    "Write a poem about rain.", "Why is the sky blue?", "What do I need to bake bread?", "Tell me a joke.",
]  # fmt: skip
BEGINNINGS = ["Once upon a time", "My dog", "In the morning", "The king said"]

if __name__ == "__main__":
    out, tokenizer_path, *folders = sys.argv[1:]
    answers = []
    for folder in folders:
        llama = Llama.build(folder, tokenizer_path, 128, 12, device="cpu", dtype="float32", quantize="int8")
        dialogs = [[{"role": "user", "content": question}] for question in QUESTIONS]
        chats = llama.chat_completion(dialogs, temperature=0, max_gen_len=60)
        texts = llama.text_completion(BEGINNINGS, temperature=0, max_gen_len=60)
        answers.append([result["generation"]["content"] for result in chats] + [result["generation"] for result in texts])
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with open(out, "w") as f:
            json.dump(answers, f)
