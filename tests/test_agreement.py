"""Ranks of one mind: replicas share the work and give one answer; input that differs is refused on every rank."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama.engine import request_builder

from .support import run, torchrun

WORKER = Path(__file__).with_name("agreement_worker.py")


@pytest.fixture(scope="module")
def one_rank(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("one") / "out"
    done = run(
        WORKER, out, small.folder, small.tokenizer_path, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(Path(f"{out}.0.json").read_text())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_of_one_mind(small: SimpleNamespace, tmp_path: Path, one_rank: dict, ranks: int) -> None:
    """On 2 ranks one model; on 4 two replicas."""
    done = torchrun(ranks, WORKER, tmp_path / "out", small.folder, small.tokenizer_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(ranks)]
    refused = [of_one.pop("refused") + of_one.pop("sizes") for of_one in found]
    wrong_sizes = [of_one.pop("wrong sizes") for of_one in found]
    assert all(of_one == found[0] for of_one in found)
    assert {key: found[0][key] for key in one_rank} == one_rank
    assert found[0]["afterwards"] == one_rank["greedy"]
    assert len({str(ids) for ids in found[0]["drawn"]}) > 3  # the same prompt, but draws of their own

    last = ranks - 1
    *differ, bad_input, other_window, bad_folder, bad_everywhere, sizes = zip(*refused, strict=True)
    assert wrong_sizes[last].startswith("DeviceError: model_parallel_size=3 does not divide")
    assert set(wrong_sizes[:last]) == {f"LlamaError: rank {last} failed, so every rank stops: {wrong_sizes[last]}"}
    for errors in (*differ, other_window, sizes):
        assert errors == (errors[0],) * ranks
        assert errors[0].startswith(f"InputError: rank(s) {last} were given other input than rank 0")
    for errors, kind in ((bad_input, "InputError: prompt 0 is 5 (int)"), (bad_folder, "CheckpointError: ckpt_dir is")):
        assert errors[last].startswith(kind)
        assert errors[:last] == (f"LlamaError: rank {last} failed, so every rank stops: {errors[last]}",) * last
    assert bad_everywhere == ("InputError: prompt 0: 5000 (int) is no token id; ids are whole numbers from 0 to 383",) * ranks


def test_prompts_are_dealt_by_length() -> None:
    assert request_builder.partition_by_length([9, 1, 8, 2, 7], 1) == [[0, 1, 2, 3, 4]]
    hands = request_builder.partition_by_length([9, 1, 8, 1, 7, 1, 6, 1], 2)
    assert sorted(row for hand in hands for row in hand) == list(range(8)) and all(hand == sorted(hand) for hand in hands)
    assert [sum([9, 1, 8, 1, 7, 1, 6, 1][row] for row in hand) for hand in hands] == [18, 16]
    assert request_builder.partition_by_length([5], 2) == [[0], []]
