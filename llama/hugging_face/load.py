"""Load the tokenizer and the chat format of a model: Llama 2's own, or those of a folder in Hugging Face's layout."""

import contextlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

from ..chat import LLAMA_2, ChatFormat
from ..checkpoint.hugging_face_settings import FILES, AddedToken, TokenizerSettings, read_tokenizer_settings
from ..checkpoint.layouts import uses_hugging_face
from ..checkpoint.paths import find_tokenizer
from ..errors import CheckpointError, check_path, short_repr
from ..tokenizer import Tokenizer
from .byte_pairs import make_byte_pairs, n_tokens, read_added_tokens, read_tokenizer_json
from .chat_template import TemplateFormat
from .template_process import why_no_jinja
from .tokenizer import HuggingFaceTokenizer, Vocabulary

_TAG = re.compile(r"<\|[^<>|\s]+\|>")
MAX_FREE_IDS = 100_000  # ids that may be free between the tokens of a vocabulary

# Words for well-known chat templates, by a text that each contains.
_TEMPLATES = {"<|im_start|>": "ChatML", "<|user|>": "Zephyr's", "USER:": "Vicuna's"}


class TokenizerAndChatFormat(NamedTuple):
    """What turns texts and dialogs into tokens. notes: lines for stderr."""

    tokenizer: Tokenizer
    chat_format: ChatFormat
    notes: list[str]


def load_tokenizer_and_chat_format(
    ckpt_dir: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str] | None, vocab_size: int
) -> TokenizerAndChatFormat:
    """Return the tokenizer of a model, its chat format, and a line about each setting of its folder that is not followed.

    vocab_size: of the model; -1 in params.json. tokenizer_path: a tokenizer.model or tokenizer.json; by default the one of
    the folder. Raises CheckpointError for a missing, damaged or unsupported file.
    """
    path = Path(find_tokenizer(ckpt_dir)) if tokenizer_path is None else tokenizer_path
    folder = _settings_folder(ckpt_dir, path)
    if folder is None:
        return TokenizerAndChatFormat(Tokenizer(path), LLAMA_2, [])
    settings = read_tokenizer_settings(folder)
    chat_format, notes = _chat_format(settings)
    path = check_path(path, "tokenizer_path", "tokenizer.model or tokenizer.json, which is in the model's folder")
    tokenizer: Tokenizer = (
        _from_json(path, settings, vocab_size)
        if path.suffix == ".json"
        else _from_model(path, folder, settings, vocab_size, chat_format is LLAMA_2)
    )
    notes += [*_set_ends(tokenizer, settings), *_notes(settings, tokenizer.n_words)]
    return TokenizerAndChatFormat(tokenizer, chat_format, [f"llama: {line}" for line in notes])


def find_chat_format(
    ckpt_dir: str | os.PathLike[str] | None, tokenizer_path: str | os.PathLike[str] | None = None
) -> ChatFormat:
    """Return the chat format of a folder, as `load_tokenizer_and_chat_format` does; Llama 2's if there is no such folder."""
    folder = _settings_folder(ckpt_dir, tokenizer_path) if ckpt_dir else None
    return LLAMA_2 if folder is None else _chat_format(read_tokenizer_settings(folder))[0]


def describe_template(ckpt_dir: Path) -> str:
    """Return a few words about the chat template of a folder."""
    folder = _settings_folder(ckpt_dir)
    template = read_tokenizer_settings(folder).template if folder else None
    if not template:
        return "none stored"
    if find_chat_format(ckpt_dir) is LLAMA_2:
        return "Llama 2's"
    return next((name for text, name in _TEMPLATES.items() if text in template), "another one")


def _settings_folder(ckpt_dir: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder whose small files describe texts; None for a model that has no such files."""
    folder = Path(ckpt_dir).expanduser()
    if folder.is_dir() and (uses_hugging_face(folder) or any((folder / name).is_file() for name in FILES)):
        return folder
    if tokenizer_path is None:
        with contextlib.suppress(CheckpointError):
            tokenizer_path = find_tokenizer(ckpt_dir)
    return Path(tokenizer_path).expanduser().parent if str(tokenizer_path).endswith(".json") else None  # type: ignore[arg-type]


def _chat_format(settings: TokenizerSettings) -> tuple[ChatFormat, list[str]]:
    """Return the chat format, and notes. A template that makes Llama 2's texts of dialogs is Llama 2's format."""
    template = settings.template
    if template is None or settings.template_path is None:
        return LLAMA_2, []
    chat_format = TemplateFormat(template, settings.template_path, settings.roles)
    if "[INST]" not in template or "<<SYS>>" not in template:
        return chat_format, []
    if why_no_jinja():
        return LLAMA_2, [
            f"the chat template of {settings.template_path} resembles Llama 2's, so dialogs have Llama 2's format; to compare "
            "the two, and follow the template if they differ, pip install 'llama[hf]' (in a clone: pip install -e '.[hf]')"
        ]
    return (LLAMA_2 if chat_format.makes_texts_of_llama_2() else chat_format), []


def _from_json(path: Path, settings: TokenizerSettings, vocab_size: int) -> HuggingFaceTokenizer:
    values = read_tokenizer_json(path)
    read_added_tokens(values, path, settings)
    pairs = make_byte_pairs(values, path)
    added = _added_tokens(path, settings, values["model"]["vocab"], pairs.token_bytes, vocab_size)
    token_bytes = _with_added(path, pairs.token_bytes, added)
    control = frozenset(token.id for token in added if token.special)
    unknown = values["model"]["vocab"].get(pairs.unknown or settings.roles.get("unk_token"))
    roles = {role: next((t.id for t in added if t.text == text), None) for role, text in settings.roles.items()}
    if unknown is not None and not pairs.is_byte_level and unknown not in (roles.get("bos_token"), roles.get("eos_token")):
        token_bytes[unknown], control = " \u2047 ".encode(), control - {unknown}  # as SentencePiece has it
    settings.begins_with_bos = pairs.begins_with_bos if settings.begins_with_bos is None else settings.begins_with_bos
    vocabulary = Vocabulary(
        token_bytes, control, pairs.spaces.at_start, pairs.single_bytes | {unknown}, pairs.spaces.before_each_part,
        pairs.is_byte_level,
    )  # fmt: skip
    bos, eos = _bos_and_eos(path, roles, settings, len(token_bytes))
    pad = roles.get("pad_token")
    return HuggingFaceTokenizer(pairs.encoder, vocabulary, added, bos, eos, -1 if pad is None else pad)


class SentencePieceEncoder:
    """Encode texts with a SentencePiece model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str, at_start: bool) -> list[int]:
        return self.tokenizer.sp_model.encode(text) if at_start else self.tokenizer.encode_infilling(text)


def _from_model(path: Path, folder: Path, settings: TokenizerSettings, vocab_size: int, is_llama_2: bool) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model, with the added tokens of the folder's other files."""
    pieces = Tokenizer(path)
    model: SentencePieceProcessor = pieces.sp_model
    if vocab_size < 0:  # as in Meta's params.json: the tokens of tokenizer.model are the vocabulary
        vocab_size = pieces.n_words
    json_path = folder / "tokenizer.json"
    if vocab_size > max([pieces.n_words, *(id_ + 1 for id_ in settings.added)]) and json_path.is_file():
        values = read_tokenizer_json(json_path)
        if n_tokens(values) > pieces.n_words:
            return _from_json(json_path, settings, vocab_size)
        read_added_tokens(values, json_path, settings)
    ids = {model.id_to_piece(id_): id_ for id_ in range(pieces.n_words)}
    for id_ in range(pieces.n_words):
        if model.is_control(id_) or model.is_unknown(id_):
            settings.added[id_] = AddedToken(id_, model.id_to_piece(id_), special=True)
    token_bytes = {id_: pieces.token_bytes(id_) for id_ in range(pieces.n_words)}
    added = _added_tokens(path, settings, ids, token_bytes, vocab_size)
    ends_are_control = all(model.is_control(token.id) for token in added if token.id in {*settings.eos_ids} & {*token_bytes})
    if is_llama_2 and ends_are_control and all(token.special and token.id < pieces.n_words for token in added):
        return pieces
    unknown = model.unk_id()
    vocabulary = Vocabulary(
        _with_added(path, token_bytes, added, keep=unknown),
        frozenset(token.id for token in added if token.special and token.id != unknown),
        drops_space=pieces.sp_model.encode_as_pieces("a")[0].startswith("\u2581"),
        keep_space=frozenset(id_ for id_ in range(pieces.n_words) if model.is_byte(id_) or id_ == unknown),
        space_before_each_part=settings.legacy,
    )  # fmt: skip
    roles = {role: ids_of[text] for role, text in settings.roles.items() if text in (ids_of := {t.text: t.id for t in added})}
    bos, eos = roles.get("bos_token", pieces.bos_id), roles.get("eos_token", pieces.eos_id)
    tokenizer = HuggingFaceTokenizer(SentencePieceEncoder(pieces), vocabulary, added, bos, eos, pieces.pad_id)
    tokenizer.sp_model = model
    return tokenizer


def _added_tokens(
    path: Path, settings: TokenizerSettings, ids: dict[str, int], token_bytes: dict[int, bytes], vocab_size: int
) -> list[AddedToken]:
    """Return the added tokens: those of the files, and the special tokens that are in the vocabulary, sorted by id.

    ids: the id of each token of the vocabulary. token_bytes: their texts. Special are also tokens that end answers, unless they
    are one character, and those with a text like "<|im_start|>" that the template contains. Tokens beyond the model's
    vocabulary are left out.
    """
    added = dict(settings.added)
    known = {token.text for token in added.values()}
    for id_ in {*settings.eos_ids} - {*added} & {*token_bytes}:
        text = token_bytes[id_].decode(errors="replace")
        if len(text) > 1 and text not in known:  # a single character must stay text, or no text could contain it
            added[id_] = AddedToken(id_, text)
            known.add(text)
    written = {text for text in _TAG.findall(settings.template or "") if text in ids or text in known}
    added |= {ids[text]: AddedToken(ids[text], text) for text in written - known}
    known |= written
    added |= {ids[text]: AddedToken(ids[text], text) for text in settings.special - known if text in ids}
    for id_, token in added.items():
        if token.text in settings.special | written or id_ in settings.eos_ids:
            added[id_] = replace(token, special=True)
    ids_of: dict[str, int] = {}
    for token in added.values():
        if ids_of.setdefault(token.text, token.id) != token.id:
            raise CheckpointError(
                f"{path}: the added token {short_repr(token.text)} has the ids {ids_of[token.text]} and {token.id} in the "
                "files of this folder; fetch them again"
            )
    return sorted((t for t in added.values() if vocab_size < 0 or t.id < vocab_size), key=lambda token: token.id)


def _with_added(path: Path, token_bytes: dict[int, bytes], added: list[AddedToken], keep: int = -1) -> list[bytes]:
    """Return the text of each token in UTF-8, with the added tokens, but for the token `keep`; free ids have no text."""
    n_words = max([*token_bytes, *(token.id for token in added)]) + 1
    if n_words > len(token_bytes) + len(added) + MAX_FREE_IDS:
        raise CheckpointError(f"{path}: the tokens have ids up to {n_words - 1:,}, and most are missing; fetch it again")
    texts = [token_bytes.get(id_, b"") for id_ in range(n_words)]
    for token in added:
        if token.id != keep:
            texts[token.id] = token.text.encode()
    return texts


def _bos_and_eos(path: Path, roles: dict[str, int | None], settings: TokenizerSettings, n_words: int) -> tuple[int, int]:
    """Return BOS and EOS of a tokenizer.json: by the names of its tokens, or by the ids in the model's settings."""
    eos, bos = roles.get("eos_token"), roles.get("bos_token")
    eos = next((id_ for id_ in settings.eos_ids if 0 <= id_ < n_words), None) if eos is None else eos
    bos = settings.bos_id if bos is None and settings.bos_id in range(n_words) else bos
    if eos is None:
        raise CheckpointError(
            f"{path}: no EOS: neither eos_token in tokenizer_config.json nor eos_token_id in config.json names a token that "
            "ends answers; add one of them"
        )
    return (eos if bos is None else bos), eos  # transformers begins an empty text with EOS if a model has no BOS


def _set_ends(tokenizer: Tokenizer, settings: TokenizerSettings) -> list[str]:
    """Set the tokens that end answers besides EOS, and whether texts begin with BOS. Return a note for each id that is none."""
    given = [("bos_token_id", settings.bos_id), *(("eos_token_id", id_) for id_ in settings.eos_ids)]
    tokenizer.more_eos_ids = tuple(id_ for id_ in settings.eos_ids if 0 <= id_ < tokenizer.n_words and id_ != tokenizer.eos_id)
    tokenizer.begins_with_bos = settings.begins_with_bos is not False
    return [
        f"{key} {id_:,} of config.json or generation_config.json is ignored: the tokenizer has the tokens 0 to "
        f"{tokenizer.n_words - 1:,}"
        for key, id_ in given
        if id_ is not None and not 0 <= id_ < tokenizer.n_words
    ]


def _notes(settings: TokenizerSettings, n_words: int) -> list[str]:
    left_out = [token.text for token in settings.added.values() if token.id >= n_words]
    if not left_out:
        return []
    return [f"added tokens beyond the model's vocabulary of {n_words:,} are left out: {short_repr(left_out)}"]
