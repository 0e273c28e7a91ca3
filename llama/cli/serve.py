"""`python -m llama serve`: answer HTTP requests in OpenAI's format, until SIGTERM or Ctrl-C."""

import argparse
import contextlib
import importlib.util
import ipaddress
import math
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..distributed import groups
from ..distributed.agreement import run_on_all_ranks
from ..distributed.groups import global_rank, world_size
from ..distributed.setup import initialize
from ..errors import InputError, check_count, describe
from .model_options import build_model

KEY_VARIABLE = "LLAMA_API_KEY"
EXTRA = "uvicorn", "starlette"
HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")  # as browsers send it, without the port
OTHER_FILES = 100  # files that a process has open besides its connections: of PyTorch, of a GPU's driver, of the terminal


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command, except those of the model."""
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine only")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    server.add_argument(
        "--api_key", metavar="KEY", help=f"key that requests must have; better in {KEY_VARIABLE}, which other users do not see"
    )
    server.add_argument(
        "--allow_without_key", action="store_true", help="let everyone who reaches another --host than this machine ask"
    )
    server.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME",
        help="name under which a proxy or browser may reach this machine, besides localhost; may be repeated",
    )  # fmt: skip
    server.add_argument("--model_name", metavar="NAME", help="name of the model in requests; default: that of its folder")
    server.add_argument("--max_batch_size", type=int, default=8, metavar="N", help="answers at a time; default: 8")
    server.add_argument("--max_queue", type=int, default=64, metavar="N", help="answers that may wait; default: 64")
    server.add_argument("--max_connections", type=int, default=1000, metavar="N", help="connections at a time; default: 1000")
    server.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="limit of a response; default: 600")
    server.add_argument(
        "--grace", type=float, default=30, metavar="SECONDS", help="for what runs when the server is to end; default: 30"
    )


def run_serve(args: argparse.Namespace) -> None:
    """Check the flags and take the port before the model is loaded; then serve."""
    check_flags(args)
    if world_size() > 1:
        initialize(args.device, args.model_parallel_size)
    with contextlib.ExitStack() as stack:
        opened = run_on_all_ranks(lambda: None if global_rank() else open_server(args, stack))
        llama = build_model(args, args.max_batch_size)
        llama.lead(lambda: serve(llama, *opened, args.grace) if opened else None)


def open_server(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[socket.socket, Any]:
    """Return a socket, which `stack` closes, and the server's settings. Raise InputError if it cannot or must not listen."""
    key = api_key(args)
    sock = stack.enter_context(listening_socket(args.host, args.port))
    on_loopback = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
    if not on_loopback and not key:
        if not args.allow_without_key:
            raise InputError(
                f"host is {args.host!r}, which other machines reach, and there is no key; set {KEY_VARIABLE}, "
                "or give --allow_without_key if everyone there may ask"
            )
        print(f"llama: everyone who reaches {args.host} may ask: there is no key", file=sys.stderr)
    name = args.model_name or (Path(args.ckpt_dir).resolve().name if args.ckpt_dir else "llama-demo")
    return sock, settings(args, name, key, on_loopback)


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for a wrong flag, or if the server cannot run here."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"serve needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}, or in a clone "
            "pip install -e '.[serve]'"
        )
    if not 0 <= args.port < 2**16:
        raise InputError(f"port is {describe(args.port)}; it must be a whole number from 0 (a free one) to {2**16 - 1}")
    check_count(args.max_batch_size, "max_batch_size")
    if not 0 <= args.max_queue < 2**31:
        raise InputError(f"max_queue is {describe(args.max_queue)}; it must be a whole number from 0 to {2**31 - 1:,}")
    for name, least in (("timeout", 0.001), ("grace", 0)):
        if not least <= getattr(args, name) <= 1e6:
            raise InputError(f"{name} is {describe(getattr(args, name))}; it must be seconds from {least} to 1000000")
    check_count(args.max_connections, "max_connections")
    allow_open_files(args.max_connections)
    for host in args.allowed_host:
        if not HOST_NAME.fullmatch(host):
            raise InputError(
                f"allowed_host is {host!r}; it must be a name or an address as it stands in a URL, without scheme and port, "
                "such as chat.example or [fd00::1]"
            )
    if args.model_name == "":
        raise InputError("model_name is empty; give a name, or leave it out")


def api_key(args: argparse.Namespace) -> str | None:
    """Return the key from the flag or the environment; None if there is none. Raise InputError for one that cannot be sent."""
    key, where = (args.api_key, "api_key") if args.api_key is not None else (os.environ.get(KEY_VARIABLE), KEY_VARIABLE)
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        problem = "empty" if not key else "not a key that a header can have"
        raise InputError(f"{where} is {problem}; give printable ASCII characters without spaces, or leave it out")
    return key


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, but accepts no connections yet. Raise InputError if that is impossible."""
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(0)  # without this, a second server could bind the port, too, with SO_REUSEADDR
    except OSError as e:
        if sock:
            sock.close()
        raise InputError(
            f"cannot listen at host {host!r}, port {port}: {e.strerror or e}; give another --host or --port"
        ) from e
    return sock


def allow_open_files(max_connections: int) -> None:
    """Raise this process's limit of open files as far as its connections need. Raise InputError if that is not allowed."""
    if importlib.util.find_spec("resource") is None:
        return  # Windows has no such limit
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            raise InputError(
                f"max_connections is {max_connections}, and this process may open only {hard} files, of which it needs "
                f"{OTHER_FILES} for others; give at most {max(1, hard - OTHER_FILES)}, or raise the limit with ulimit -Hn"
            ) from None


def settings(args: argparse.Namespace, name: str, key: str | None, on_loopback: bool) -> Any:
    from ..server.app import Settings

    # A page on the web can give its own name this machine's address (DNS rebinding). Its requests then carry that name.
    host = f"[{args.host}]" if ":" in args.host else args.host
    hosts = {"localhost", "127.0.0.1", "[::1]", host.lower(), *(host.lower() for host in args.allowed_host)}
    checked = hosts if on_loopback or args.allowed_host else None
    return Settings(name, key, checked, args.max_queue, args.timeout, args.max_connections)


def server_config(llama: Any, settings: Any, grace: float) -> Any:
    import uvicorn

    from ..server.app import App
    from ..server.connections import IDLE_SECONDS, Connection

    app = App(llama, settings)
    protocol: Any = partial(Connection, metrics=app.metrics, max_connections=settings.max_connections)
    return uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=math.ceil(grace),
    )  # fmt: skip


def serve(llama: Any, sock: socket.socket, settings: Any, grace: float) -> None:
    """Serve until SIGTERM or SIGINT, or until a rank fails. Then finish the responses that have begun, within the grace."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Handle signals without raising them again at the end, which is uvicorn's way: this program exits with 0."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or groups.ended_reason is not None

    host, port = sock.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    server = Server(server_config(llama, settings, grace))
    print(f"serving {settings.model_name} at http://{address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    server.run(sockets=[sock])
