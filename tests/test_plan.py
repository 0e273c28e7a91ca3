"""Test `llama.plan` and `python -m llama plan`. The sizes must equal those of real models. A plan must report that a model fits
if and only if `Llama.build` accepts the model."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import DeviceError, InputError, Llama, ModelArgs, Transformer, errors, plan
from llama import model as llama_model
from llama.cli.main import main
from llama.engine.kv_cache import KVCache
from llama.layers import embedding, linear
from llama.planning import estimate, machines
from llama.planning.free_memory import FreeMemory

from .support import assert_raises, write_shards

BF16, CUDA = torch.bfloat16, torch.device("cuda")


def pretend_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process is rank 0 of `ranks` ranks, so that models are built with the weights of that rank."""
    for module in (llama_model, linear, embedding):
        monkeypatch.setattr(module, "model_parallel", lambda: (0, ranks))


def table_rows(report: str) -> dict[str, list[str]]:
    """Parse the table in a report. Return a dict from the label of each row to the cells of the row."""
    rows = {}
    for line in report.splitlines():
        label, machine, speeds = line.partition(" GB/s ")
        if machine:
            rows[label.split("  ")[0]] = speeds.split()
        else:
            rows[line[:30].rstrip()] = re.split(r" {2,}", line[30:].strip())
    return rows


@pytest.mark.parametrize("name, gib", [("7B", 12.55), ("13B", 24.24), ("70B", 128.48)])
def test_the_known_models_are_as_large_as_metas_files(name: str, gib: float) -> None:
    assert estimate.weight_bytes(machines.MODELS[name], 1, BF16) / 2**30 == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("name, max_ranks", [("7B", 16), ("13B", 8), ("70B", 8)])
def test_a_plan_has_the_sizes_and_the_errors_of_building_the_model(name: str, max_ranks: int, format: str | None) -> None:
    args = replace(machines.MODELS[name], max_seq_len=4096, max_batch_size=8)
    table = table_rows(machines.plan_report(name, args, [], BF16, format, list(machines.GPUS.values()), CUDA))
    columns = [int(n) for n in table["ranks"]]
    assert columns == [n for n in (1, 2, 4, 8, 16) if n <= max_ranks]
    n_fitting = 0
    for i, n in enumerate(columns):
        with pytest.raises(DeviceError) as caught:
            estimate.check_memory(args, n, BF16, CUDA, FreeMemory(1), format)
        assert f"take {table['weights, on each rank'][i]}, " in str(caught.value)
        assert f"max_batch_size=8) {table['KV cache, 8 x 4096 tokens'][i]}, " in str(caught.value)
        assert f"activations {table['activations'][i]}. " in str(caught.value)
        assert f"needs {table['total'][i]}, but" in str(caught.value)
        for gpu in machines.GPUS.values():
            fits = table[gpu.name][i] != "-"
            n_fitting += fits
            try:
                estimate.check_memory(args, n, BF16, CUDA, FreeMemory(int(gpu.memory * 1e9)), format)
                assert fits
            except DeviceError as e:
                assert not fits
                report = machines.plan_report(name, args, [n], BF16, format, [gpu], CUDA)
                assert report.endswith(str(e).replace("on cuda", f"on {gpu.name}"))
    assert n_fitting > len(machines.GPUS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_bytes_read_in_a_decode_step_are_those_of_a_real_model(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    args = llama.model.params
    pretend_ranks(ranks, monkeypatch)
    with torch.device("meta"):
        model = Transformer(args).to(BF16)
        matmul_bytes = sum(p.nbytes for name, p in model.named_parameters() if "embedding" not in name)
        step_bytes = matmul_bytes + KVCache.adopt(model).data.nbytes
    assert machines.bytes_read_per_step(args, ranks, BF16) == step_bytes
    one_step_per_second = machines.Machine("one", 1, step_bytes / 1e9)
    table = table_rows(machines.plan_report("small", args, [ranks], BF16, None, [one_step_per_second], CUDA))
    assert table["one"] == [f"{args.max_batch_size:.1f}"]


def test_a_number_of_ranks_that_building_refuses_is_refused_with_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(dtype=BF16, format=None, machines=[machines.GPUS["H100"]], device=CUDA)
    for ranks in (3, 16):
        pretend_ranks(ranks, monkeypatch)
        error = f"key/value heads: 8 cannot be divided among {ranks} ranks; use one of 1, 2, 4, 8"
        assert_raises(lambda: Transformer(machines.MODELS["70B"]), DeviceError, error)
        assert_raises(
            lambda ranks=ranks: machines.plan_report("70B", machines.MODELS["70B"], [1, ranks], **options),
            DeviceError,
            error,
        )
    assert_raises(
        lambda: machines.plan_report("13B", machines.MODELS["13B"], [5], **options), DeviceError, "feed-forward width: 13824"
    )
    code = replace(machines.MODELS["7B"], vocab_size=32016)
    assert_raises(lambda: machines.plan_report("code", code, [32], **options), DeviceError, "vocabulary: 32016")


def test_the_plan_command_accepts_known_models_folders_and_machines(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed_table(*arguments: str) -> dict[str, list[str]]:
        assert main(["plan", *arguments]) == 0
        return table_rows(capsys.readouterr().out)

    table = printed_table("--model", "70B", "--ranks", "4", "--max_seq_len", "2048", "--gpu", "h100")
    assert "70B, bfloat16" in table and table["ranks"] == ["4"] and "KV cache, 1 x 2048 tokens" in table
    # The last line of the report is a note.
    assert table["weights, on each rank"] == ["34.49 GB"] and list(table)[-2] == "H100"
    machine = ("--memory", "8", "--bandwidth", "50")
    assert printed_table("--model", "7B", "--quantize", "int4", "--dtype", "float16", *machine)["a machine"][0] == "8.4"
    weights = printed_table("--ckpt_dir", str(small.folder), "--ranks", "1", "--dtype", "bfloat16", *machine)[
        "weights, on each rank"
    ]
    model = ModelArgs(**{**small.params, "vocab_size": 384})
    assert weights == [errors.format_bytes(estimate.weight_bytes(model, 1, BF16))]
    as_stored = printed_table("--ckpt_dir", str(small.folder), "--ranks", "1")["weights, on each rank"]
    assert as_stored == [errors.format_bytes(estimate.weight_bytes(model, 1, torch.float32))]

    folder = write_shards(tmp_path, small.params, {})
    (folder / "consolidated.00.pth").unlink()  # now the folder contains only params.json
    table = printed_table("--ckpt_dir", str(folder), "--ranks", "1")
    larger = replace(model, vocab_size=machines.VOCAB_SIZE)
    assert table["weights, on each rank"] == [errors.format_bytes(estimate.weight_bytes(larger, 1, BF16))]


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("--ranks 0", "ranks is 0 (int); it must be a whole number from 1"),
        ("--max_seq_len 0", "max_seq_len is 0 (int); it must be"),
        ("--max_batch_size -1", "max_batch_size is -1 (int); it must be"),
        ("--max_seq_len 99999999999999999999", "to 2,147,483,647"),
        ("--memory 24", "give either gpu, or both memory and bandwidth"),
        ("--memory 24 --bandwidth 100 --gpu L4", "gpu is 'L4', memory is 24.0, bandwidth is 100.0"),
        ("--memory nan --bandwidth 100", "memory is nan (float); it must be a number of GB above 0"),
        ("--memory 24 --bandwidth 0", "bandwidth is 0.0"),
        ("--memory 24 --bandwidth inf", "bandwidth is inf"),
        ("--quantize int4 --dtype float16", "multiplies bfloat16 only"),
    ],
)
def test_the_plan_command_refuses_bad_arguments(arguments: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "7B", *arguments.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and error in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({}, "model"),
        ({"model": "8B"}, "model"),
        ({"model": 7}, "model"),
        ({"model": "7B", "ckpt_dir": "folder"}, "model"),
        ({"model": "7B", "ranks": [0]}, "ranks"),
        ({"model": "7B", "max_seq_len": 0}, "max_seq_len"),
        ({"model": "7B", "max_batch_size": 2**31}, "max_batch_size"),
        ({"model": "7B", "dtype": "float64"}, "dtype"),
        ({"model": "7B", "memory": 8}, "memory"),
        ({"model": "7B", "memory": math.nan, "bandwidth": 50}, "memory"),
        ({"model": "7B", "memory": 8, "bandwidth": 0}, "bandwidth"),
        ({"model": ["7B"]}, "model"),
        ({"model": "7B", "ranks": 2}, "ranks"),
        ({"model": "7B", "ranks": ["2"]}, "ranks"),
        ({"model": "7B", "ranks": [1.5]}, "ranks"),
        ({"model": "7B", "ranks": [True]}, "ranks"),
        ({"model": "7B", "max_seq_len": "8"}, "max_seq_len"),
        ({"model": "7B", "max_batch_size": 1.5}, "max_batch_size"),
        ({"model": "7B", "quantize": "int3"}, "quantize"),
        ({"model": "7B", "gpu": "H900"}, "gpu"),
        ({"model": "7B", "memory": "8", "bandwidth": 50}, "memory"),
    ],
    ids=str,
)
def test_plan_refuses_bad_arguments_with_input_error(arguments: dict[str, Any], name: str) -> None:
    assert_raises(lambda: plan(**arguments), InputError, f"{name} is ")
