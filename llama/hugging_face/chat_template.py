"""The chat format of a model with a chat template, which is rendered by Jinja's sandbox.

A rendered dialog is a text in which special tokens, such as "<|im_end|>", stand for control tokens. They count only where the
template wrote them. So they are replaced in the template's own texts by marks, single characters that are not in the dialog,
before it is rendered. What a message contains stays text.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..chat import Dialog, check_messages, continues_answer, encode_dialog
from ..checkpoint.hugging_face_settings import AddedToken
from ..errors import InputError, LlamaError
from ..tokenizer import Tokenizer
from .added_tokens import AddedTokenFinder
from .template_process import TemplateProcess
from .tokenizer import HuggingFaceTokenizer

FIRST_MARK, LAST_MARK = "\U00100000", "\U0010fffd"  # 65,534 characters of Unicode that are for private use
MAX_MESSAGES = 1024  # of a dialog; the time of some templates grows with the square of this number
ROLES = ("system", "user", "assistant", "tool")  # other names of roles are the caller's text, as contents are


class TemplateFormat:
    """A chat format that a template describes."""

    tags: Sequence[str] = ()  # no text is refused, since the special tokens of a text have no effect

    def __init__(self, template: str, path: Path, roles: dict[str, str]) -> None:
        """path: the file of the template. roles: the texts of the tokens that templates know as bos_token, eos_token, ..."""
        self.template, self.path, self.roles = template, path, roles
        self.name = f"the template of {path}"
        self.process = TemplateProcess()

    def check(self, dialog: Dialog, name: str, continue_answer: bool | None = False) -> None:
        """Raise InputError unless a dialog is a list of messages that is to be answered. The template checks the roles."""
        check_messages(dialog, name)
        if len(dialog) > MAX_MESSAGES:
            raise InputError(f"{name} has {len(dialog):,} messages, more than {MAX_MESSAGES:,}; shorten it")
        if not dialog:
            raise InputError(f"{name} is empty; it must end with a 'user' message")
        if dialog[-1]["role"] == "assistant" and not continue_answer:
            raise InputError(
                f"{name} ends with 'assistant'; the last message must be by 'user', to be answered, "
                "unless continue_answer=True has this message continued"
            )

    def encode(self, tokenizer: Tokenizer, dialog: Dialog, name: str = "the dialog") -> list[int]:
        """Return the tokens of a dialog that `check` has accepted. Raise InputError for one that the template refuses."""
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise InputError(
                f"the chat template of {self.path} needs the tokenizer of its folder, but `llama.tokenizer` has been replaced; "
                "set it back"
            )
        try:
            parts = self._render(tokenizer, [{"role": m["role"], "content": m["content"]} for m in dialog])
        except InputError as e:
            raise InputError(f"{name}: {e}") from None
        return tokenizer.encode_parts(parts)

    def makes_texts_of_llama_2(self) -> bool:
        """Return True if the template makes Llama 2's texts of dialogs, with BOS and EOS in the same places."""
        roles = {"bos_token": "<s>", "eos_token": "</s>"} | self.roles
        tokenizer: Any = _Texts(roles["bos_token"], roles["eos_token"])
        turns = [(role, f" {role} text\n") for role in ("user", "assistant", "user")]
        for dialog in (turns[:1], turns, [("system", "a"), *turns[:1]], [("system", "a"), *turns]):
            messages: Any = [{"role": role, "content": content} for role, content in dialog]
            variables = roles | {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
            try:
                text = self.process.render(self.template, [], variables, self.path)
            except LlamaError:
                return False
            if text != "".join(map(str, encode_dialog(tokenizer, messages))):
                return False
        return True

    def _render(self, tokenizer: HuggingFaceTokenizer, messages: list[dict[str, str]]) -> list[str | AddedToken]:
        """Return the parts of the rendered dialog: texts, and special tokens."""
        special = tokenizer.special_finder
        unused = _unused_characters([self.template, *(t.text for t in special.tokens), *(m["content"] for m in messages)])
        marks = {next(unused): token for token in special.tokens}
        end = next(unused) + " "  # where an answer that has begun ends; as in transformers, the template may trim the space
        continues = continues_answer(messages)  # type: ignore[arg-type]
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            messages += [last | {"content": last["content"] + end}] * continues
        text = self._text(messages, marks, continues, end)
        if not special.starts(text):
            return list(_split_at_marks(text, marks))
        # Either messages contain special tokens, or the template forms them of parts, as in "<|" + role + "|>". Render again
        # with other characters in place of the messages' own: then only those that the template forms are still there.
        hidden: dict[str, Any] = {
            character: next(unused) for character in sorted(set("".join(token.text.strip() for token in special.tokens)))
        }
        table = str.maketrans(hidden)
        hidden_messages = [{key: m[key] if m[key] in ROLES else m[key].translate(table) for key in m} for m in messages]
        text_without = self._text(hidden_messages, marks, continues, end)
        if not special.starts(text_without):
            return list(_split_at_marks(text, marks))
        formed = _split_at_marks_and_tokens(text_without, marks, special)
        shown = str.maketrans({other: character for character, other in hidden.items()})
        if text_without.translate(shown) == text:
            return [part.translate(shown) if isinstance(part, str) else part for part in formed]
        # The template depends on what the messages contain, so the second text is wrong. The first one is right.
        parts = _split_at_marks_and_tokens(text, marks, special)
        texts = [value for m in messages for value in m.values() if value not in ROLES]
        same = [p for p in parts if isinstance(p, AddedToken)] == [p for p in formed if isinstance(p, AddedToken)]
        found = next((token.text for token in special.tokens if any(token.text in value for value in texts)), None)
        if (same and found is None) or not any(_can_form(texts, token.text) for token in special.tokens):
            return parts
        raise InputError(
            f"the messages contain {found or 'parts of special tokens'!r}, which the model's chat template makes "
            "indistinguishable from its own special tokens; leave that out"
        )

    def _text(self, messages: list[dict[str, str]], marks: dict[str, AddedToken], continues: bool, end: str) -> str:
        """Return the rendered dialog, up to `end` if it continues an answer. Special tokens of the template are marks."""
        mark_of = {token.text: mark for mark, token in marks.items()}
        roles = {role: mark_of.get(text, text) for role, text in self.roles.items()}
        variables: dict[str, Any] = {**roles, "messages": messages, "tools": None, "documents": None}
        variables["add_generation_prompt"] = not continues
        text = self.process.render(self.template, [[text, mark] for text, mark in mark_of.items()], variables, self.path)
        if not continues:
            return text
        before, found, after = text.rpartition(end[0])
        if not found:
            raise InputError("the model's chat template leaves out the answer that is to be continued; leave it out, too")
        return before if after.startswith(end[1]) else before.rstrip()


class _Texts:
    """Stands for a tokenizer, and leaves texts as they are."""

    def __init__(self, bos: str, eos: str) -> None:
        self.bos, self.eos = bos, eos

    def encode(self, s: str, bos: bool, eos: bool) -> list[str]:
        return [self.bos * bos, s, self.eos * eos]


def _unused_characters(texts: list[str]) -> Iterator[str]:
    """Yield characters for private use that none of the texts contains."""
    used = {character for text in texts for character in text if character >= FIRST_MARK}
    yield from (mark for mark in map(chr, range(ord(FIRST_MARK), ord(LAST_MARK) + 1)) if mark not in used)
    raise InputError("the messages contain tens of thousands of characters for private use, and none is left; shorten them")


def _can_form(texts: list[str], token: str) -> bool:
    """Return True if a template could form a special token of texts: by joining, trimming or leaving out characters."""
    for text in filter(None, (text.strip() for text in texts)):
        edges = range(1, len(token))
        if text in token or any(text.endswith(token[:i]) or text.startswith(token[i:]) for i in edges):
            return True
    characters = iter("".join(texts))
    return all(character in characters for character in token)


def _split_at_marks_and_tokens(text: str, marks: dict[str, AddedToken], special: AddedTokenFinder) -> list[str | AddedToken]:
    """Return the parts of a rendered dialog: texts, and the special tokens of marks and of texts."""
    parts = [special.split(p) if isinstance(p, str) else [p] for p in _split_at_marks(text, marks)]
    return [part for each in parts for part in each]


def _split_at_marks(text: str, marks: dict[str, AddedToken]) -> Iterator[str | AddedToken]:
    """Yield the parts of a rendered dialog: texts, and the special tokens of marks."""
    for part in re.split(f"([{FIRST_MARK}-{LAST_MARK}])", text):
        if part in marks:
            yield marks[part]
        elif part:
            yield part
