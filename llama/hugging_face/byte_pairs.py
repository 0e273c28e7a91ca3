"""Read tokenizer.json with `tokenizers`: Llama's byte-pair encoding, which falls back to bytes, or a byte-level one."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.hugging_face_settings import TokenizerSettings, add_token
from ..errors import CheckpointError, describe, explain_system_error, identify_format, read_file, short_repr

MAX_FILE_BYTES = 1 << 26  # limit of tokenizer.json; that of a vocabulary of 128,000 tokens has 9 MB
NEEDS_TOKENIZERS = (
    "tokenizer.json is read with tokenizers, not installed here: pip install tokenizers, or in a clone pip install -e '.[hf]'"
)
SPACE = "\u2581"  # stands for a space in Llama's vocabulary
OTHER_TOKENIZER = "run such a model with transformers, or give a tokenizer.model of SentencePiece as tokenizer_path"


class Spaces(NamedTuple):
    """What Llama's vocabulary does with spaces. A byte-level one does nothing.

    replaced: "\u2581" stands for a space. at_start: a space is put before a text; before_each_part: also before each part of a
    text between added tokens.
    """

    replaced: bool = False
    at_start: bool = False
    before_each_part: bool = False


class BytePairEncoder:
    """Encode texts with a `tokenizers.Tokenizer` that has no added tokens."""

    def __init__(self, tokenizer: Any, spaces: Spaces) -> None:
        self.tokenizer, self.spaces = tokenizer, spaces

    def encode(self, text: str, at_start: bool) -> list[int]:
        if self.spaces.replaced:  # as SentencePiece does, also before a text that begins with a space
            text = SPACE * (at_start and self.spaces.at_start) + text.replace(" ", SPACE)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


class BytePairs(NamedTuple):
    """A vocabulary of tokenizer.json, without its added tokens."""

    encoder: BytePairEncoder
    spaces: Spaces
    token_bytes: dict[int, bytes]
    single_bytes: frozenset[int]
    is_byte_level: bool
    begins_with_bos: bool
    unknown: str | None


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Return the contents of a tokenizer.json. Raise CheckpointError for a file that is none."""
    data = read_file(path, MAX_FILE_BYTES + 1)
    try:
        values = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
    except MemoryError as e:
        raise CheckpointError(f"{path}: {explain_system_error(e)}") from e
    except (ValueError, RecursionError) as e:
        reason = str(e) if data[:1] == b"{" else identify_format(data[:64])
        raise CheckpointError(f"{path}: not JSON ({reason}); fetch it again") from e
    if not isinstance(values, dict) or not isinstance(model := values.get("model"), dict):
        reason = f"it has more than {MAX_FILE_BYTES:,} bytes" if values is None else f"it contains {describe(values)}"
        raise CheckpointError(f"{path}: no tokenizer.json of `tokenizers`: {reason}; fetch it again")
    vocab = model.get("vocab")
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict):
        raise CheckpointError(
            f"{path}: its model is {short_repr(model.get('type'))}; supported is 'BPE', byte-pair encoding: {OTHER_TOKENIZER}"
        )
    if not vocab or not all(type(id_) is int and 0 <= id_ < 2**24 for id_ in vocab.values()):
        raise CheckpointError(f"{path}: damaged: a token's id is not an integer from 0 to 16,777,215; fetch it again")
    return values


def read_added_tokens(values: dict[str, Any], path: Path, settings: TokenizerSettings) -> None:
    """Add the added tokens of a tokenizer.json to the settings, unless these have a token with this id already."""
    added = values.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens is {describe(added)}; it must be a list")
    for each in added:
        id_ = each.get("id") if isinstance(each, dict) else None
        if id_ not in settings.added:
            add_token(settings, path, id_, each)


def n_tokens(values: dict[str, Any]) -> int:
    """Return the number of tokens of a tokenizer.json, without added tokens."""
    return max(values["model"]["vocab"].values()) + 1


def make_byte_pairs(values: dict[str, Any], path: Path) -> BytePairs:
    """Return the vocabulary of a tokenizer.json. Raise CheckpointError if it is damaged, or of a kind that is not supported."""
    begins_with_bos = _begins_with_bos(values.get("post_processor"))
    # Keep the byte pairs, and what divides a text into words. All else is done without `tokenizers`.
    model = dict(values["model"], dropout=None)
    values = copy.deepcopy({key: value for key, value in values.items() if key != "model"}) | {"model": model}
    values |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    steps = [("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")]
    is_byte_level = any(part.get("type") == "ByteLevel" for key, parts in steps for part in _parts(values.get(key), parts))
    spaces = Spaces() if is_byte_level else _take_spaces(values, path)
    encoder = BytePairEncoder(_make_tokenizer(values, path), spaces)
    vocab: dict[str, int] = model["vocab"]
    single = {f"<0x{value:02X}>": bytes([value]) for value in range(256 if model.get("byte_fallback") else 0)}
    to_bytes = _byte_level_bytes if is_byte_level else _llama_bytes
    token_bytes = {id_: single[text] if text in single else to_bytes(text) for text, id_ in vocab.items()}
    single_bytes = frozenset(vocab[text] for text in single if text in vocab)
    return BytePairs(encoder, spaces, token_bytes, single_bytes, is_byte_level, begins_with_bos, model.get("unk_token"))


def _take_spaces(values: dict[str, Any], path: Path) -> Spaces:
    """Remove from a tokenizer.json of Llama's kind what it does with spaces, and return that."""
    spaces, kept = Spaces(), []
    for part in _parts(values.get("normalizer"), "normalizers"):
        if part.get("type") == "Prepend" and part.get("prepend") == SPACE:
            spaces = spaces._replace(at_start=True, before_each_part=True)
        elif part.get("type") == "Replace" and part.get("content") == SPACE:
            spaces = spaces._replace(replaced=True)
        else:
            kept.append(part)
    words = _parts(values.get("pre_tokenizer"), "pretokenizers")
    if len(words) > 1 or any(part.get("type") != "Metaspace" for part in words):
        kinds = ", ".join(str(part.get("type")) for part in words)
        raise CheckpointError(
            f"{path}: its pre_tokenizer is {kinds:.60}; supported are Llama's Metaspace, and ByteLevel: {OTHER_TOKENIZER}"
        )
    for part in words:
        scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
        spaces = Spaces(replaced=True, at_start=scheme != "never", before_each_part=scheme == "always")
        part |= {"prepend_scheme": "never", "add_prefix_space": False}
    values["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    values["pre_tokenizer"] = None if not words or words[0].get("split") is False else words[0]
    return spaces


def _make_tokenizer(values: dict[str, Any], path: Path) -> Any:
    """Return a `tokenizers.Tokenizer`. Raise CheckpointError if `tokenizers` is missing, or refuses the file."""
    try:
        import tokenizers
    except ImportError as e:
        raise CheckpointError(f"{path}: {NEEDS_TOKENIZERS}") from e
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
        tokenizer.encode("a b", add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of Rust is no Exception
        raise CheckpointError(f"{path}: tokenizers {tokenizers.__version__} cannot read it: {e!s:.200}; fetch it again") from e
    return tokenizer


def _parts(values: Any, key: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer, pre-tokenizer or decoder, which may be a sequence of sequences."""
    if not isinstance(values, dict):
        return []
    return [part for each in values[key] for part in _parts(each, key)] if isinstance(values.get(key), list) else [values]


def _begins_with_bos(processor: Any) -> bool:
    """Return True if a post-processor puts a special token before a text."""
    for part in _parts(processor, "processors"):
        single = part.get("single")
        if isinstance(single, list) and single and isinstance(single[0], dict) and "SpecialToken" in single[0]:
            return True
    return False


def _byte_values() -> dict[str, int]:
    """Return the character that stands for each byte in a byte-level vocabulary: itself if it can be seen, or one above 255."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + i): value for i, value in enumerate(hidden)}


_BYTE_VALUES = _byte_values()


def _llama_bytes(text: str) -> bytes:
    return text.replace(SPACE, " ").encode(errors="replace")


def _byte_level_bytes(text: str) -> bytes:
    try:
        return bytes(_BYTE_VALUES[character] for character in text)
    except KeyError:  # the text of an added token, which the vocabulary has, too
        return text.encode(errors="replace")
