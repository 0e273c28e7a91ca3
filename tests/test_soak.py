"""Test that benchmarks/soak.py sends every type of request, and fails if an answer changes or memory grows."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from llama import Llama

from .support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import soak


def test_one_round_sends_every_type_of_request_and_finds_no_broken_promise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = soak.main(["--minutes", "0", "--formats", "stored", "--json", str(tmp_path / "soak.json")])
    result = json.loads((tmp_path / "soak.json").read_text())
    assert (code, result["broken"], result["rounds"]) == (0, None, 1), result["broken"]
    assert result["requests"] == {work.__name__: 1 for work in soak.WORKLOADS} | {"rebuilt": 1}
    assert "every probe as at the start" in capsys.readouterr().out


def test_a_changed_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(llama: Llama, rng: soak.Random) -> None:
        llama.model.norm.weight = torch.nn.Parameter(llama.model.norm.weight * 1.01, requires_grad=False)

    monkeypatch.setattr(soak, "WORKLOADS", [spoil])
    assert soak.main(["--minutes", "1", "--formats", "stored", "--only", "spoil"]) == 1
    assert "BROKEN: round 0, stored, probe" in capsys.readouterr().out


@pytest.mark.parametrize("growth", [0, 10, 40])
def test_memory_that_grows_by_more_than_2_percent_after_the_warm_up_fails_the_run(
    growth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a run of ten minutes with a fake clock. Memory use grows to 1000 bytes during the warm-up, and by about
    `growth` bytes after the warm-up."""
    seconds = itertools.count()
    rounds = itertools.count()
    monkeypatch.setattr(soak.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(soak, "memory", lambda: (2000, min((t := next(rounds)) * 10, 1000) + growth * t // 450))
    monkeypatch.setattr(soak, "probe", lambda llama: 0)
    result = soak.soak({"stored": None}, [], minutes=10, seed=0)  # type: ignore[dict-item]
    assert result["broken"] == ("memory grows by more than 2%" if growth == 40 else None), result["medians"]
