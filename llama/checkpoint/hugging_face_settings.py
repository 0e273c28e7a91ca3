"""Read the small files of a folder that describe a model's texts: added and special tokens, ends of answers, chat template."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, describe, is_integer, read_file, short_repr
from .params import MAX_PARAMS_BYTES, read_json

# The small files that describe texts; all are optional. config.json is another one, which Meta's layout has not.
FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
MAX_TOKENIZER_CONFIG_BYTES = 1 << 24  # limit of tokenizer_config.json, which describes added tokens one by one
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FLAGS = ("special", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A token with a text of its own, such as "<|im_end|>".

    special: a control token, which has no text in answers, and which a text never contains. lstrip, rstrip: the token takes the
    white space before or after it. single_word: it is found only where no letter, digit or underscore touches it.
    """

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass
class TokenizerSettings:
    """What the small files of a folder say about its tokens and its chat template.

    Tokens are given by their texts, except in `added`, `eos_ids` and `bos_id`.
    """

    added: dict[int, AddedToken] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)  # the tokens named bos_token, eos_token, unk_token, pad_token, ...
    special: set[str] = field(default_factory=set)  # all of these, and additional_special_tokens
    eos_ids: tuple[int, ...] = ()  # the tokens that end answers, by generation_config.json or config.json
    bos_id: int | None = None
    begins_with_bos: bool | None = None  # add_bos_token
    legacy: bool = True  # True if a space is put before each part of a text between added tokens
    template: str | None = None
    template_path: Path | None = None


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Return what the files of a folder say; files may be missing. Raise CheckpointError for a damaged file."""
    settings = TokenizerSettings()
    config = _read(folder / "tokenizer_config.json")
    _read_added_tokens(settings, folder, config)
    for path, values in (
        (folder / "special_tokens_map.json", _read(folder / "special_tokens_map.json")),
        (folder / "tokenizer_config.json", config),
    ):
        _read_special_tokens(settings, path, values)
    _read_ids(settings, folder)
    if isinstance(begins := config.get("add_bos_token"), bool):
        settings.begins_with_bos = begins
    settings.legacy = config.get("legacy") is not False
    _read_template(settings, folder, config)
    return settings


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_TOKENIZER_CONFIG_BYTES) if path.is_file() else {}


def _read_added_tokens(settings: TokenizerSettings, folder: Path, config: dict[str, Any]) -> None:
    path = folder / "added_tokens.json"
    for text, id_ in _read(path).items():
        if not is_integer(id_) or not text:
            raise CheckpointError(f"{path}: {short_repr(text)} is {describe(id_)}; it must be a token, a whole number")
        add_token(settings, path, id_, {"content": text})
    path, described = folder / "tokenizer_config.json", config.get("added_tokens_decoder") or {}
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is {describe(described)}; it must be an object")
    for number, values in described.items():
        add_token(settings, path, int(number) if number.isdecimal() and len(number) < 10 else number, values)


def add_token(settings: TokenizerSettings, path: Path, id_: Any, values: Any) -> None:
    """Add a token as a file describes it, in place of one with this number. Raise CheckpointError for a wrong description."""
    text = values.get("content") if isinstance(values, dict) else None
    if not is_integer(id_) or not 0 <= id_ < 2**31 or not isinstance(text, str) or not text:
        raise CheckpointError(
            f"{path}: the added token {short_repr(id_)} is {describe(values)}; it must have an id, an integer, and a text "
            "as its content"
        )
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{path}: the added token {id_} is {text!r:.60}, which UTF-8 cannot encode") from e
    settings.added[id_] = AddedToken(id_, text, *(values.get(flag) is True for flag in _FLAGS))


def _read_special_tokens(settings: TokenizerSettings, path: Path, values: dict[str, Any]) -> None:
    more = [values.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    if wrong := [each for each in more if not isinstance(each, (list, dict))]:
        raise CheckpointError(f"{path}: its additional special tokens are {describe(wrong[0])}; they must be a list of texts")
    listed = [each for given in more for each in (given.values() if isinstance(given, dict) else given)]
    for role, token in [*((role, values.get(role)) for role in _ROLES), *((None, token) for token in listed)]:
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            continue
        if not isinstance(text, str):
            raise CheckpointError(f"{path}: {role or 'a special token'} is {describe(token)}; it must be a text")
        settings.special.add(text)
        if role:
            settings.roles[role] = text


def _read_ids(settings: TokenizerSettings, folder: Path) -> None:
    """Read the tokens that begin texts and end answers. generation_config.json goes before config.json."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        values = read_json(path, MAX_PARAMS_BYTES) if path.is_file() else {}
        if (bos := values.get("bos_token_id")) is not None:
            (settings.bos_id,) = _ids(path, "bos_token_id", [bos])
        if (eos := values.get("eos_token_id")) is not None:
            settings.eos_ids = _ids(path, "eos_token_id", eos if isinstance(eos, list) else [eos])


def _ids(path: Path, key: str, ids: list[Any]) -> tuple[int, ...]:
    for id_ in ids:
        if not is_integer(id_) or not -1 <= id_ < 2**31:
            raise CheckpointError(f"{path}: {key} has {describe(id_)}; it must be a token, a whole number")
    return tuple(ids)


def _read_template(settings: TokenizerSettings, folder: Path, config: dict[str, Any]) -> None:
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        path = folder / "chat_template.jinja"
        data = read_file(path, MAX_TOKENIZER_CONFIG_BYTES)
        try:
            template = data.decode()
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{path}: not text in UTF-8 ({e}); fetch it again") from e
    if isinstance(template, list):
        template = _default_template(path, template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is {describe(template)}; it must be a text, or a list of named ones")
    if template:
        settings.template, settings.template_path = template, path


def _default_template(path: Path, templates: list[Any]) -> Any:
    """Return the template with the name "default" from a list of named ones, or the only one."""
    named = {t.get("name"): t.get("template") for t in templates if isinstance(t, dict) and isinstance(t.get("name"), str)}
    if "default" in named or len(named) == 1:
        return named["default"] if "default" in named else next(iter(named.values()))
    raise CheckpointError(
        f"{path}: chat_template has the names {short_repr([*named])}, and none is 'default': name the one to use 'default'"
    )
