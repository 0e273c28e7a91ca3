"""Run a function as a program whose flags are the parameters of the function, as both example scripts do."""

import functools
import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any

import fire

from ..errors import InputError
from .flags import normalize_flags
from .process import exit_code, open_missing_streams, silence_other_ranks


def run_script(main: Callable[..., None]) -> None:
    """Call `main` with the flags of the command line, and exit with 0, with 1 after an error, or with 2 for a wrong flag.

    Flags have the names of main's parameters, and `fire` parses them. All flags are checked before `main` is called. A value
    for a parameter of type str is never converted, so that the name of a folder may be 13.
    """
    open_missing_streams()
    with silence_other_ranks():
        args, kwargs = parse_flags(main, sys.argv[1:])
    sys.exit(exit_code(lambda: main(*args, **kwargs), inspect.signature(main).parameters))


def parse_flags(main: Callable[..., None], arguments: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments for a call of `main`. Exit with 2 for a wrong flag, and with 0 after help."""
    types = typing.get_type_hints(main)
    of_type = {name: {types[name], *typing.get_args(types[name])} for name in inspect.signature(main).parameters}
    switches = [name for name in of_type if bool in of_type[name]]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @functools.wraps(main)
    def record(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    known = [*of_type, *(f"no{name}" for name in switches), "help"]
    try:
        arguments = normalize_flags(arguments, known, of_type.keys() - switches)
    except InputError as e:
        print(f"{sys.argv[0]}: {e}", file=sys.stderr)
        sys.exit(2)
    texts = [name for name in of_type if str in of_type[name]]
    fire.Fire(record, command=_as_literals(arguments, texts, switches), name=sys.argv[0])
    return calls[0]


def _as_literals(arguments: list[str], texts: list[str], switches: list[str]) -> list[str]:
    """Return arguments whose values fire reads as intended: 13 is a text for the flags `texts`, and false is False."""
    result, is_value = [], False
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if is_value and argument != "None":
            argument = repr(argument)
        elif argument.startswith("--") and name in texts and equals and value != "None":
            argument = f"--{name}={value!r}"
        elif argument.startswith("--") and name in switches and value.lower() in ("true", "false"):
            argument = f"--{name}={value.title()}"
        is_value = not is_value and argument.startswith("--") and name in texts and not equals
        result.append(argument)
    return result
