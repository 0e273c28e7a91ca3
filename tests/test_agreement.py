"""All ranks return the same answers. Replicas divide the prompts. Arguments that differ between ranks raise on all ranks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama.engine import calls

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
def test_all_ranks_return_the_answers_of_one_process_and_raise_the_same_errors(
    small: SimpleNamespace, tmp_path: Path, one_rank: dict, ranks: int
) -> None:
    """On two ranks each rank has half of the model. On four ranks there are two such replicas of the model."""
    done = torchrun(ranks, WORKER, tmp_path / "out", small.folder, small.tokenizer_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(ranks)]
    errors_by_rank = [result.pop("errors") + result.pop("sizes") for result in results]
    wrong_sizes = [result.pop("wrong sizes") for result in results]
    assert all(result == results[0] for result in results)
    assert {key: results[0][key] for key in one_rank} == one_rank
    assert results[0]["afterwards"] == one_rank["greedy"]
    assert set(one_rank["unseeded"]) == {0} and all(results[0]["failing"])
    assert len({str(tokens) for tokens in results[0]["sampled"]}) > 3  # rows with the same prompt are sampled independently

    last = ranks - 1
    *differ, bad_input, other_context, bad_folder, bad_everywhere, sizes = zip(*errors_by_rank, strict=True)
    assert wrong_sizes[last].startswith("DeviceError: model_parallel_size=3 does not divide")
    assert set(wrong_sizes[:last]) == {f"LlamaError: rank {last} failed, so every rank stops: {wrong_sizes[last]}"}
    for errors in (*differ, other_context, sizes):
        assert errors == (errors[0],) * ranks
        assert errors[0].startswith(f"InputError: rank(s) {last} were given other input than rank 0")
    for errors, message in ((bad_input, "InputError: prompt 0 is 5 (int)"), (bad_folder, "CheckpointError: ckpt_dir is")):
        assert errors[last].startswith(message)
        assert errors[:last] == (f"LlamaError: rank {last} failed, so every rank stops: {errors[last]}",) * last
    assert bad_everywhere == ("InputError: prompt 0: 5000 (int) is no token; tokens are whole numbers from 0 to 383",) * ranks


def test_replicas_get_prompts_of_nearly_equal_total_length() -> None:
    assert calls.partition_by_length([9, 1, 8, 2, 7], 1) == [[0, 1, 2, 3, 4]]
    replicas = calls.partition_by_length([9, 1, 8, 1, 7, 1, 6, 1], 2)
    assert sorted(row for rows in replicas for row in rows) == list(range(8)) and all(rows == sorted(rows) for rows in replicas)
    assert [sum([9, 1, 8, 1, 7, 1, 6, 1][row] for row in rows) for rows in replicas] == [18, 16]
    assert calls.partition_by_length([5], 2) == [[0], []]
