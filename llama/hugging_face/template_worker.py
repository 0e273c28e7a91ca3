"""Render chat templates, in a process of its own that anything may befall: a template is code of somebody else.

This file is run by its path, and imports nothing of the library. It reads a request, and writes the answer, as a line of JSON
each. Jinja's sandbox keeps a template from the interpreter and from files; the limits of the process bound time and memory.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn


class Refused(Exception):
    """The template has called raise_exception: it does not take this dialog."""


def make_environment() -> Any:
    """Return a sandbox with what transformers gives to templates."""
    from jinja2 import ext, nodes, sandbox
    from jinja2.ext import Extension

    class Generation(Extension):
        """The block {% generation %}, which marks answers for training. It renders its content."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja's base class has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise Refused(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def compile_template(environment: Any, source: str, marks: list[list[str]]) -> Any:
    """Compile a template. In its own texts, each special token is replaced by its mark; marks: longest tokens first."""
    from jinja2 import nodes

    tree = environment.parse(source)
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        name = "data" if isinstance(node, nodes.TemplateData) else "value"
        if isinstance(text := getattr(node, name), str):
            setattr(node, name, mark(text, marks))
    return environment.from_string(tree)


def mark(text: str, marks: list[list[str]]) -> str:
    """Replace special tokens by their marks: the leftmost first, and the longest of those that begin at the same place."""
    marked, i = "", 0
    while i < len(text):
        token, replacement = next(((t, m) for t, m in marks if text.startswith(t, i)), (text[i], text[i]))
        marked += replacement
        i += len(token)
    return marked


def limit_memory(size: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # a system without such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def render(template: Any, variables: dict[str, Any], limit: int) -> dict[str, str]:
    """Return the rendered text, or an error if it has more characters than the limit."""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            return {"error": "length"}
    text = "".join(pieces)
    text.encode()  # raises UnicodeEncodeError for a lone surrogate, which a template may contain
    return {"text": text}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    sys.path.extend(setup["path"])
    environment = make_environment()
    limit_memory(setup["memory"])
    compiled: dict[str, Any] = {}  # the last template, by its source and marks
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps([request["template"], request["marks"]])
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])  # at its end, the signal ends this process
        try:
            if key not in compiled:
                compiled = {key: compile_template(environment, request["template"], request["marks"])}
            answer = render(compiled[key], request["variables"], request["limit"])
        except Refused as e:
            answer = {"error": "refused", "message": f"{e!s:.500}"}
        except MemoryError:
            answer = {"error": "memory"}
        except Exception as e:
            compiles = key in compiled and type(e).__name__ != "SecurityError"
            answer = {"error": "dialog" if compiles else "template", "message": f"{type(e).__name__}: {e!s:.300}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
