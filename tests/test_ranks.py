"""Test that a checkpoint of any number of shards gives the same answers on any number of ranks. `make grid` also tests 8
ranks."""

from pathlib import Path

import pytest
import torch

from llama.checkpoint.resharding import shard_views

from .support import random_weights, run, torchrun, write_shards

# All widths of the model WIDE are divisible by 2, 3, 4 and 8. The model SEVENTY_B is like Llama 2 70B, but narrower and with
# fewer layers.
WIDE = dict(dim=192, n_layers=2, n_heads=24, n_kv_heads=24, multiple_of=24, norm_eps=1e-5, vocab_size=-1), 528
SEVENTY_B = dict(dim=256, n_layers=2, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5), 4096
SHARDS = {"wide": (WIDE, (1, 2, 3, 4, 8)), "70B": (SEVENTY_B, (1, 2, 4, 8))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    written = []
    for name, ((params, hidden), counts) in SHARDS.items():
        weights = random_weights(params, 384, hidden)
        root = tmp_path_factory.mktemp(name)
        written += [write_shards(root / f"{name}-{n}", params, weights, n) for n in counts]
    return written


@pytest.fixture(scope="module")
def one_rank(folders: list[Path], tokenizer_path: Path) -> dict:
    out = folders[0].parent / "one.pt"
    done = run(Path(__file__).with_name("rank_worker.py"), out, tokenizer_path, *folders)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def assert_same_answers(got: dict, want: dict) -> None:
    assert got["tokens"] == want["tokens"] and got["sampled"] == want["sampled"]
    for name in ("logits", "states"):
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=0)
    for logprobs, want_logprobs in zip(got["logprobs"], want["logprobs"], strict=True):
        assert logprobs == pytest.approx(want_logprobs, abs=1e-4)


def test_any_number_of_shards_gives_the_answers_of_one_shard_on_one_rank(folders: list[Path], one_rank: dict) -> None:
    for folder in folders:
        one_shard = next(f for f in folders if f.name == folder.name.split("-")[0] + "-1")
        assert_same_answers(one_rank[str(folder)], one_rank[str(one_shard)])
    # The models WIDE and SEVENTY_B give different answers.
    assert len({str(one_rank[str(folder)]["tokens"]) for folder in folders}) == len(SHARDS)


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.grid)])
def test_any_number_of_shards_on_several_ranks_gives_the_answers_of_one_rank(
    folders: list[Path], one_rank: dict, tokenizer_path: Path, ranks: int, tmp_path: Path
) -> None:
    worker, out = Path(__file__).with_name("rank_worker.py"), tmp_path / "out.pt"
    done = torchrun(ranks, worker, out, tokenizer_path, *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "only rank 0 is heard\n"
    answers = torch.load(out)
    assert answers.pop("agreement") == one_rank["agreement"]
    for folder, got in answers.items():
        assert_same_answers(got, one_rank[folder])
        print(f"{Path(folder).name} shard(s) on {ranks} ranks: tokens equal, logits within 1e-4")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
def test_shard_views_give_each_rank_its_part_without_copies(n: int, m: int, dim: int) -> None:
    """Cut n shards of a weight into views for m ranks."""
    weight = torch.arange(24 * 24).view(24, 24)
    shards = list(weight.chunk(n, dim))
    for rank in range(m):
        views = shard_views(shards, dim, rank, m)
        assert torch.equal(torch.cat(views, dim), weight.chunk(m, dim)[rank])
        assert all(view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for view in views)
