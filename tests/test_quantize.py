"""8 and 4 bit weights: each kernel multiplies as the numbers it holds say, wherever they come from."""

import copy
import dataclasses
import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import DeviceError, InputError, Llama, ModelArgs, int4, kernels, loading, memory, saved, widened
from llama.checkpoint import open_shards
from llama.parallel import ColumnParallelLinear, RowParallelLinear
from llama.quantize import Quantized, check_width, from_nibbles, quantize, to_nibbles

from .conftest import SMALL
from .support import ROOT, random_weights, run, torchrun, write_shards

DEMO, DEMO_TOKENIZER = ROOT / "demo/model", ROOT / "demo/tokenizer.model"
DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = (384, 192), (344, 172), (64, 1088), (20, 7)  # the second and the last: no multiple of what kernels need
vnni = pytest.mark.skipif(not kernels.exact_in_8_bits(), reason="no exact products of 8 bits")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With rows of very different size, as trained ones are."""
    g = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_weights_stay_near(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    eight, four = quantize(weight, "int8"), quantize(weight, "int4")
    assert eight.q.abs().max() == 127 and (eight.dense() - weight).abs().le(eight.scale * 0.501).all()
    # Plainly, between the least and the greatest of a group; trying narrower ranges may only help.
    group = torch.nn.functional.pad(weight, (0, -shape[1] % four.group)).unflatten(1, (-1, four.group))
    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((group - low) / step.clamp(min=1e-9)).round() * step + low
    error = (four.dense() - weight).square().sum()
    assert error < 1.01 * (plain - group).square().sum()
    assert four.q.min() == -8 and four.q.max() == 7
    assert torch.equal(from_nibbles(to_nibbles(four.q)), four.q)


def test_weights_of_zero_stay_zero() -> None:
    for kind in ("int8", "int4"):
        held = quantize(torch.zeros(64, 64), kind)
        kernel = kernels.pack(held)
        assert (
            kernel
            and held.dense().abs().max() < 1e-20
            and kernel(torch.ones(2, 64)).abs().max() < 1e-20
            and not kernel(torch.zeros(1, 64)).any()
        )


FORMS = {
    "Int8": ("int8", kernels.Int8),
    "Int8Rows": ("int8", kernels.Int8Rows),
    "Int8Cuda": ("int8", kernels.Int8Cuda),
    "Int4": ("int4", kernels.Int4),
    "Int4Rows": ("int4", kernels.Int4Rows),
}


CASES = [
    pytest.param(form, shape, dtype, marks=vnni if form in ("Int8Rows", "Int8Cuda") else ())
    for form, shape, dtype in itertools.product(FORMS, SHAPES, DTYPES)
    if form != "Int4Rows" or (shape == (64, 1088) and dtype != torch.float32)  # what alone it is for
]


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize(("form", "shape", "dtype"), CASES)
def test_products_are_those_of_the_numbers_held(
    form: str, shape: tuple[int, int], dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened, "PIECE", 1 << 15)  # so that there are several
    kind, make = FORMS[form]
    held = quantize(random(*shape, dtype=dtype), kind)
    kernel, x = make(held), random(n, shape[1]).to(dtype)
    if form in ("Int8Rows", "Int8Cuda"):  # the rows in 8 bit as well, to the digit
        exact = x.float() if dtype == torch.float16 else x
        scale = (exact.abs().amax(1, keepdim=True) / 126).float()
        rows = (x.float() / scale).add(128.5).floor().sub(128) * scale
        assert (rows - x.float()).abs().le(scale * 0.501).all()
    else:
        rows = x.float()
    want = rows.double() @ dataclasses.replace(held, dtype=torch.float64).dense().T
    got = kernel(x)
    assert got.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
    assert kernel(x.view(1, n, -1)).shape == (1, n, shape[0])
    if form != "Int8Rows":  # which is for steps that are not compiled
        torch._dynamo.reset()
        compiled = torch.compile(kernel, fullgraph=True, dynamic=False, backend="eager")(x)
        assert compiled.dtype == dtype and (compiled.double() - want).abs().max() <= max(tolerance, 1e-2) * want.abs().max()

    for again in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        back = again.held()
        for field in dataclasses.fields(Quantized):
            a, b = getattr(held, field.name), getattr(back, field.name)
            assert (
                torch.equal(a, b) if isinstance(a, torch.Tensor) and dtype != torch.float16 else field.name != "q" or a.equal(b)
            )


def test_many_rows_are_multiplied_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """int4's two ways, where blocks end within the weight; and the one that is left where blocks cannot be read."""
    kernel, x = kernels.Int4(quantize(random(200, 192, dtype=torch.bfloat16), "int4")), random(7, 192, dtype=torch.bfloat16)
    fast, kernel.few = kernel(x), None
    few, by_pieces, unpacked = kernel(x), widened.by_pieces, []
    torch.testing.assert_close(fast, few, atol=0.05, rtol=0.02)
    monkeypatch.setattr(widened, "by_pieces", lambda x, *rest: (unpacked.append(len(x)), by_pieces(x, *rest))[1])
    monkeypatch.setattr(int4, "FEW", 0)
    monkeypatch.setattr(widened, "PIECE", 192 * 64 * 2)
    torch.testing.assert_close(kernel(x), few, atol=0.05, rtol=0.02)
    assert unpacked == ([7] if int4._half_a_block() else [])
    monkeypatch.setattr(int4, "_half_a_block", lambda: None)
    assert torch.equal(kernel(x), few)


@vnni
def test_8_bits_on_a_gpu_are_those_of_the_cpu() -> None:
    """By cuBLAS's operator, which the CPU has too."""
    held = quantize(random(384, 192, dtype=torch.bfloat16), "int8")
    for n in (1, 2, 5, 40):
        x = random(n, 192, dtype=torch.bfloat16)
        assert torch.equal(kernels.Int8Cuda(held)(x), kernels.Int8Rows(held)(x))


def as_cuda_packs(q: torch.Tensor, tiles: int) -> torch.Tensor:
    """PyTorch's `matrix_to_m16n8k16_Bint4_layout`, number by number: what each of 32 threads hands to the tensor cores."""
    u = (q + 8).tolist()
    blocks = torch.zeros(len(u) // 8, len(u[0]) // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for n, k, thread, pair in itertools.product(*map(range, blocks.shape)):
        first = (k * tiles + 2 * pair) * 16 + thread % 4 * 2
        values = [u[8 * n + thread // 4][first + i] for i in (0, 1, 8, 9, 16, 17, 24, 25)]
        blocks[n, k, thread, pair] = sum(values[v] << 4 * i for i, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return torch.where(blocks >= 2**31, blocks - 2**32, blocks).to(torch.int32)


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_a_gpus_blocks_of_4_bits_are_read(tiles: int) -> None:
    q = torch.randint(-8, 8, (16, 16 * tiles * 3), dtype=torch.int8)
    assert torch.equal(int4._unpack_int4_cuda(as_cuda_packs(q, tiles), torch.bfloat16), q.bfloat16())


def layers_of(llama: Llama) -> dict[str, Any]:
    return {n: m for n, m in llama.model.named_modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))}


@pytest.mark.parametrize("kind, bound", [("int8", 0.15), ("int4", 1.2)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_quantized_model_answers_nearly_as_the_plain_one(
    small: SimpleNamespace, shared_llama: Llama, tmp_path: Path, kind: str, bound: float, dtype: str | None
) -> None:
    """Logits, prefilled and step by step; they span +-4. From any number of shards the same to the digit."""
    ids = torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))
    want, found = shared_llama.model.forward(ids, 0), []
    for n in (1, 2, 4):
        folder = write_shards(tmp_path / str(n), small.params, small.weights, n)
        llama = Llama.build(folder, small.tokenizer_path, 64, 3, device="cpu", dtype=dtype, quantize=kind)
        model = llama.model
        assert all(m.packed.kind == ("int8" if n == "output" else kind) for n, m in layers_of(llama).items())
        steps = [model.forward(ids[:, :12], 0), *(model.forward(ids[:, i : i + 1], i) for i in range(12, 20))]
        torch.testing.assert_close(torch.cat(steps, 1), want, atol=bound, rtol=0)
        found.append((model.forward(ids, 0), llama))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[2][0])

    llama = found[0][1]
    again = copy.deepcopy(llama.model)
    assert torch.equal(again.forward(ids, 0), found[0][0])
    again.load_state_dict(shared_llama.model.state_dict())  # quantized anew
    assert again.output.packed.kind == "int8"
    torch.testing.assert_close(again.forward(ids, 0), found[0][0], atol=0 if dtype is None else bound, rtol=0)
    again.float()
    assert again.dtype == torch.float32 and again.layers[0].attention.wo.packed.kind == kind
    torch.testing.assert_close(again.forward(ids, 0), want, atol=bound, rtol=0)
    weights = llama.model.state_dict()
    assert weights.keys() == small.weights.keys()
    torch.testing.assert_close(weights["output.weight"].float(), small.weights["output.weight"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_rank_holds_its_part_of_what_one_rank_holds(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Read from 1 and 4 shards, and from the saved file."""

    def part(name: str, shards: Any, rank: int, ranks: int) -> Quantized:
        monkeypatch.setattr(loading, "model_parallel", lambda: (rank, ranks))
        found = Quantized.cat(list(loading.quantized(name, shards, kind, torch.float32, torch.device("cpu"))))
        (file,) = opened.values()
        width = small.weights[name].shape[1]
        again = loading._saved(name, file, kind, width, torch.float32)
        assert torch.equal(again.q, found.q) and torch.equal(again.dense(), found.dense())
        return found

    folders = [write_shards(tmp_path / str(n), small.params, small.weights, n) for n in (1, 4)]
    saved.save(folders[1], kind)
    opened = saved.open_saved(folders[1], kind)
    assert opened
    for folder, name in itertools.product(folders, ("layers.1.attention.wo.weight", "layers.1.feed_forward.w1.weight")):
        whole = part(name, open_shards(folder), 0, 1)
        for ranks in (2,):
            parts = [part(name, open_shards(folder), rank, ranks) for rank in range(ranks)]
            dim = 1 if "wo" in name else 0
            assert torch.equal(torch.cat([p.q for p in parts], dim), whole.q)
            assert torch.equal(torch.cat([p.dense() for p in parts], dim), whole.dense())


def test_the_demo_models_answers_in_8_bit_are_the_same_from_any_shards_on_1_and_2_ranks(tmp_path: Path) -> None:
    """From the saved file, too. 12 answers of up to 60 ids, some of which hang on little."""
    params = json.loads((DEMO / "params.json").read_text())
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    folders = [write_shards(tmp_path / f"{n}", params, weights, n) for n in (1, 2, 4)]
    kept = write_shards(tmp_path / "kept", params, weights, 2)
    saved.save(kept, "int8")
    for shard in kept.glob("*.pth"):
        shard.unlink()
    worker, out, answers = Path(__file__).with_name("quantized_worker.py"), tmp_path / "out.json", []
    for ranks in (1, 2):
        done = (torchrun if ranks > 1 else lambda _, *where: run(*where))(ranks, worker, out, DEMO_TOKENIZER, *folders, kept)
        assert done.returncode == 0, done.stderr
        answers += json.loads(out.read_text())
    assert all(answer == answers[0] for answer in answers) and len(answers) == 2 * 4
    assert answers[0][0] == "The capital of France is Paris." and len(set(answers[0])) == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_does_not_depend_on_the_others(small: SimpleNamespace, kind: str, dtype: str) -> None:
    """One row, several, and a prompt as a whole; int4's kernels for few and many rows of bfloat16 round differently."""
    llama = Llama.build(small.folder, small.tokenizer_path, 128, 4, device="cpu", dtype=dtype, quantize=kind)
    ids = torch.randint(3, 384, (4, 100), generator=torch.Generator().manual_seed(5))
    same = kind == "int8" or dtype == "float32"
    for inference in (False, True):  # norms have kernels of their own there
        with torch.inference_mode(inference):
            together = llama.model.forward(ids[:, :1], 0)
            for row in range(4):
                alone = llama.model.forward(ids[row : row + 1, :1], 0)[0]
                torch.testing.assert_close(alone, together[row], atol=1e-4 if same else 0.1, rtol=0)


def test_float16_neither_overflows_nor_loses_what_is_small() -> None:
    """Where the sum of products is large before it is scaled; where a row's scale is less than float16's least number."""
    x = random(130, 4096)
    x[:, 7] = 700
    held = quantize(random(64, 4096) * 0.02, "int8")
    want = x.half().double() @ held.dense().double().T
    assert (kernels.Int8(held.to(held.device, torch.float16))(x.half()).double() - want).abs().max() < 0.01 * want.abs().max()
    if kernels.exact_in_8_bits():
        x = random(8, 4096) * 1e-4
        want, kernel = x.half().double() @ held.dense().double().T, kernels.Int8Rows(held.to(held.device, torch.float16))
        assert (kernel(x.half()).double() - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("kind, most", [("int8", 1e-3), ("int4", 0.03)])
def test_quality_on_the_demo_model(kind: str, most: float) -> None:
    """Mean KL divergence from float32 of the next id, over its own answers; benchmarks/quality.py has the whole table."""
    plain = Llama.build(DEMO, DEMO_TOKENIZER, 128, 1, device="cpu", dtype="float32")
    other = Llama.build(DEMO, DEMO_TOKENIZER, 128, 1, device="cpu", dtype="float32", quantize=kind)
    questions = ["What is the capital of France?", "What is 3 + 4?", "Tell me about the sea.", "What do I need to bake bread?"]
    total = torch.zeros(2)
    for question in questions:
        answer = plain.chat_completion([[{"role": "user", "content": question}]], temperature=0)[0]["generation"]["content"]
        tokenizer = plain.tokenizer
        start = tokenizer.encode(f"[INST] {question} [/INST]", bos=True, eos=False)
        ids = torch.tensor([start + tokenizer.encode(answer, bos=False, eos=True)])
        p, q = (llama.model.forward(ids, 0)[0, len(start) - 1 :].log_softmax(-1) for llama in (plain, other))
        total += torch.tensor([(p.exp() * (p - q)).sum().item(), len(p)])
    assert 0 < total[0] / total[1] < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_bytes_counted_are_those_held(tmp_path: Path, tokenizer_path: Path, kind: str, dtype: torch.dtype) -> None:
    params = dict(dim=1024, n_layers=1, n_heads=8, multiple_of=1024, norm_eps=1e-5, vocab_size=-1)
    folder = write_shards(tmp_path, params, random_weights(params, 384, 3072))
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu", dtype=dtype, quantize=kind)
    held = sum(p.nbytes for p in llama.model.parameters())
    for layer in layers_of(llama).values():
        kernel = layer.packed
        weight = kernel.held()
        scales = kernel.scales.nbytes if kernel.kind == "int4" else weight.scale.nbytes
        held += scales + (weight.q.numel() // 2 if kernel.kind == "int4" else weight.q.numel())
    assert memory.weight_bytes(llama.model.params, 1, dtype, kind) == pytest.approx(held, rel=0.01)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["int3", "", 8, True, ["int8"], "INT8"])
def test_other_kinds_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match=r"quantize is .*use 'int8' or 'int4'"):
        Llama.build("nowhere", "nowhere", quantize=bad)
    with pytest.raises(InputError, match=r"use 'int8' or 'int4'"):
        saved.save("nowhere", bad)


def test_what_has_no_kernel_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"no kernel on mps; use quantize='int8'"):
        kernels.check("int4", torch.device("mps"), torch.float32)
    with pytest.raises(DeviceError, match=r"dtype is torch.float16; use dtype='bfloat16'"):
        kernels.check("int4", torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(DeviceError, match=r"capability 8.0, and cuda:0 has 7.5; use quantize='int8'"):
        kernels.check("int4", torch.device("cuda:0"), torch.bfloat16)
    kernels.check("int4", torch.device("cuda"), torch.bfloat16)
    for kind, device in (("int8", "cuda"), ("int8", "mps"), ("int4", "cpu")):
        kernels.check(kind, torch.device(device), torch.float16)
    with pytest.raises(
        DeviceError, match=r"11008 inputs, 1376 on each.* 64 that share.*use quantize='int8', or 1 or 2 or 4 rank"
    ):
        check_width("layers.0.feed_forward.w2", 11008, "int4", 8)
    check_width("layers.0.feed_forward.w2", 11008, "int4", 4)
    check_width("layers.0.feed_forward.w2", 11008, "int8", 8)


def test_int4_is_better_than_the_nearest_number() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    low, high = weight.view(64, -1, 64).aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    nearest = (((weight.view(64, -1, 64) - low) / scale).round() * scale + low).view(64, -1)
    ours = quantize(weight, "int4").dense()
    assert (ours - weight).square().mean() < 0.95 * (nearest - weight).square().mean()


def test_a_row_of_zeros_has_a_scale() -> None:
    assert quantize(torch.zeros(2, 64), "int8").scale.min() > 0


def test_widths_that_are_no_whole_groups(tmp_path: Path, tokenizer_path: Path) -> None:
    """They are filled up on one rank; several cannot divide them."""
    params = {**SMALL, "multiple_of": 8}
    width = ModelArgs(**{**params, "vocab_size": 384}).ffn_width
    assert width % 32
    weights = random_weights(params, 384, width)
    folder = write_shards(tmp_path / "m", params, weights)
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu", dtype="bfloat16", quantize="int4")
    want = quantize(weights["layers.0.feed_forward.w2.weight"], "int4", torch.bfloat16).dense()
    assert torch.equal(llama.model.layers[0].feed_forward.w2.dense(), want)
    with pytest.raises(DeviceError, match=r"or 1 rank\(s\)"):
        check_width("w", 88, "int4", 2)
    args = ModelArgs(dim=128, n_layers=1, n_heads=8, vocab_size=64, multiple_of=256)
    assert args.ffn_width // 8 % 32 == 0
    with pytest.raises(DeviceError, match=r"attention\.wo"):
        memory.check_quantized(args, 8, torch.bfloat16, torch.device("cpu"), "int4")


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_under_a_callers_autocast(kind: str | None, dtype: torch.dtype) -> None:
    """Which gives attention's outputs another dtype than the weights have. Answers are shielded from it."""
    name = str(dtype).removeprefix("torch.")
    model = Llama.build(DEMO, DEMO_TOKENIZER, 64, 1, device="cpu", dtype=name, quantize=kind).model
    for ids in (torch.tensor([[1]]), torch.tensor([[1, 5, 9]]), torch.arange(1, 41)[None]):
        want = model(ids, 0)
        for foreign in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", foreign):
                assert (model(ids, 0) - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("foreign", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_takes_rows_of_another_dtype(dtype: torch.dtype, foreign: torch.dtype, rows: int) -> None:
    kernel = kernels.pack(quantize(random(384, 1024), "int4", dtype))
    x = random(rows, 1024).to(foreign)
    want = x.float() @ kernel.dense().float().t()  # type: ignore[union-attr]
    assert (kernel(x) - want).norm() < 0.02 * want.norm()  # type: ignore[misc]
