"""Ranks that are killed or fail, files that go, full disks, signals: all ends soon, with the cause, and nothing is left."""

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama import CheckpointError, Llama
from llama.checkpoint import packed_file, torch_file
from llama.cli.main import main
from llama.engine.forward import EngineForward
from llama.kernels import packed_weight

from .jobs import Job, at_once
from .support import TORCHRUN, write_shards

WORKER = Path(__file__).with_name("fault_worker.py")
ENDINGS = signal.SIGINT, signal.SIGTERM
SLOW = """
import runpy, time
from llama.checkpoint import loading
def slow(*args, plain=loading.check_finite):
    print("quantizing", flush=True)
    time.sleep(2)
    plain(*args)
loading.check_finite = slow
runpy.run_module("llama", run_name="__main__", alter_sys=True)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc, to see what is left")


@pytest.fixture
def doomed(small: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the small model, in two shards."""
    return write_shards(tmp_path / "doomed", small.params, small.weights, 2)


def job(small: SimpleNamespace, doomed: Path, ranks: int, rank: int, *faults: str) -> Job:
    return Job(doomed.parent, *TORCHRUN, ranks, WORKER, rank, small.folder, small.tokenizer_path, doomed, *faults)


def answered(small: SimpleNamespace) -> str:
    """What rank 0 printed before anything happened."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")
    return f"{llama.generate([[1, 5, 9]], 40, temperature=0)[0]}\n"


def errors(running: Job) -> dict[str, str]:
    """What the ranks have told, by rank and fault."""
    return dict(re.findall(r"^(rank \d: \w+@\w+): (.*)$", running.stderr, re.MULTILINE))


@needs_proc
def test_a_rank_is_killed(small: SimpleNamespace, doomed: Path) -> None:
    faults = {"load": 1, "prefill": 0, "decode": 1}
    want = answered(small)

    def watch(where: str, running: Job) -> None:
        running.sees(f"now: kill@{where}")
        print(f"rank {faults[where]} of 2 killed, {where}: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None)
        assert running.stdout == want
        assert "Signal 9 (SIGKILL) received by PID" in running.stderr
        assert "nothing was noticed" not in running.stderr

    at_once(watch, {where: job(small, doomed, 2, rank, f"kill@{where}") for where, rank in faults.items()})


@needs_proc
def test_a_rank_that_fails_fails_all_though_it_goes_on_itself(small: SimpleNamespace, doomed: Path) -> None:
    """Rank 1 has no memory, sees a shard go, is called with bad input, and has no memory in a step. Each time
    it goes on; the last time it sleeps. Rank 0 must get an error, which names rank 1 where it is at fault."""
    faults = "memory@load", "unlink@load", "input@call", "memory@decode"
    with job(small, doomed, 2, 1, *faults) as running:
        running.sees("now: memory@decode")
        print(f"rank 1 failed in a step, caught it and sleeps: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None)
        assert running.stdout == answered(small)
        told = errors(running)
    assert told["rank 1: memory@load"] == told["rank 1: memory@decode"] == "OutOfMemoryError: planted: no memory is left"
    assert re.match(r"InputError: .*-7", told["rank 1: input@call"])
    for fault, cause in zip(
        faults, ("no memory is left", r"consolidated\.00\.pth has gone", "-7", "no memory is left"), strict=True
    ):
        assert re.search(cause, told[f"rank 0: {fault}"])
        assert "rank 1" in told[f"rank 0: {fault}"] or "consolidated" in cause


@needs_proc
def test_a_rank_that_fails_elsewhere_or_is_interrupted(small: SimpleNamespace, doomed: Path) -> None:
    """It catches that and sleeps. Rank 0 raises its reason at once, not when rank 1 ends."""

    def watch(fault: str, running: Job) -> None:
        running.sees(f"now: {fault}")
        print(f"rank 1 has {fault}, caught it and sleeps: all ended after {running.ends():.1f} s")
        told = errors(running)
        assert re.match(r"LlamaError: rank 1 failed, so every rank stops: \w+: planted", told[f"rank 0: {fault}"])

    at_once(watch, {fault: job(small, doomed, 2, 1, fault) for fault in ("memory@score", "memory@start", "interrupt@decode")})


@needs_proc
def test_nan_on_one_rank_is_an_error_on_all(small: SimpleNamespace, doomed: Path) -> None:
    with job(small, doomed, 2, 1, "nan@decode") as running:
        running.sees("now: nan@decode")
        print(f"NaN on rank 1: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None)
        told = errors(running)
    for rank in (0, 1):
        assert re.match(
            r"NonFiniteError: prompt 0: the logits of new token \d+, .* not finite", told[f"rank {rank}: nan@decode"]
        )


@pytest.fixture(scope="module")
def talker(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Flags for a small model that never says EOS: it talks on to the window's end."""
    output = small.weights["output.weight"].clone()
    output[:259] = 0
    folder = write_shards(tmp_path_factory.mktemp("talker"), small.params, small.weights | {"output.weight": output})
    paths = "--ckpt_dir", folder, "--tokenizer_path", small.tokenizer_path
    return (*map(str, paths), "--temperature", "0", "--device", "cpu", "--max_seq_len", "4000", "--max_gen_len", "4000")


@needs_proc
def test_a_signal_to_torchrun(talker: tuple, tmp_path: Path) -> None:
    """It ends all ranks, which have nothing to say. What has come of the answer is there."""

    def watch(number: signal.Signals, running: Job) -> None:
        running.sees("the lazy dog\n> ", "stdout")
        running.process.send_signal(number)
        print(f"{number.name} to torchrun: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None) and number.name in running.stderr
        assert not re.search(r"llama/\w+\.py", running.stderr)  # a traceback of ours
        assert running.stdout.startswith("the lazy dog\n> ")

    command = *TORCHRUN, 2, "-m", "llama", "complete", *talker, "the lazy dog"
    at_once(watch, {number: Job(tmp_path, *command) for number in ENDINGS})


def test_what_another_rank_alone_has_to_say_is_heard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After some time, in which torchrun would have ended it if rank 0 had said the same."""
    waits: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", waits.append)
    assert main(["complete", "--temperature", "-1", "x"]) == 1
    assert capsys.readouterr().err.startswith("llama: rank 1: temperature is -1.0") and sum(waits) > 0


@needs_proc
def test_a_signal_to_quantize_leaves_the_file_before_and_no_other(small: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)

    def start(number: signal.Signals) -> Job:
        folder = write_shards(tmp_path / number.name, small.params, small.weights)
        (folder / "int8.safetensors").write_bytes(b"before")
        return Job(tmp_path, script, "quantize", "--ckpt_dir", folder, "int8")

    def watch(number: signal.Signals, running: Job) -> None:
        folder = tmp_path / number.name
        running.sees("quantizing", "stdout")
        assert list(folder.glob("*.part"))
        running.process.send_signal(number)
        print(f"{number.name} to quantize: ended after {running.ends():.1f} s")
        assert running.process.returncode == 128 + number and running.stderr == ""
        assert not list(folder.glob("*.part")) and (folder / "int8.safetensors").read_bytes() == b"before"

    at_once(watch, {number: start(number) for number in ENDINGS})


@needs_proc
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_sigterm_to_a_chat_gives_the_terminal_back(talker: tuple) -> None:
    from .keyboard import Person

    with Person("-m", "llama", "chat", *talker) as person:
        settings = person.settings()
        person.sees("\n> ")
        person.types("never sent")
        person.sees("never sent")
        time.sleep(0.3)  # between a key and its wait for the next, readline would keep the signal until then
        person.process.terminate()
        assert person.waits_for_the_end() == 128 + signal.SIGTERM
        assert person.settings() == settings and "Traceback" not in person.unread


@pytest.mark.parametrize("change", ["gone", "shrunk", "replaced", "overwritten"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_file_that_changes_while_it_is_read(
    small: SimpleNamespace, doomed: Path, monkeypatch: pytest.MonkeyPatch, change: str, quantize: str | None
) -> None:
    """After the first weight. Of a quantized model it is the saved file that changes."""
    path = packed_file.save_packed_file(doomed, quantize) if quantize else doomed / "consolidated.01.pth"
    os.utime(path, (1, 1))  # long ago: clocks of file systems are coarse
    plain, calls = packed_weight.make_parameters, []

    def hold(weight: Any, *args: Any) -> Any:
        made = plain(weight, *args)
        calls.append(weight)
        if len(calls) > 1:
            return made
        if change == "gone":
            path.unlink()
        elif change == "shrunk":
            os.truncate(path, path.stat().st_size // 2)
        elif change == "replaced":
            os.replace(shutil.copy(path, path.with_suffix(".new")), path)
        else:
            with path.open("r+b") as f:
                f.write(f.read(1))
        return made

    monkeypatch.setattr(packed_weight, "make_parameters", hold)
    with pytest.raises(CheckpointError, match=rf"{path.name} (has gone|is another).* while it was being read"):
        Llama.build(doomed, small.tokenizer_path, 32, 2, device="cpu", quantize=quantize)
    assert len(calls) == 1


def test_a_shard_that_goes_while_it_is_opened(small: SimpleNamespace, doomed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch_file.read_torch_file

    def read(path: Path) -> Any:
        path.unlink()
        return plain(path)

    monkeypatch.setattr(torch_file, "read_torch_file", read)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: .* gone by now"):
        Llama.build(doomed, small.tokenizer_path, 32, 2, device="cpu")


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a disk that is full: none of this process, pytest's own output among them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kept_as_it_was(folder: Path, error: str) -> None:
    """Saving fails with this error, and leaves all as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=error):
        packed_file.save_packed_file(folder, "int8")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", [5_000, 60_000])
def test_no_room_while_saving(doomed: Path, size: int) -> None:
    (doomed / "int8.safetensors").write_bytes(b"before")
    with files_end_at(size):
        kept_as_it_was(doomed, r"int8\.safetensors: cannot be written: File too large")


def test_a_disk_that_fails_late(doomed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network disks do: all is taken, but not all is kept."""

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    packed_file.packed_file_path(doomed, "int8").write_bytes(b"before")
    kept_as_it_was(doomed, r"int8\.safetensors: cannot be written: No space left on device")


def test_a_shard_that_changes_while_it_is_saved(doomed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, shard = packed_file.loading.check_finite, doomed / "consolidated.00.pth"

    def meanwhile(*args: Any) -> None:
        os.utime(shard, ns=(time.time_ns(), time.time_ns()))
        plain(*args)

    monkeypatch.setattr(packed_file.loading, "check_finite", meanwhile)
    kept_as_it_was(doomed, r"consolidated\.00\.pth is another file, or other contents, now, while it was being read")


def test_what_is_finished_is_written_before_a_failure(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not only when all, or many, are."""
    flags = [
        "--ckpt_dir",
        str(small.folder),
        "--tokenizer_path",
        str(small.tokenizer_path),
        "--device",
        "cpu",
        "--temperature",
        "0",
    ]
    command = ["complete", *flags, "--jsonl", "--max_gen_len", "3", "--max_batch_size", "2", *"abcdefgh"]
    assert main(command) == 0
    whole = capfd.readouterr().out.splitlines()
    plain, calls = EngineForward.logits, []

    def logits(self: Any, hidden: Any) -> Any:
        calls.append(hidden)
        if len(calls) == 10:
            raise OSError("no memory is left")
        return plain(self, hidden)

    monkeypatch.setattr(EngineForward, "logits", logits)
    assert main(command) == 1
    told = capfd.readouterr()
    written = told.out.splitlines()
    assert 2 <= len(written) < 8 and written == whole[: len(written)] and told.err.endswith("llama: no memory is left\n")
