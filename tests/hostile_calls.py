"""Hostile tokenizers, and hostile arguments of calls: whatever Python has."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama import Llama, Tokenizer

from .hostile import VOCAB, Edit, Wrong, answer, edited, home, sound, sound_answer, sound_llama, use_tokenizer
from .support import train_tokenizer


class Raises(Exception):
    """What somebody's own object raises: theirs to see, as it is."""


@functools.lru_cache
def normalizing() -> bytes:
    """A tokenizer that replaces characters first, by a table that sentencepiece before 0.2.3 follows beyond its end."""
    return train_tokenizer(home() / "normalizing.model", VOCAB, "nmt_nfkc").read_bytes()


def play_tokenizer(normalizes: bool, edits: Sequence[Edit]) -> None:
    path = home() / "hostile.model"
    path.write_bytes(edited(normalizing() if normalizes else sound("one")["tokenizer.model"], edits))
    tokenizer = Tokenizer(path)
    use_tokenizer(tokenizer)
    if tokenizer.n_words == VOCAB:
        llama = Llama(sound_llama().model, tokenizer)
        list(llama.text_completion_stream("She sells sea shells", temperature=0, max_gen_len=8, stop=["zz"]))


def _raise(*_: Any, **__: Any) -> Any:
    raise Raises


LIES: dict[str, Callable[[], Any]] = {
    "len": lambda: type("L", (list,), {"__len__": _raise})([[1, 5]]),
    "iter": lambda: type("L", (list,), {"__iter__": _raise})([[1, 5]]),
    "getitem": lambda: type("D", (dict,), {"__getitem__": _raise})(role="user", content="a"),
    "contains": lambda: type("D", (dict,), {"__contains__": _raise})(role="user", content="a"),
    "repr": lambda: type("R", (), {"__repr__": _raise, "__str__": _raise})(),
    "eq": lambda: type("E", (str,), {"__eq__": _raise, "__hash__": str.__hash__})("user"),
    "hash": lambda: type("H", (), {"__hash__": _raise})(),
    "index": lambda: type("I", (int,), {"__index__": _raise, "__int__": _raise})(5),
    "bool": lambda: type("B", (), {"__bool__": _raise})(),
    "str": lambda: type("S", (str,), {"encode": _raise, "strip": _raise, "__str__": _raise})("hello"),
    "float": lambda: type("F", (float,), {"__float__": _raise, "__le__": _raise, "__lt__": _raise})(0.5),
    "tensor": lambda: torch.tensor([1, 5, 9]), "tensors": lambda: torch.tensor([[1, 5], [9, 9]]),
    "generator": lambda: (i for i in [1, 2]), "range": lambda: range(3), "type": lambda: dict,
    "self": lambda: (lambda loop: loop.append(loop) or loop)([]), "object": object,
    "deep": lambda: functools.reduce(lambda inner, _: [inner], range(100_000), []),
    "huge": lambda: "long text " * 100_000, "nan": lambda: math.nan, "inf": lambda: math.inf, "digits": lambda: 10**5000,
}  # fmt: skip


def made(value: Any) -> Any:
    """Plain data, with the objects that ("!", name) stands for."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "!":
        return LIES[value[1]]()
    if isinstance(value, (list, tuple)):
        return type(value)(made(item) for item in value)
    if isinstance(value, dict):
        return {key: made(item) for key, item in value.items()}
    return value


def play_call(call: str, argument: Any, options: dict[str, Any]) -> None:
    llama = sound_llama()
    try:
        argument, options = made(argument), {"temperature": 0, "max_gen_len": 3} | made(options)
        if "chat" in call or "stream" in call:
            options.pop("echo", None), options.pop("logprobs", None)
        if call == "encode":
            use = llama.tokenizer.encode(argument, True, False)
            if llama.tokenizer.decode(use) != argument:
                raise Wrong("decoded is not what was encoded")
        elif call == "decode":
            llama.tokenizer.decode(argument)
        elif call == "score":
            llama.score(*argument) if isinstance(argument, (list, tuple)) and len(argument) == 2 else llama.score(argument, [])
        elif call.endswith("stream"):
            "".join(getattr(llama, call)(argument, **options))
        elif call == "generate":
            llama.generate(argument, **options)
        else:
            found = getattr(llama, call)(argument, **options)
            if len(found) != len(argument) or not all(f["generation"] is not None for f in found):
                raise Wrong(f"{found}")
    finally:
        if answer(llama) != sound_answer():
            raise Wrong("the next call's answer is another")
