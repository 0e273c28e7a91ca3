"""Build a model from each checkpoint, generate, and write the answers of rank 0 to a file. test_ranks.py runs this script.

rank_worker.py OUT.pt TOKENIZER CKPT [CKPT ...]
"""

import os
import sys

import torch

from llama import Llama
from llama.backends.torch_compile import TorchCompileBackend

PROMPTS = [[1, 5, 9, 44], [1, 300], [1, *range(20, 40)]]


def check_agreement(llama: Llama) -> list:
    """Return results on which the ranks must agree: samples, stop strings, a stream, scores, compiled steps."""
    seeded, _ = llama.generate(PROMPTS * 2, 6, temperature=1.0, seed=7)
    stops = ["e", llama.tokenizer.decode(seeded[0])[2:4]]
    stopped = llama.text_completion(["The"] * 6, max_gen_len=6, seed=range(6), stop=stops, details=True)
    stream = "".join(llama.chat_completion_stream([{"role": "user", "content": "a"}], max_gen_len=4, seed=1))
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The"}]
    continued = llama.chat_completion([begun], 0, max_gen_len=6, continue_answer=True)
    kept = llama.text_completion(PROMPTS, 0, max_gen_len=6, stop="e", details=True, keep_space=True)
    scores = [round(score.total, 2) for score in llama.score(["The fox", "sea"], [" jumps", " shells"])]
    llama.engine.backend = TorchCompileBackend(backend="eager")
    compiled, _ = llama.generate(PROMPTS, 6, temperature=0)
    if (
        not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    ):  # the new weight makes only rank 0 compile its decode step again
        weight = llama.model.layers[0].feed_forward.w2.weight
        weight.data = weight.data.clone()
    assert llama.generate(PROMPTS, 6, temperature=0)[0] == compiled
    return [seeded, stopped, stream, continued, kept, scores, compiled]


if __name__ == "__main__":
    out, tokenizer_path, *folders = sys.argv[1:]
    answers: dict = {}
    for folder in folders:
        llama = Llama.build(folder, tokenizer_path, max_seq_len=48, max_batch_size=4, device="cpu")
        tokens, logprobs = llama.generate(PROMPTS, 10, temperature=0, logprobs=True, echo=True)
        torch.manual_seed(3 + int(os.environ.get("RANK", 0)))  # ranks have different seeds, but must sample rank 0's tokens
        sampled, _ = llama.generate(PROMPTS, 10, temperature=1.0)
        grid = torch.arange(3, 63).view(3, 20)
        states = torch.cat(llama.hidden_states(PROMPTS, layers=[0, 1, 2]), dim=1)
        answers[folder] = dict(tokens=tokens, logprobs=logprobs, sampled=sampled, logits=llama.model(grid, 0), states=states)
    answers["agreement"] = check_agreement(llama)
    print("only rank 0 is heard")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(answers, out)
