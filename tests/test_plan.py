"""`python -m llama plan`: its figures are those that building goes by, and those of a model that is there."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import DeviceError, Llama, ModelArgs, Transformer, errors
from llama import model as llama_model
from llama.cli.main import main
from llama.engine.kv_cache import KVCache
from llama.layers import embedding, linear
from llama.planning import estimate, machines

from .support import refused, write_shards

BF16, CUDA = torch.bfloat16, torch.device("cuda")


def on_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are made as rank 0 of so many makes them."""
    for module in (llama_model, linear, embedding):
        monkeypatch.setattr(module, "model_parallel", lambda: (0, ranks))


def cells(report: str) -> dict[str, list[str]]:
    """A table's rows by what stands at their left."""
    rows = {}
    for line in report.splitlines():
        label, machine, speeds = line.partition(" GB/s ")
        if machine:
            rows[label.split("  ")[0]] = speeds.split()
        else:
            rows[line[:30].rstrip()] = re.split(r" {2,}", line[30:].strip())
    return rows


@pytest.mark.parametrize("name, gib", [("7B", 12.55), ("13B", 24.24), ("70B", 128.48)])
def test_the_models_are_as_large_as_metas_files(name: str, gib: float) -> None:
    assert estimate.weight_bytes(machines.MODELS[name], 1, BF16) / 2**30 == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("name, most", [("7B", 16), ("13B", 8), ("70B", 8)])
def test_a_plan_says_what_building_would(name: str, most: int, kind: str | None) -> None:
    args = replace(machines.MODELS[name], max_seq_len=4096, max_batch_size=8)
    table = cells(machines.plan_report(name, args, [], BF16, kind, list(machines.GPUS.values()), CUDA))
    columns = [int(n) for n in table["ranks"]]
    assert columns == [n for n in (1, 2, 4, 8, 16) if n <= most]
    fitting = 0
    for i, n in enumerate(columns):
        with pytest.raises(DeviceError) as caught:
            estimate.check_memory(args, n, BF16, CUDA, 1, kind)
        assert f"{table['weights, on each'][i]} of weights" in str(caught.value)
        assert f"{table['cache of 8 x 4096 ids'][i]} of cache" in str(caught.value)
        assert f"{table['to compute in'][i]} to compute in, make {table['in all'][i]}" in str(caught.value)
        for gpu in machines.GPUS.values():
            fits = table[gpu.name][i] != "-"
            fitting += fits
            try:
                estimate.check_memory(args, n, BF16, CUDA, int(gpu.memory * 1e9), kind)
                assert fits
            except DeviceError as e:
                assert not fits
                alone = machines.plan_report(name, args, [n], BF16, kind, [gpu], CUDA)
                assert alone.endswith(str(e).replace("on cuda", f"on {gpu.name}"))
    assert fitting > len(machines.GPUS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_bytes_of_a_step_are_those_of_a_real_model(llama: Llama, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    args = llama.model.params
    on_ranks(ranks, monkeypatch)
    with torch.device("meta"):
        model = Transformer(args).to(BF16)
        held = (
            sum(p.nbytes for name, p in model.named_parameters() if "embedding" not in name) + KVCache.adopt(model).data.nbytes
        )
    assert machines.bytes_read_per_step(args, ranks, BF16) == held
    once_a_second = machines.Machine("one", 1, held / 1e9)
    table = cells(machines.plan_report("small", args, [ranks], BF16, None, [once_a_second], CUDA))
    assert table["one"] == [f"{args.max_batch_size:.1f}"]


def test_ranks_that_cannot_be_are_refused_as_building_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = dict(dtype=BF16, kind=None, machines=[machines.GPUS["H100"]], device=CUDA)
    for ranks in (3, 16):
        on_ranks(ranks, monkeypatch)
        said = f"key/value heads: 8 cannot be divided among {ranks} ranks; use one of 1, 2, 4, 8"
        refused(lambda: Transformer(machines.MODELS["70B"]), DeviceError, said)
        refused(
            lambda ranks=ranks: machines.plan_report("70B", machines.MODELS["70B"], [1, ranks], **everything), DeviceError, said
        )
    refused(
        lambda: machines.plan_report("13B", machines.MODELS["13B"], [5], **everything), DeviceError, "feed-forward width: 13824"
    )
    code = replace(machines.MODELS["7B"], vocab_size=32016)
    refused(lambda: machines.plan_report("code", code, [32], **everything), DeviceError, "vocabulary: 32016")


def test_the_command(small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> dict[str, list[str]]:
        assert main(["plan", *arguments]) == 0
        return cells(capsys.readouterr().out)

    table = said("--model", "70B", "--ranks", "4", "--max_seq_len", "2048", "--gpu", "h100")
    assert "70B, bfloat16" in table and table["ranks"] == ["4"] and "cache of 1 x 2048 ids" in table
    assert table["weights, on each"] == ["34.49 GB"] and list(table)[-2] == "H100"  # a note follows
    mine = ("--memory", "8", "--bandwidth", "50")
    assert said("--model", "7B", "--quantize", "int4", "--dtype", "float16", *mine)["a machine"][0] == "8.4"
    weights = said("--ckpt_dir", str(small.folder), "--ranks", "1", "--dtype", "bfloat16", *mine)["weights, on each"]
    model = ModelArgs(**{**small.params, "vocab_size": 384})
    assert weights == [errors.format_bytes(estimate.weight_bytes(model, 1, BF16))]
    as_stored = said("--ckpt_dir", str(small.folder), "--ranks", "1")["weights, on each"]
    assert as_stored == [errors.format_bytes(estimate.weight_bytes(model, 1, torch.float32))]

    folder = write_shards(tmp_path, small.params, {})  # as long as only params.json is there
    (folder / "consolidated.00.pth").unlink()
    table = said("--ckpt_dir", str(folder), "--ranks", "1")
    larger = replace(model, vocab_size=machines.VOCAB_SIZE)
    assert table["weights, on each"] == [errors.format_bytes(estimate.weight_bytes(larger, 1, BF16))]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--ranks 0", "ranks is 0; it must be a whole number from 1"),
        ("--max_seq_len 0", "max_seq_len is 0; it must be"),
        ("--max_batch_size -1", "max_batch_size is -1; it must be"),
        ("--max_seq_len 99999999999999999999", "to 2,147,483,647"),
        ("--memory 24", "not something of each"),
        ("--memory 24 --bandwidth 100 --gpu L4", "a machine is either a --gpu"),
        ("--memory nan --bandwidth 100", "memory is nan; it must be a number of GB above 0"),
        ("--memory 24 --bandwidth 0", "bandwidth is 0.0"),
        ("--memory 24 --bandwidth inf", "bandwidth is inf"),
        ("--quantize int4 --dtype float16", "multiplies bfloat16 only"),
    ],
)
def test_what_cannot_be_planned(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "7B", *arguments.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
