"""Check the flags of a program before anything is loaded: unknown flags, missing values, blanks and wrong dashes."""

import difflib
import re
from collections.abc import Collection, Sequence

from ..errors import InputError

_BACKSLASH = "a backslash continues a command only at the very end of a line"
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # a document or a chat program may replace -- by one of the others


def normalize_flags(arguments: Sequence[str], known: Collection[str], with_value: Collection[str]) -> list[str]:
    """Return the arguments of a program with an underscore for each hyphen in a flag's name, as in --ckpt_dir for --ckpt-dir.

    known: the names of all flags, without the leading hyphens and with underscores. with_value: those that need a value.
    Arguments after "--" are not flags, and are returned unchanged.
    Raises InputError for an unknown flag, for a flag without a value, for an argument that is a known flag, but follows a blank
    or begins with another kind of dash, and for an argument that is a blank, unless it is the value of a flag.
    """
    result: list[str] = []
    for i, argument in enumerate(arguments):
        is_value = i > 0 and arguments[i - 1].removeprefix("--").replace("-", "_") in with_value
        if argument.isspace() and not is_value:
            raise InputError(f"{argument!r} is only a blank; {_BACKSLASH}; write -- before arguments that are blanks")
        if argument == "--":
            return [*result, *arguments[i:]]
        match = re.match(rf"(\s*)([{_DASHES}]+)(\w[\w-]*)", argument)
        blank, dashes, name = match.groups() if match else ("", "", "")
        name = name.replace("-", "_")
        if (blank or dashes.strip("-")) and name in known:
            if blank:
                problem = f"begins with a blank; {_BACKSLASH}"
            else:
                problem = "begins with a dash that is not a hyphen"
            raise InputError(f"{argument!r} {problem}; write --{name}, or -- before arguments that are not flags")
        if blank or dashes != "--":
            result.append(argument)
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else "--help lists all flags"
            raise InputError(f"unknown flag --{name}; {hint}")
        rest = argument[match.end() :] if match else ""
        following = arguments[i + 1 : i + 2]
        if name in with_value and not rest and (not following or following[0].startswith("--")):
            raise InputError(f"--{name} needs a value, as in --{name} VALUE")
        result.append(f"--{name}{rest}")
    return result
