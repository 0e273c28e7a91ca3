"""The errors that this library raises, and functions that check values and write error messages.

Every error that a user can cause is a `LlamaError`. It is a `ValueError`, because a value is wrong, and an `AssertionError`,
because programs written for Meta's reference catch its failed assertions. Unlike assertions, these errors are also raised under
`python -O`. Each message names the value, the limit and the way out.
"""

import errno
import functools
import itertools
import numbers
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeGuard, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LlamaError(ValueError, AssertionError):
    """Base class of all errors that this library raises."""


class InputError(LlamaError):
    """Error for a wrong argument of a call, such as a prompt, a dialog, a sampling parameter or a size."""


class CheckpointError(LlamaError):
    """Error for a missing or wrong file of a model, such as a shard, `params.json` or `tokenizer.model`."""


class NonFiniteError(LlamaError):
    """Error for a model that computes logits that are not finite."""


class DeviceError(LlamaError):
    """Error for a model that cannot run because of its devices, ranks, process groups or memory."""


def short_traceback(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function: remove the internal frames and the cause from the traceback of an error about its input.

    Frames of the caller's code stay. The message contains the cause.
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (InputError, CheckpointError, DeviceError) as e:
            raise e.with_traceback(_without_internal_frames(e.__traceback__)) from None

    return checked


def _without_internal_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this library and of torch."""
    if trace is None:
        return None
    trace.tb_next = _without_internal_frames(trace.tb_next)
    module = str(trace.tb_frame.f_globals.get("__name__"))
    return trace.tb_next if module.partition(".")[0] in (__package__, "torch") else trace


class _ShortRepr(reprlib.Repr):
    """Format a value like `repr`, but show only the first items of containers, and at most three levels of nesting."""

    def repr1(self, x: object, level: int) -> str:  # reprlib would not shorten a subclass of a container
        container = next((base for base in (dict, list, tuple, set, frozenset) if isinstance(x, base)), None)
        return getattr(self, f"repr_{container.__name__}")(x, level) if container else super().repr1(x, level)

    def repr_dict(self, x: dict[object, object], level: int) -> str:  # reprlib would first sort all keys of a dict
        if x and level <= 0:
            return "{...}"
        items = itertools.islice(x.items(), self.maxdict)
        return "{" + ", ".join(f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in items) + "}"


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel = 3
_SHORT_REPR.maxstring = _SHORT_REPR.maxlong = _SHORT_REPR.maxother = 200
_SHORT_REPR.maxlist = _SHORT_REPR.maxtuple = _SHORT_REPR.maxset = _SHORT_REPR.maxfrozenset = _SHORT_REPR.maxdict = 20


def short_repr(value: object) -> str:
    """Return the repr of a value, cut to 60 characters."""
    try:
        return f"{_SHORT_REPR.repr(value):.60}"
    except Exception:  # `repr` may fail, for example for an integer with more digits than Python prints
        return "something"


def describe(value: object) -> str:
    """Return the short repr of a value and its type, as in "5 (int)"."""
    return f"{short_repr(value)} ({type(value).__name__})"


def check_flag(value: object, name: str) -> None:
    """Raise InputError unless a value equals True, False or None. name: the name of the argument in the error."""
    try:
        is_flag = value in (True, False, None)
    except Exception:  # an array of several values cannot be converted to bool
        is_flag = False
    if not is_flag:
        raise InputError(f"{name} is {describe(value)}; it must be True or False")


def is_integer(value: object) -> TypeGuard[int]:
    """Return True for a whole number of any type, such as NumPy's, but not for True and False."""
    # The comparison of types decides most cases, ten times faster than the check for an abstract class.
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def check_count(value: object, name: str) -> None:
    """Raise InputError unless a value is a whole number from 1 to 2**31 - 1. name: the name of the argument in the error."""
    if not is_integer(value) or not 1 <= int(value) < 2**31:
        raise InputError(f"{name} is {describe(value)}; it must be a whole number from 1 to {2**31 - 1:,}")


def check_path(value: str | os.PathLike[str], name: str, what: str, folder: bool = False) -> Path:
    """Return `value` as a path. Raise CheckpointError unless it is an existing file (with folder=True, a folder).

    name: the name of the argument in the error. what: a description of the expected file in the error.
    """
    try:
        path = Path(value).expanduser()
        path.stat()
        problem = "" if path.is_dir() == folder else "a file, not a folder" if folder else "a folder, not a file"
        if str(value) == "":
            problem = "an empty path"
    except TypeError as e:
        raise CheckpointError(f"{name} is {describe(value)}; it must be the path of {what}") from e
    except (OSError, ValueError, RuntimeError) as e:  # raised for a missing, forbidden or too long path, for example
        problem = getattr(e, "strerror", None) or str(e)
    if problem:
        raise CheckpointError(f"{name} is {str(value)!r:.200}: {problem}; it must be the path of {what}")
    return path


def read_file(path: Path, size: int = -1) -> bytes:
    """Return the first `size` bytes of a file, by default all. Raise CheckpointError if the file cannot be read."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait until a program writes to it
            raise CheckpointError(f"{path}: is a folder or a device, not a file")
        with path.open("rb") as f:
            return f.read(size)
    except (OSError, MemoryError) as e:
        raise CheckpointError(f"{path}: {explain_system_error(e) or f'cannot be read: {e}'}") from e


_REMEDIES = {
    errno.ENOMEM: "raise `ulimit -v`, `ulimit -d` or the container's memory limit, or end other programs",
    errno.EMFILE: "raise `ulimit -n`, or close files",
    errno.ENFILE: "end other programs",
    errno.EIO: "check the disk or the network, and try again",
    errno.EACCES: "let this user read it",
    errno.ENOENT: "the link is broken, or the file was deleted: fetch it again",
}


def system_error_number(error: BaseException) -> int | None:
    """Return the errno of an error that the operating system caused; None if the contents of a file may be the cause.

    PyTorch raises RuntimeError if it cannot map a file or allocate memory, with the errno in the text.
    """
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        # A damaged zip makes zipfile seek before the beginning of the file, which the system answers with EINVAL.
        return None if error.errno == errno.EINVAL else error.errno
    text = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else ""
    match = re.search(r"^unable to .*\((\d+)\)$|DefaultCPUAllocator.*Error code (\d+)", text)
    return int(match[1] or match[2]) if match else None


def explain_system_error(error: BaseException) -> str | None:
    """Return the reason and the way out for a file that the operating system cannot read; None for any other error."""
    number = system_error_number(error)
    if number is None:
        return None
    return "; ".join(filter(None, (f"cannot be read: {os.strerror(number)}", _REMEDIES.get(number))))


def identify_format(head: bytes) -> str:
    """Return text such as "it is JSON" for an error about an unexpected file. head: the first bytes of the file."""
    text = head.lstrip().lower()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", head):
        return "it is Llama 3's tokenizer, and Llama 2's models need their own"
    descriptions = {
        b"version https://git-lfs": "it is a git-lfs pointer: run `git lfs pull`",
        b"<": "it is an HTML page or XML: the download failed",
        b"{": "it is JSON",
        b"": "it is empty" if not head else "it is cut off or damaged, or of another format",
    }
    return next(description for start, description in descriptions.items() if text.startswith(start))


def format_bytes(n: int) -> str:
    """Return a number of bytes as text in GB or MB, as in "13.48 GB"."""
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.3f} MB"
