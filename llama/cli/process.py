"""What all programs of this library share: exit codes, errors on standard error, Ctrl-C, and one report from several ranks."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator

from ..distributed.groups import global_rank
from ..errors import LlamaError
from .terminal import configure_stream


@contextlib.contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Print nothing on ranks above 0, so that help and wrong flags are reported once."""
    with contextlib.ExitStack() as stack:
        if global_rank():
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
            stack.enter_context(contextlib.redirect_stderr(devnull))
        yield


def open_missing_streams() -> None:
    """Replace each standard stream that the parent process has closed, and which is therefore None, by the null device."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def exit_code(work: Callable[[], None], flags: Collection[str] = ()) -> int:
    """Do the work of a program, and return its exit code: 0 after success, 1 after an error, 130 after Ctrl-C.

    An error is reported in one line on standard error. flags: the names of the program's flags; in errors, arguments of these
    names are written as flags. Characters that the encoding of standard output lacks are printed as question marks.
    """
    # After `import llama` of `python -m llama`, Ctrl-C would end the process at once; from now on `finally` blocks shall run.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    configure_stream(sys.stdout, errors="replace")
    rank = global_rank()
    try:
        work()
    except BrokenPipeError:  # the reader of the output has closed the pipe, as `head` does; this is not an error
        sys.stdout = open(os.devnull, "w")
    except (LlamaError, OSError) as e:
        if rank:
            time.sleep(2)  # torchrun ends this rank meanwhile, so that only rank 0 prints the error
        print(f"llama: {f'rank {rank}: ' if rank else ''}{name_flags(str(e), flags)}", file=sys.stderr)
        if isinstance(e, OSError):  # standard output may be broken, and would fail again at exit
            sys.stdout = open(os.devnull, "w")
        return 1
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt then does not follow ^C on the same line
        return 130
    return 0


@contextlib.contextmanager
def call_ckpt_dir(name: str) -> Iterator[None]:
    """In errors about the argument ckpt_dir, call it by the name that it has in a command."""
    try:
        yield
    except LlamaError as e:
        quoted_or_name = r"'[^']*'|(?<![\w/.-])ckpt_dir(?![\w/]|\.\w)"
        message = re.sub(quoted_or_name, lambda match: name if match[0] == "ckpt_dir" else match[0], str(e))
        raise type(e)(message) from None


def name_flags(message: str, flags: Collection[str]) -> str:
    """Return an error message of the library in the words of the command line, with flags in place of arguments.

    Replace name='value' by --name value, and a name by --name if it contains an underscore or begins the message as in "dtype
    is x" or ends it as in "give it as dtype". Elsewhere such a name may be a plain word. Texts in quotes are not changed.
    """

    def replace(match: re.Match[str]) -> str:
        name, text, number = match.groups()
        if value := text or number:
            return f"--{name} {value}"
        begins, ends = match.start() == 0 and message.startswith(f"{name} is "), message[match.start() - 4 :] == f" as {name}"
        is_flag = name and ("_" in name or begins or ends)
        return f"--{name}" if is_flag else match[0]

    names = "|".join(map(re.escape, flags)) or "(?!)"
    return re.sub(rf"(?<![\w/.-])({names})(?:='([^']*)'|=([\w.]+)|(?![\w/=]|\.\w))|'[^']*'", replace, message)
