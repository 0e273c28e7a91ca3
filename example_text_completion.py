"""Continue a few texts with a base (not chat) model.

python example_text_completion.py --ckpt_dir llama-2-7b --tokenizer_path tokenizer.model
torchrun --nproc_per_node 2 example_text_completion.py --ckpt_dir llama-2-13b --tokenizer_path tokenizer.model
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback, even while PyTorch is imported

from llama import Llama, resolve_model_paths, validate_options
from llama.cli.script import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    quantize: str | None = None,
) -> None:
    """Print the model's continuations of four prompts.

    ckpt_dir: folder with consolidated.NN.pth and params.json; default: the bundled demo model.
    tokenizer_path: Meta's tokenizer.model; default: the one in ckpt_dir or its parent folder.
    temperature: 0 always chooses the likeliest token.
    top_p: share of the probability that sampling keeps, from the likeliest token on.
    max_seq_len: context length: maximum number of tokens of a prompt with its continuation.
    max_gen_len: maximum number of new tokens.
    max_batch_size: maximum number of prompts in a batch.
    device: cpu, cuda or mps (untested); default: cuda if available, else cpu.
    dtype: bfloat16, float16 or float32; default: the dtype of the checkpoint.
    compile: use torch.compile (CUDA): faster decoding after a slower start.
    quantize: int8 or int4, to store the weight matrices in 8 or 4 bit; default: no quantization.
    """
    validate_options(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)  # before the model is loaded
    ckpt_dir, tokenizer_path = resolve_model_paths(ckpt_dir, tokenizer_path)
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        device=device,
        dtype=dtype,
        compile=compile,
        quantize=quantize,
    )
    prompts = [
        # The beginning of a story.
        "Once upon a time, there was a little bear who could not sleep.",
        # An unfinished sentence.
        "The reason why the sky is blue is that",
        # The beginning of a letter.
        "Dear neighbour,\n\nthank you for looking after our cat while we were away. She",
        # A few-shot prompt: the model continues a list of translations.
        "English to French:\n\nbread => pain\nmilk => lait\ngood morning => bonjour\nthe red house =>",
    ]
    results = generator.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    run_script(main)
