"""After a killed rank, a deleted file, a full disk or a signal, the program soon ends, names the cause and cleans up."""

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

from .jobs import Job, watch_all
from .support import TORCHRUN, write_shards

WORKER = Path(__file__).with_name("fault_worker.py")
TERMINATION_SIGNALS = signal.SIGINT, signal.SIGTERM
SLOW_QUANTIZE = """
import runpy, time
from llama.checkpoint import loading
def check_slowly(*args, check_finite=loading.check_finite):
    print("quantizing", flush=True)
    time.sleep(2)
    check_finite(*args)
loading.check_finite = check_slowly
runpy.run_module("llama", run_name="__main__", alter_sys=True)
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs /proc to find processes that are left behind"
)


@pytest.fixture
def doomed(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write the small model in two shards; return the folder. The test may destroy the files."""
    return write_shards(tmp_path / "doomed", small.params, small.weights, 2)


def start_worker(small: SimpleNamespace, doomed: Path, ranks: int, rank: int, *faults: str) -> Job:
    return Job(doomed.parent, *TORCHRUN, ranks, WORKER, rank, small.folder, small.tokenizer_path, doomed, *faults)


def first_answer(small: SimpleNamespace) -> str:
    """Return the text that rank 0 of the worker prints before the first fault."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")
    return f"{llama.generate([[1, 5, 9]], 40, temperature=0)[0]}\n"


def errors(running: Job) -> dict[str, str]:
    """Return the errors that the ranks printed, by rank and fault."""
    return dict(re.findall(r"^(rank \d: \w+@\w+): (.*)$", running.stderr, re.MULTILINE))


@needs_proc
def test_a_killed_rank_ends_all_ranks(small: SimpleNamespace, doomed: Path) -> None:
    faults = {"load": 1, "prefill": 0, "decode": 1}
    want = first_answer(small)

    def watch(where: str, running: Job) -> None:
        running.sees(f"now: kill@{where}")
        print(f"rank {faults[where]} of 2 killed, {where}: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None)
        assert running.stdout == want
        assert "Signal 9 (SIGKILL) received by PID" in running.stderr
        assert "nothing was noticed" not in running.stderr

    watch_all(watch, {where: start_worker(small, doomed, 2, rank, f"kill@{where}") for where, rank in faults.items()})


@needs_proc
def test_an_error_on_one_rank_raises_on_all_ranks_even_if_that_rank_catches_it(small: SimpleNamespace, doomed: Path) -> None:
    """Rank 1 runs out of memory at load, loses a shard, gets invalid input, and runs out of memory in a decode step.

    Rank 1 catches each error and continues; after the last one it sleeps. Rank 0 must raise an error that names the cause.
    """
    faults = "memory@load", "unlink@load", "input@call", "memory@decode"
    with start_worker(small, doomed, 2, 1, *faults) as running:
        running.sees("now: memory@decode")
        print(f"rank 1 failed in a step, caught it and sleeps: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None)
        assert running.stdout == first_answer(small)
        printed = errors(running)
    assert printed["rank 1: memory@load"] == printed["rank 1: memory@decode"] == "OutOfMemoryError: planted: no memory is left"
    assert re.match(r"InputError: .*-7", printed["rank 1: input@call"])
    for fault, cause in zip(
        faults, ("no memory is left", r"consolidated\.00\.pth was deleted", "-7", "no memory is left"), strict=True
    ):
        assert re.search(cause, printed[f"rank 0: {fault}"])
        assert "rank 1" in printed[f"rank 0: {fault}"] or "consolidated" in cause


@needs_proc
def test_rank_0_raises_the_error_of_rank_1_at_once(small: SimpleNamespace, doomed: Path) -> None:
    """Rank 1 fails while scoring or starting, or is interrupted. It catches the error and sleeps instead of ending."""

    def watch(fault: str, running: Job) -> None:
        running.sees(f"now: {fault}")
        print(f"rank 1 has {fault}, caught it and sleeps: all ended after {running.ends():.1f} s")
        printed = errors(running)
        assert re.match(r"LlamaError: rank 1 failed, so every rank stops: \w+: planted", printed[f"rank 0: {fault}"])

    watch_all(
        watch,
        {fault: start_worker(small, doomed, 2, 1, fault) for fault in ("memory@score", "memory@start", "interrupt@decode")},
    )


@needs_proc
def test_nan_on_one_rank_raises_on_all_ranks(small: SimpleNamespace, doomed: Path) -> None:
    with start_worker(small, doomed, 2, 1, "nan@decode") as running:
        running.sees("now: nan@decode")
        print(f"NaN on rank 1: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None)
        printed = errors(running)
    for rank in (0, 1):
        assert re.match(
            r"NonFiniteError: prompt 0: the logits of new token \d+, .* not finite", printed[f"rank {rank}: nan@decode"]
        )


@pytest.fixture(scope="module")
def endless_flags(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Write a small model that never generates EOS, so that its answers fill the context; return command-line flags for it."""
    output = small.weights["output.weight"].clone()
    output[:259] = 0
    folder = write_shards(tmp_path_factory.mktemp("endless"), small.params, small.weights | {"output.weight": output})
    paths = "--ckpt_dir", folder, "--tokenizer_path", small.tokenizer_path
    return (*map(str, paths), "--temperature", "0", "--device", "cpu", "--max_seq_len", "4000", "--max_gen_len", "4000")


@needs_proc
def test_a_signal_to_torchrun_ends_all_ranks_and_keeps_the_output_so_far(endless_flags: tuple, tmp_path: Path) -> None:
    """The ranks print no traceback of llama's own code."""

    def watch(number: signal.Signals, running: Job) -> None:
        running.sees("the lazy dog\n> ", "stdout")
        running.process.send_signal(number)
        print(f"{number.name} to torchrun: all ended after {running.ends():.1f} s")
        assert running.process.returncode not in (0, None) and number.name in running.stderr
        assert not re.search(r"llama/\w+\.py", running.stderr)  # finds the file paths in a traceback
        assert running.stdout.startswith("the lazy dog\n> ")

    command = *TORCHRUN, 2, "-m", "llama", "complete", *endless_flags, "the lazy dog"
    watch_all(watch, {number: Job(tmp_path, *command) for number in TERMINATION_SIGNALS})


def test_an_error_on_a_rank_other_than_0_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 waits before it prints an error. If rank 0 has the same error, torchrun ends rank 1 during the wait."""
    waits: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", waits.append)
    assert main(["complete", "--temperature", "-1", "x"]) == 1
    assert capsys.readouterr().err.startswith("llama: rank 1: --temperature is -1.0") and sum(waits) > 0


@needs_proc
def test_a_signal_to_quantize_keeps_the_previous_file_and_leaves_no_partial_file(
    small: SimpleNamespace, tmp_path: Path
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_QUANTIZE)

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

    watch_all(watch, {number: start(number) for number in TERMINATION_SIGNALS})


@needs_proc
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_sigterm_to_a_chat_restores_the_terminal(endless_flags: tuple) -> None:
    from .keyboard import Person

    with Person("-m", "llama", "chat", *endless_flags) as person:
        settings = person.settings()
        person.sees("\n> ")
        person.types("never sent")
        person.sees("never sent")
        time.sleep(0.3)  # lets readline finish: while it handles a key, it delays signals
        person.process.terminate()
        assert person.waits_for_the_end() == 128 + signal.SIGTERM
        assert person.settings() == settings and "Traceback" not in person.unread


@pytest.mark.parametrize("change", ["gone", "shrunk", "replaced", "overwritten"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_file_that_changes_while_it_is_read_raises(
    small: SimpleNamespace, doomed: Path, monkeypatch: pytest.MonkeyPatch, change: str, quantize: str | None
) -> None:
    """Change the shard, or the saved file of a quantized model, after the first weight is read."""
    path = packed_file.save_packed_file(doomed, quantize) if quantize else doomed / "consolidated.01.pth"
    os.utime(path, (1, 1))  # an old modification time: even a coarse clock then shows a change
    make_parameters, calls = packed_weight.make_parameters, []

    def make_then_change(weight: Any, *args: Any) -> Any:
        parameters = make_parameters(weight, *args)
        calls.append(weight)
        if len(calls) > 1:
            return parameters
        if change == "gone":
            path.unlink()
        elif change == "shrunk":
            os.truncate(path, path.stat().st_size // 2)
        elif change == "replaced":
            os.replace(shutil.copy(path, path.with_suffix(".new")), path)
        else:
            with path.open("r+b") as f:
                f.write(f.read(1))
        return parameters

    monkeypatch.setattr(packed_weight, "make_parameters", make_then_change)
    with pytest.raises(CheckpointError, match=rf"{path.name} was (deleted|changed or replaced) while it was being read"):
        Llama.build(doomed, small.tokenizer_path, 32, 2, device="cpu", quantize=quantize)
    assert len(calls) == 1


def test_a_shard_that_is_deleted_while_it_is_opened_raises(
    small: SimpleNamespace, doomed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_torch_file = torch_file.read_torch_file

    def delete_then_read(path: Path, *arguments: Any) -> Any:
        path.unlink()
        return read_torch_file(path, *arguments)

    monkeypatch.setattr(torch_file, "read_torch_file", delete_then_read)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: .*the file was deleted"):
        Llama.build(doomed, small.tokenizer_path, 32, 2, device="cpu")


@contextlib.contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Limit the size in bytes of all files that this process writes, pytest's output included, to simulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_saving_fails_and_changes_nothing(folder: Path, error: str) -> None:
    """Check that saving an int8 file raises this error and leaves the contents of the folder unchanged."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=error):
        packed_file.save_packed_file(folder, "int8")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", [5_000, 60_000])
def test_a_full_disk_while_saving_keeps_the_previous_file(doomed: Path, size: int) -> None:
    (doomed / "int8.safetensors").write_bytes(b"before")
    with limit_file_size(size):
        assert_saving_fails_and_changes_nothing(doomed, r"int8\.safetensors: cannot be written: File too large")


def test_an_error_at_fsync_keeps_the_previous_file(doomed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems may accept all writes and report a full disk only at fsync."""

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    packed_file.packed_file_path(doomed, "int8").write_bytes(b"before")
    assert_saving_fails_and_changes_nothing(doomed, r"int8\.safetensors: cannot be written: No space left on device")


def test_a_shard_that_changes_while_saving_keeps_the_previous_files(doomed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_finite, shard = packed_file.loading.check_finite, doomed / "consolidated.00.pth"

    def touch_then_check(*args: Any) -> None:
        os.utime(shard, ns=(time.time_ns(), time.time_ns()))
        check_finite(*args)

    monkeypatch.setattr(packed_file.loading, "check_finite", touch_then_check)
    assert_saving_fails_and_changes_nothing(doomed, r"consolidated\.00\.pth was changed or replaced while it was being read")


def test_finished_answers_are_printed_before_a_failure(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each answer is printed as soon as it is finished, not together with the rest of the batch."""
    paths = "--ckpt_dir", str(small.folder), "--tokenizer_path", str(small.tokenizer_path)
    flags = *paths, "--device", "cpu", "--temperature", "0"
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdefgh"))
    command = ["complete", *flags, "--jsonl", "--max_gen_len", "3", "--max_batch_size", "2", str(tmp_path / "prompts.jsonl")]
    assert main(command) == 0
    all_lines = capfd.readouterr().out.splitlines()
    compute_logits, calls = EngineForward.logits, []

    def logits(self: Any, hidden: Any) -> Any:
        calls.append(hidden)
        if len(calls) == 10:
            raise OSError("no memory is left")
        return compute_logits(self, hidden)

    monkeypatch.setattr(EngineForward, "logits", logits)
    assert main(command) == 1
    printed = capfd.readouterr()
    written = printed.out.splitlines()
    assert 2 <= len(written) < 8 and written == all_lines[: len(written)] and printed.err.endswith("llama: no memory is left\n")
