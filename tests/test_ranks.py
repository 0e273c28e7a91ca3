"""n shards on m ranks: the answers of one rank. The whole grid, which has 8 ranks too, is `make grid`."""

from pathlib import Path

import pytest
import torch

from llama.checkpoint.resharding import shard_views

from .support import random_weights, run, torchrun, write_shards

# Widths that 1, 2, 3, 4 and 8 all divide; and 70B's proportions as its params.json has them, but for width and depth.
WIDE = dict(dim=192, n_layers=2, n_heads=24, n_kv_heads=24, multiple_of=24, norm_eps=1e-5, vocab_size=-1), 528
SEVENTY_B = dict(dim=256, n_layers=2, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5), 4096
SHARDS = {"wide": (WIDE, (1, 2, 3, 4, 8)), "70B": (SEVENTY_B, (1, 2, 4, 8))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for name, ((params, hidden), counts) in SHARDS.items():
        weights = random_weights(params, 384, hidden)
        root = tmp_path_factory.mktemp(name)
        made += [write_shards(root / f"{name}-{n}", params, weights, n) for n in counts]
    return made


@pytest.fixture(scope="module")
def one_rank(folders: list[Path], tokenizer_path: Path) -> dict:
    out = folders[0].parent / "one.pt"
    done = run(Path(__file__).with_name("rank_worker.py"), out, tokenizer_path, *folders, PYTHONPATH=_path())
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def _path() -> str:
    return str(Path(__file__).parents[1])


def same(got: dict, want: dict) -> None:
    assert got["ids"] == want["ids"] and got["sampled"] == want["sampled"]
    torch.testing.assert_close(got["logits"], want["logits"], atol=1e-4, rtol=0)
    for a, b in zip(got["logprobs"], want["logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_every_number_of_shards_on_one_rank(folders: list[Path], one_rank: dict) -> None:
    for folder in folders:
        single = next(f for f in folders if f.name == folder.name.split("-")[0] + "-1")
        same(one_rank[str(folder)], one_rank[str(single)])
    assert len({str(one_rank[str(folder)]["ids"]) for folder in folders}) == len(SHARDS)  # the models do differ


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.grid)])
def test_every_number_of_shards_on_several_ranks(
    folders: list[Path], one_rank: dict, tokenizer_path: Path, ranks: int, tmp_path: Path
) -> None:
    worker, out = Path(__file__).with_name("rank_worker.py"), tmp_path / "out.pt"
    done = torchrun(ranks, worker, out, tokenizer_path, *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "only rank 0 is heard\n"
    answers = torch.load(out)
    assert answers.pop("drawn") == one_rank["drawn"]
    for folder, got in answers.items():
        same(got, one_rank[folder])
        print(f"{Path(folder).name} shard(s) on {ranks} ranks: ids equal, logits within 1e-4")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
def test_cut_gives_each_rank_its_interval(n: int, m: int, dim: int) -> None:
    whole = torch.arange(24 * 24).view(24, 24)
    parts = list(whole.chunk(n, dim))
    for rank in range(m):
        views = shard_views(parts, dim, rank, m)
        assert torch.equal(torch.cat(views, dim), whole.chunk(m, dim)[rank])
        assert all(view._base is not None for view in views)  # nothing is copied before it is needed
