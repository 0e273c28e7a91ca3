"""Provide the tests of download.sh with a server on 127.0.0.1 that injects download faults, and a runner of download.sh."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "download.sh"
SECRET = "S3cr3t-Signature~x_"
TOOLS = ["sh", "awk", "cat", "df", "grep", "head", "mkdir", "mv", "rm", "sleep", "tr", "wc"]
ONE_CLIENT = "curl" if shutil.which("curl") else "wget"
HASHER = "md5sum" if shutil.which("md5sum") else "md5"
SHARDS = {"7B": 1, "13B": 2, "70B": 8, "7B-chat": 1, "13B-chat": 2, "70B-chat": 8}
SHARD = "llama-2-7b/consolidated.00.pth"
CHECKLIST = "llama-2-7b/checklist.chk"
PARAMS = "llama-2-7b/params.json"


@dataclass(frozen=True)
class Fault:
    """The differences between one HTTP response of the server and the correct response. None means no difference."""

    status: int = 200
    body: bytes | None = None  # the body that is sent in place of the file
    ignores_range: bool = False
    cut: int | None = None  # number of bytes after which the server closes the connection
    hold: int | None = None  # number of bytes after which the server sends nothing until `FaultServer.release` is set
    location: str | None = None  # the Location header of a redirect
    type: str | None = None  # the Content-Type


@dataclass(frozen=True)
class Request:
    """An HTTP request that the server received, and the status of its response."""

    path: str
    query: str
    start: int  # first byte of the requested range; 0 if no range is requested
    status: int


class FaultServer:
    """An HTTP server: `files` maps paths to contents, `faults` maps a path to the faults of its next responses."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.allowed: int | None = None  # None: the link never expires; an int: the number of responses until it expires
        self.requests: list[Request] = []
        self.holding, self.release = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def requests_for(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def next_fault(self, path: str) -> Fault:
        with self._lock:
            if self.allowed is not None:
                self.allowed -= 1
                if self.allowed < 0:
                    return Fault(status=403)
            if self.faults.get(path):
                return self.faults[path].pop(0)
            return self.always.get(path, Fault())


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, _, query = self.path[1:].partition("?")
            fault = server.next_fault(path)
            body = server.files.get(path) if fault.body is None else fault.body
            range_match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start, status, headers = int(range_match[1]) if range_match else 0, fault.status, {}
            if body is None:
                status = 404
            if status != 200:
                part = b"<?xml version='1.0'?><Error>no</Error>"
                if fault.location:
                    headers["Location"] = fault.location
            elif range_match and not fault.ignores_range and start >= len(body):
                status, part = 416, b""
                headers["Content-Range"] = f"bytes */{len(body)}"
            elif range_match and not fault.ignores_range:
                status, part = 206, body[start:]
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            else:
                part = body
            if fault.type:
                headers["Content-Type"] = fault.type
            server.requests.append(Request(path, query, start, status))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(part)), "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client may close the connection before the body is sent
                self._send(part, fault)

        def _send(self, part: bytes, fault: Fault) -> None:
            if fault.hold is not None:
                self.wfile.write(part[: fault.hold])
                server.holding.set()
                server.release.wait(30)
                part = part[fault.hold :]
            self.wfile.write(part[: fault.cut])

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def folder_of(model: str) -> str:
    return "llama-2-" + model.lower()


def make_files() -> dict[str, bytes]:
    """Return small stand-ins for all files of Meta's server: the weights of six models, their params and checksums."""
    rng = random.Random(2)

    def checklist(folder: str, names: list[str]) -> bytes:
        return b"".join(f"{hashlib.md5(files[folder + n]).hexdigest()}  {n}\n".encode() for n in names)

    files = {
        "LICENSE": b"LLAMA 2 COMMUNITY LICENSE AGREEMENT\n",
        "USE_POLICY.md": b"# Use policy\n",
        "tokenizer.model": b"\n\x0e\n" + rng.randbytes(3000),
    }
    files["tokenizer_checklist.chk"] = checklist("", ["tokenizer.model"])
    for model, shards in SHARDS.items():
        folder, names = folder_of(model) + "/", [f"consolidated.{shard:02}.pth" for shard in range(shards)]
        files |= {folder + name: b"PK\x03\x04" + rng.randbytes(100_000) for name in names}
        files[folder + "params.json"] = b'{"dim": 4096, "vocab_size": -1}\n'
        files[folder + "checklist.chk"] = checklist(folder, [*names, "params.json"])
    return files


FILES = make_files()
COMMON = ["LICENSE", "USE_POLICY.md", "tokenizer.model", "tokenizer_checklist.chk"]


def files_of(*models: str) -> dict[str, bytes]:
    folders = tuple(folder_of(model) + "/" for model in models)
    return {path: body for path, body in FILES.items() if path in COMMON or path.startswith(folders)}


class Downloader:
    """Run download.sh with one client (curl or wget) in its PATH, and check that the secret link appears in no output."""

    def __init__(self, server: FaultServer, client: str, tmp_path: Path) -> None:
        self.server, self.tmp_path, self.target = server, tmp_path, tmp_path / "target folder"
        self.bin, self.home = tmp_path / "bin", tmp_path / "home"
        self.bin.mkdir()
        self.home.mkdir()
        # These user settings make curl and wget log the link, so the script must ignore them.
        (self.home / ".curlrc").write_text(f'verbose\ntrace-ascii = "{self.home}/log"\n')
        (self.home / ".wgetrc").write_text("debug = on\nverbose = on\n")
        self.link_tools(*TOOLS, HASHER, client)
        self.url = f"{server.address}/*?Policy=a~b_&Signature={SECRET}&Key-Pair-Id=K"
        self.options = ["--url", self.url, "--models", "7B", "--dir", str(self.target)]
        self.shell, self.script = ["sh"], SCRIPT

    def link_tools(self, *names: str) -> None:
        for name in names:
            executable = shutil.which(name)
            if executable is None:
                pytest.skip(f"{name} is not installed")
            (self.bin / name).unlink(missing_ok=True)
            (self.bin / name).symlink_to(executable)

    def write_tool(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)  # writing through a symlink would change the system's own tool
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def as_environment(self) -> dict[str, str]:
        return {"PRESIGNED_URL": self.url, "MODEL_SIZE": "7B", "TARGET_FOLDER": str(self.target)}

    def use_shell(self, shell: str) -> None:
        self.shell = shell.split()
        if self.shell[0] != "sh":
            self.link_tools(self.shell[0])

    def start(self, *options: str, env: dict[str, str] | None = None, **popen) -> subprocess.Popen:
        settings = {"DOWNLOAD_RETRY_WAIT": "0", "DOWNLOAD_TIMEOUT": "20", "PATH": str(self.bin), "HOME": str(self.home)}
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        command = [*self.shell, str(self.script), *(options or self.options)]
        popen = {**pipes, "cwd": self.tmp_path, "start_new_session": True, **popen}
        signals = signal.SIGINT, signal.SIGHUP  # under nohup both signals are ignored, and the script would ignore them too
        before = [signal.signal(number, signal.SIG_DFL) for number in signals]
        try:
            return subprocess.Popen(command, text=True, env={**settings, **(env or {})}, **popen)
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def finish(self, process: subprocess.Popen, stdin: str = "") -> tuple[int, str]:
        """Wait for the script; return its exit status and stderr."""
        stdout, stderr = process.communicate(stdin, timeout=20)
        assert SECRET not in stdout + stderr
        for file in self.tmp_path.rglob("*"):
            assert not (file.is_file() and file.parent != self.bin and SECRET.encode() in file.read_bytes()), file
        return process.returncode, stderr

    def run(self, *options: str, stdin: str = "", **more) -> tuple[int, str]:
        return self.finish(self.start(*options, **more), stdin)

    def succeeds(self, *options: str, **more) -> str:
        """Run the script, check that the target folder contains exactly the files of 7B, and return stderr."""
        status, stderr = self.run(*options, **more)
        assert status == 0, stderr
        assert self.files() == files_of("7B"), sorted(self.files())
        return stderr

    def fails(self, *options: str, **more) -> str:
        """Run the script, check that it exits with 1, and return the last line of stderr: the reason."""
        status, stderr = self.run(*options, **more)
        lines = stderr.splitlines()
        assert status == 1 and all(line.startswith("download.sh: ") for line in lines), stderr
        return lines[-1]

    def files(self) -> dict[str, bytes]:
        files = (file for file in self.target.rglob("*") if file.is_file())
        return {file.relative_to(self.target).as_posix(): file.read_bytes() for file in files}

    def put(self, path: str, body: bytes) -> None:
        (self.target / path).parent.mkdir(parents=True, exist_ok=True)
        (self.target / path).write_bytes(body)

    def starts(self, path: str = SHARD) -> list[int]:
        return [request.start for request in self.server.requests_for(path)]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
