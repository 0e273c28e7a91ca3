"""The long run's script: every kind of request once, and each way in which a promise breaks."""

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


def test_one_round_of_every_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = soak.main(["--minutes", "0", "--kinds", "stored", "--json", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (code, found["broken"], found["rounds"]) == (0, None, 1), found["broken"]
    assert found["requests"] == {work.__name__: 1 for work in soak.WORKLOADS} | {"rebuilt": 1}
    assert "every probe as at the start" in capsys.readouterr().out


def test_an_answer_that_changes_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(llama: Llama, draw: soak.Draw) -> None:
        llama.model.norm.weight = torch.nn.Parameter(llama.model.norm.weight * 1.01, requires_grad=False)

    monkeypatch.setattr(soak, "WORKLOADS", [spoil])
    assert soak.main(["--minutes", "1", "--kinds", "stored", "--only", "spoil"]) == 1
    assert "BROKEN: round 0, stored, probe" in capsys.readouterr().out


@pytest.mark.parametrize("grown", [0, 10, 40])
def test_memory_that_grows_after_the_warm_up_ends_it(grown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes by a clock of one second a round: growth in the first third is none; of 1000, 10 more is flat, 40 is not."""
    seconds = itertools.count()
    rounds = itertools.count()
    monkeypatch.setattr(soak.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(soak, "memory", lambda: (2000, min((t := next(rounds)) * 10, 1000) + grown * t // 450))
    monkeypatch.setattr(soak, "probe", lambda llama: 0)
    found = soak.soak({"stored": None}, [], minutes=10, seed=0)  # type: ignore[dict-item]
    assert found["broken"] == ("memory grows by more than 2%" if grown == 40 else None), found["medians"]
