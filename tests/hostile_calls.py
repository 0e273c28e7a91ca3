"""Use damaged tokenizer files, and call the library with objects whose special methods raise."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama import Llama, Tokenizer

from .hostile import (
    VOCAB,
    BrokenPromise,
    Edit,
    answer,
    edited,
    sound,
    sound_answer,
    sound_llama,
    temporary_folder,
    use_tokenizer,
)
from .support import train_tokenizer


class CallersError(Exception):
    """An error that a method of the caller's argument raises. The library must pass the error to the caller unchanged."""


@functools.lru_cache
def normalizing() -> bytes:
    """Return a tokenizer file with a normalization table. sentencepiece before 0.2.3 reads beyond a damaged table."""
    return train_tokenizer(temporary_folder() / "normalizing.model", VOCAB, "nmt_nfkc").read_bytes()


def play_tokenizer(normalizes: bool, edits: Sequence[Edit]) -> None:
    """Load a damaged tokenizer, encode and decode with it, and generate with it if its vocabulary has the right size."""
    path = temporary_folder() / "hostile.model"
    path.write_bytes(edited(normalizing() if normalizes else sound("one")["tokenizer.model"], edits))
    tokenizer = Tokenizer(path)
    use_tokenizer(tokenizer)
    if tokenizer.n_words == VOCAB:
        llama = Llama(sound_llama().model, tokenizer)
        list(llama.text_completion_stream("She sells sea shells", temperature=0, max_gen_len=8, stop=["zz"]))


def _raise(*_: Any, **__: Any) -> Any:
    raise CallersError


TRICK_OBJECTS: dict[str, Callable[[], Any]] = {
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


def with_trick_objects(value: Any) -> Any:
    """Return the value with each pair ("!", name) in it replaced by the object of that name from TRICK_OBJECTS."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "!":
        return TRICK_OBJECTS[value[1]]()
    if isinstance(value, (list, tuple)):
        return type(value)(with_trick_objects(item) for item in value)
    if isinstance(value, dict):
        return {key: with_trick_objects(item) for key, item in value.items()}
    return value


def play_call(call: str, argument: Any, options: dict[str, Any]) -> None:
    """Call a method with hostile arguments; check that the answer is correct and that the next call is unaffected."""
    llama = sound_llama()
    try:
        argument, options = with_trick_objects(argument), {"temperature": 0, "max_gen_len": 3} | with_trick_objects(options)
        if "chat" in call or "stream" in call:
            options.pop("echo", None), options.pop("logprobs", None)
        if "text_completion" != call != "chat_completion":
            options.pop("top_logprobs", None)
        if call == "encode":
            tokens = llama.tokenizer.encode(argument, True, False)
            if llama.tokenizer.decode(tokens) != argument:
                raise BrokenPromise("the decoded text is not the encoded text")
        elif call == "decode":
            llama.tokenizer.decode(argument)
        elif call == "score":
            llama.score(*argument) if isinstance(argument, (list, tuple)) and len(argument) == 2 else llama.score(argument, [])
        elif call.endswith("stream"):
            "".join(getattr(llama, call)(argument, **options))
        elif call == "generate":
            llama.generate(argument, **options)
        else:
            results = getattr(llama, call)(argument, **options)
            if len(results) != len(argument) or not all(result["generation"] is not None for result in results):
                raise BrokenPromise(f"{results}")
    finally:
        if answer(llama) != sound_answer():
            raise BrokenPromise("the next call has another answer")
