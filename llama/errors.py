"""One family of errors, and what their messages are made of.

Every error a user can cause is a `LlamaError`: a `ValueError`, because the value is at fault, and an `AssertionError`,
because those who wrote against Meta's reference catch its bare assertions. Unlike those they survive `python -O`.
Each message names the value, the limit and the way out.
"""

import itertools
import os
import reprlib
from pathlib import Path


class LlamaError(ValueError, AssertionError):
    """Base of every error this library raises."""


class InputError(LlamaError):
    """An argument of a call: prompts, dialogs, sampling parameters, sizes."""


class CheckpointError(LlamaError):
    """The files of a model: shards, `params.json`, `tokenizer.model`."""


class NonFiniteError(LlamaError):
    """What a model computes: logits that are not finite."""


class DeviceError(LlamaError):
    """Where it runs: devices, ranks, process groups, memory."""


class _ShortRepr(reprlib.Repr):
    """A few of the items, some levels deep: all of a list of lists of lists may take for ever."""

    def repr1(self, x: object, level: int) -> str:  # which reprlib chooses by name, so that subclasses are shown whole
        own = next((base for base in (dict, list, tuple, set, frozenset) if isinstance(x, base)), None)
        return getattr(self, f"repr_{own.__name__}")(x, level) if own else super().repr1(x, level)

    def repr_dict(self, x: dict[object, object], level: int) -> str:  # which reprlib sorts
        if x and level <= 0:
            return "{...}"
        items = itertools.islice(x.items(), self.maxdict)
        return "{" + ", ".join(f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in items) + "}"


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel = 3
_SHORT_REPR.maxstring = _SHORT_REPR.maxlong = _SHORT_REPR.maxother = 200
_SHORT_REPR.maxlist = _SHORT_REPR.maxtuple = _SHORT_REPR.maxset = _SHORT_REPR.maxfrozenset = _SHORT_REPR.maxdict = 20


def short_repr(value: object) -> str:
    """A value, cut short."""
    try:
        return f"{_SHORT_REPR.repr(value):.60}"
    except Exception:  # a number of more digits than Python prints, or somebody's broken __repr__
        return "something"


def describe(value: object) -> str:
    """A value and its type."""
    return f"{short_repr(value)} ({type(value).__name__})"


def check_flag(value: object, name: str) -> None:
    """Raise InputError unless it is True, False or None, or a number that equals one."""
    try:
        sound = value in (True, False, None)
    except Exception:  # an array of several
        sound = False
    if not sound:
        raise InputError(f"{name} is {describe(value)}; it must be True or False")


def check_path(value: str | os.PathLike[str], name: str, what: str, folder: bool = False) -> Path:
    """The path given as argument `name`, which must lead to `what`: a file, or a folder, that is there."""
    try:
        path = Path(value).expanduser()
        path.stat()
        wrong = "" if path.is_dir() == folder else "a file, not a folder" if folder else "a folder, not a file"
    except TypeError as e:
        raise CheckpointError(f"{name} is {describe(value)}; it must be the path of {what}") from e
    except (OSError, ValueError, RuntimeError) as e:  # nothing there, forbidden, too long, or nobody's home
        wrong = getattr(e, "strerror", None) or str(e)
    if wrong:
        raise CheckpointError(f"{name} is {str(value)!r:.200}: {wrong}; it must be the path of {what}")
    return path


def read_file(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, or all."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise CheckpointError(f"{path}: is a folder or a device, not a file")
        with path.open("rb") as f:
            return f.read(size)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


def identify_format(head: bytes) -> str:
    """What a file's first bytes say it is, for those who got another file than they think."""
    text = head.lstrip().lower()
    known = {
        b"version https://git-lfs": "it is a git-lfs pointer: run `git lfs pull`",
        b"<": "it is an HTML page or XML: the download failed",
        b"{": "it is JSON",
        b"": "it is empty" if not head else "it is cut off or damaged, or of another format",
    }
    return next(name for start, name in known.items() if text.startswith(start))


def format_bytes(n: int) -> str:
    """Bytes, to be read."""
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.3f} MB"
