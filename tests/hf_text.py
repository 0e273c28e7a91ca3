"""Write the small files of a folder in Hugging Face's layout: tokenizers, added tokens, settings."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from .conftest import VOCAB
from .support import TEXT

SPACE = "\u2581"
# Texts that divide tokenizers: spaces, control pieces, line ends, several characters seen as one, characters of several bytes.
ATOMS = (
    "<s>", "</s>", "<unk>", "<0x0A>", SPACE, " ", "  ", "\n", "\r\n", "\t", "\x00", "\u00e9", "e\u0301", "\u200d", "\U0001f600",
    "\U0001f469\u200d\U0001f467", "\u65e5\u672c", "\u05e2\u05d1", "\u00a0", "\u3000", "[INST]", "The", " quick", "fox's", "123",
    "a" * 20, "<|im_end|>", "s>", "\ufffd", "\U0010ffff",
)  # fmt: skip

# A template that makes the texts of Llama 2's format.
LLAMA_2_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] if loop.first and system else m['content'] %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""


def odd_strings(n: int) -> list[str]:
    """Return an empty text, two that begin with a blank, and n texts of one to nine ATOMS."""
    rng = random.Random(5)
    return ["", " ", "  a", *("".join(rng.choices(ATOMS, k=rng.randint(1, 9))) for _ in range(n))]


def write(folder: Path, **files: Any) -> Path:
    """Write values as JSON files. Their names are the keywords."""
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def added(id_: int, content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    """Return an added token as tokenizer.json describes it."""
    defaults = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": id_, "content": content, "special": special} | defaults | flags


def llama_json(model_path: Path, legacy: bool = True, more: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model, as transformers converts it. legacy: the older of its two forms.

    more: added tokens besides the control tokens.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    vocab = {pieces.id_to_piece(id_): id_ for id_ in range(pieces.vocab_size())}
    merges = []
    for piece, id_ in sorted(vocab.items(), key=lambda item: -pieces.get_score(item[1])):
        if not (pieces.is_control(id_) or pieces.is_unknown(id_) or pieces.is_byte(id_)):
            halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            merges += [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replaces]}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    begins = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "normalizer": prepends if legacy else None, "pre_tokenizer": None if legacy else metaspace,
        "added_tokens": [*(added(id_, pieces.id_to_piece(id_), special=True) for id_ in range(3)), *more],
        "post_processor": {
            "type": "TemplateProcessing", "single": [begins, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def byte_level_json() -> dict[str, Any]:
    """Return a byte-level tokenizer.json like SmolLM2's: control tokens 0 to 2, digits one by one."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(True), level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT.splitlines() * 4, trainer)
    return json.loads(tokenizer.to_str())
