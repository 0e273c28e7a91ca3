"""8 and 4 bit weights: each kernel multiplies as the numbers it holds say, wherever they come from."""

import copy
import dataclasses
import functools
import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import DeviceError, InputError, Llama, ModelArgs, Transformer, tuning
from llama.checkpoint import loading, packed_file, resharding
from llama.checkpoint.shards import open_shards
from llama.kernels import blocked_linear, half_precision, int4, int8, packing
from llama.kernels.blocked_linear import BlockedLinear
from llama.kernels.packed_weight import PackedWeight, SharedKernel
from llama.planning import estimate
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight

from .conftest import SMALL
from .support import ROOT, in_whole_rows, random_weights, run, torchrun, write_shards
from .test_kernels import engine_logits, linear_weights

DEMO, DEMO_TOKENIZER = ROOT / "demo/model", ROOT / "demo/tokenizer.model"
DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = (384, 192), (344, 172), (64, 1088), (20, 7)  # the second and the last: no multiple of what kernels need


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With rows of very different size, as trained ones are."""
    g = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


def in_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))


@pytest.mark.parametrize("shape", [*SHAPES, (64, 2304)], ids=str)
def test_quantized_weights_stay_near(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    eight, four = quantize(weight, "int8"), quantize(weight, "int4")
    error = in_groups(eight.dequantize() - weight, eight.group_size).abs()
    assert (error <= 0.76 * eight.scales.unsqueeze(2)).all()  # half a step; and for the largest, as the scale is rounded
    assert in_groups(eight.values, eight.group_size).abs().amax(2).ge(126).all()
    assert four.values.min() == -8 and four.values.max() == 7


def test_an_outlier_coarsens_its_own_group_alone() -> None:
    weight = random(64, 2304)
    with_one = weight.clone()
    with_one[:, 200] = 50
    for kind in ("int8", "int4"):
        before, after = quantize(weight, kind), quantize(with_one, kind)
        others = torch.arange(2304) // before.group_size != 200 // before.group_size
        assert torch.equal(after.dequantize()[:, others], before.dequantize()[:, others])


@pytest.mark.parametrize(("kind", "most"), [("int8", 4.5e-5), ("int4", 0.00665)])
def test_the_squared_error_of_gaussian_weights(kind: str, most: float) -> None:
    """As a share of the weights' own squares. In 4 bit the nearest numbers between the least and the greatest of a group miss
    by 0.0080, and the best shares of that range by 0.0067: least squares do better."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert (quantize(weight, kind).dequantize() - weight).square().mean() < most * weight.square().mean()


def test_weights_of_zero_stay_zero() -> None:
    for kind in ("int8", "int4"):
        held = quantize(torch.zeros(64, 64), kind)
        kernel = packing.pack_weight(held)
        assert (
            kernel
            and held.dequantize().abs().max() < 1e-20
            and kernel(torch.ones(2, 64)).abs().max() < 1e-20
            and not kernel(torch.zeros(1, 64)).any()
        )


def overflows() -> bool:
    """With AVX2 alone oneDNN adds products of 8 bits in 16 bits."""
    most = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most.t()) != 64 * 127 * 127).any())


FORMS = {
    "Int8": ("int8", int8.Int8DequantLinear),
    "Int8Cuda": ("int8", int8.Int8CudaLinear),
    "Int4": ("int4", int4.Int4CpuLinear),
}


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_numbers_held(
    form: str, shape: tuple[int, int], dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the forms that need no C; test_blocks.py has the others. PyTorch's product of 8 bits is the CPU's, too."""
    if form == "Int8Cuda" and overflows():
        pytest.skip("this CPU's product of 8 bits overflows")
    monkeypatch.setattr(tuning, "PIECE_BYTES", 1 << 15)  # so that there are several
    kind, make = FORMS[form]
    weight = random(*shape, dtype=dtype)
    held = in_whole_rows(weight, dtype) if form == "Int8Cuda" else quantize(weight, kind)
    kernel, x = make(held), random(n, shape[1]).to(dtype)
    rows = x.double()
    if form == "Int8Cuda":  # the rows in whole numbers of 15 bits as well, to the digit
        scale = (x.float().abs().amax(1, keepdim=True) / 16256).double()
        rows = (rows / scale).round() * scale
    want = rows @ dataclasses.replace(held, dtype=torch.float64).dequantize().T
    got = kernel(x)
    assert got.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    if form == "Int8Cuda" and dtype == torch.float32:
        tolerance = 3e-5  # a number halfway between two may be rounded otherwise in float32
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
    assert kernel(x.view(1, n, -1)).shape == (1, n, shape[0])
    torch._dynamo.reset()
    compiled = torch.compile(kernel, fullgraph=True, dynamic=False, backend="eager")(x)
    assert compiled.dtype == dtype and (compiled.double() - want).abs().max() <= max(tolerance, 1e-2) * want.abs().max()

    for again in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        back = again.unpack()
        for field in dataclasses.fields(QuantizedWeight):
            a, b = getattr(held, field.name), getattr(back, field.name)
            assert (
                torch.equal(a, b) if isinstance(a, torch.Tensor) and dtype != torch.float16 else field.name != "q" or a.equal(b)
            )


def test_many_rows_are_multiplied_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """int4's two ways, where blocks end within the weight; and the one that is left where blocks cannot be read."""
    kernel, x = (
        int4.Int4CpuLinear(quantize(random(200, 192, dtype=torch.bfloat16), "int4")),
        random(7, 192, dtype=torch.bfloat16),
    )
    few, by_pieces, unpacked = kernel(x), half_precision.linear_in_pieces, []
    monkeypatch.setattr(half_precision, "linear_in_pieces", lambda x, *rest: (unpacked.append(len(x)), by_pieces(x, *rest))[1])
    monkeypatch.setattr(tuning, "INT4_CPU_MAX_ROWS", 0)
    monkeypatch.setattr(tuning, "PIECE_BYTES", 192 * 64 * 2)
    torch.testing.assert_close(kernel(x), few, atol=0.05, rtol=0.02)
    assert unpacked == ([7] if int4._half_block_outputs() else [])
    monkeypatch.setattr(int4, "_half_block_outputs", lambda: None)
    assert torch.equal(kernel(x), few)


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


def shared_kernels(model: Transformer) -> list[SharedKernel]:
    """Each one once; all matrices but the embedding must be parts of them."""
    weights = linear_weights(model)
    assert weights and all(isinstance(weight, PackedWeight) for weight in weights)
    return list({id(weight.shared): weight.shared for weight in weights if isinstance(weight, PackedWeight)}.values())


def kinds(model: Transformer) -> set[tuple[bool, str | None]]:
    """Of all matrices: whether it is the output layer's, and what its kernel multiplies."""
    return {(shared.logits, shared.kernel.format) for shared in shared_kernels(model)}


@pytest.mark.parametrize("kind, bound", [("int8", 0.15), ("int4", 1.2)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_quantized_model_answers_nearly_as_the_plain_one(
    small: SimpleNamespace, shared_llama: Llama, tmp_path: Path, kind: str, bound: float, dtype: str | None
) -> None:
    """Logits, the engine's and the model's own, prefilled and step by step; they span +-4. From any number of shards the same
    to the digit."""
    ids = torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))
    want, found = shared_llama.model.forward(ids, 0), []
    for n in (1, 2, 4):
        folder = write_shards(tmp_path / str(n), small.params, small.weights, n)
        llama = Llama.build(folder, small.tokenizer_path, 64, 3, device="cpu", dtype=dtype, quantize=kind)
        model = llama.model
        assert kinds(model) == {(True, "int8"), (False, kind)}
        for logits in (functools.partial(engine_logits, llama.engine.forward()), model.forward):
            steps = [logits(ids[:, :12], 0), *(logits(ids[:, i : i + 1], i) for i in range(12, 20))]
            torch.testing.assert_close(torch.cat(steps, 1), want, atol=bound, rtol=0)
            found.append(logits(ids, 0))
    for i, logits in enumerate(found):
        assert torch.equal(logits, found[i % 2])

    again = copy.deepcopy(model)
    assert torch.equal(again.forward(ids, 0), found[1])
    again.load_state_dict(shared_llama.model.state_dict())  # quantized anew
    assert kinds(again) == kinds(model)
    torch.testing.assert_close(again.forward(ids, 0), found[1], atol=0 if dtype is None else bound, rtol=0)
    again.to(torch.float64)
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float64 for p in again.parameters())  # what they stand for
    torch.testing.assert_close(again.forward(ids, 0), want, atol=bound, rtol=0)
    weights = model.state_dict()
    assert weights.keys() == small.weights.keys()
    torch.testing.assert_close(weights["output.weight"].float(), small.weights["output.weight"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_part_of_a_row_of_a_single_group_is_multiplied(kind: str) -> None:
    held, x = quantize(random(64, 32), kind), random(3, 16)
    kernel = packing.pack_weight(held.slice_inputs(8, 24))
    assert kernel and torch.equal(kernel.dequantize(), held.dequantize()[:, 8:24])
    torch.testing.assert_close(kernel(x), x @ held.dequantize()[:, 8:24].T, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_rank_holds_its_part_of_what_one_rank_holds(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ranks: int
) -> None:
    """Read from 1 and 4 shards; of wo's 64 inputs four ranks have half a group each."""

    def part(name: str, folder: Path, rank: int, ranks: int) -> torch.Tensor:
        for module in (loading, resharding):
            monkeypatch.setattr(module, "model_parallel", lambda: (rank, ranks))
        found = loading.quantize_rank_part(name, open_shards(folder), kind, torch.float32, torch.device("cpu"))
        kernel = packing.pack_weight(QuantizedWeight.cat(list(found)))
        assert kernel
        return kernel.dequantize()

    for n, name in itertools.product((1, 4), ("layers.1.attention.wo.weight", "layers.1.feed_forward.w1.weight")):
        folder = write_shards(tmp_path / str(n), small.params, small.weights, n)
        parts = [part(name, folder, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts, 1 if "wo" in name else 0), quantize(small.weights[name], kind).dequantize())


def test_the_demo_models_answers_in_8_bit_are_the_same_from_any_shards_on_1_and_2_ranks(tmp_path: Path) -> None:
    """From the saved file, too. 12 answers of up to 60 ids, some of which hang on little."""
    params = json.loads((DEMO / "params.json").read_text())
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    folders = [write_shards(tmp_path / f"{n}", params, weights, n) for n in (1, 2, 4)]
    kept = write_shards(tmp_path / "kept", params, weights, 2)
    packed_file.save_packed_file(kept, "int8")
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
    """The engine's, and those of the model's own forward. PyTorch's int4 for few and many rows of bfloat16 rounds differently.
    In float32, attention of several rows differs in the last bit, and that bit may round an activation to the next of its
    16-bit values."""
    llama = Llama.build(small.folder, small.tokenizer_path, 128, 4, device="cpu", dtype=dtype, quantize=kind)
    ids = torch.randint(3, 384, (4, 100), generator=torch.Generator().manual_seed(5))
    same = kind == "int8" or dtype == "float32" or blocked_linear.extension_for(kind)
    forwards = functools.partial(engine_logits, llama.engine.forward()), llama.model.forward
    for logits, inference in itertools.product(forwards, (False, True)):  # norms have kernels of their own there
        with torch.inference_mode(inference):
            together = logits(ids[:, :1], 0)
            for row in range(4):
                alone = logits(ids[row : row + 1, :1], 0)[0]
                torch.testing.assert_close(alone, together[row], atol=5e-4 if same else 0.1, rtol=0)


def test_float16_neither_overflows_nor_loses_what_is_small() -> None:
    """Where the sum of products is large before it is scaled; where a row's scale is less than float16's least number."""
    x = random(130, 4096)
    x[:, 7] = 700
    held = quantize(random(64, 4096) * 0.02, "int8")
    want = x.half().double() @ held.dequantize().double().T
    assert (
        int8.Int8DequantLinear(held.to(held.device, torch.float16))(x.half()).double() - want
    ).abs().max() < 0.01 * want.abs().max()
    x = random(8, 4096) * 1e-4
    want, kernel = x.half().double() @ held.dequantize().double().T, packing.pack_weight(held.to(held.device, torch.float16))
    assert kernel and (kernel(x.half()).double() - want).norm() < 0.03 * want.norm()


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
    held = sum(p.nbytes for p in llama.model.parameters() if not isinstance(p, PackedWeight))
    for kernel in (shared.kernel for shared in shared_kernels(llama.model)):
        weight = kernel.unpack()
        assert isinstance(weight, QuantizedWeight)
        if isinstance(kernel, BlockedLinear):
            held += sum(part.nbytes for part in (kernel.blocks.weight, kernel.blocks.scales) if part is not None)
        else:
            numbers = weight.values.numel() // 2 if kernel.format == "int4" else weight.values.numel()
            held += numbers + sum(part.nbytes for part in (weight.scales, weight.zeros) if part is not None)
    assert estimate.weight_bytes(llama.model.params, 1, dtype, kind) == pytest.approx(held, rel=0.01)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["int3", "", 8, True, ["int8"], "INT8"])
def test_other_kinds_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match=r"quantize is .*use 'int8' or 'int4'"):
        Llama.build("nowhere", "nowhere", quantize=bad)
    with pytest.raises(InputError, match=r"kind to save is .*one of 'bfloat16', 'int8', 'int4'"):
        packed_file.save_packed_file("nowhere", bad)


def test_what_has_no_kernel_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"no kernel on mps; use quantize='int8'"):
        packing.check_kernel("int4", torch.device("mps"), torch.float32)
    with pytest.raises(DeviceError, match=r"dtype is torch.float16; use dtype='bfloat16'"):
        packing.check_kernel("int4", torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(DeviceError, match=r"capability 8.0, and cuda:0 has 7.5; use quantize='int8'"):
        packing.check_kernel("int4", torch.device("cuda:0"), torch.bfloat16)
    packing.check_kernel("int4", torch.device("cuda"), torch.bfloat16)
    for kind, device in (("int8", "cuda"), ("int8", "mps"), ("int4", "cpu")):
        packing.check_kernel(kind, torch.device(device), torch.float16)


def test_a_row_of_zeros_has_a_scale() -> None:
    assert quantize(torch.zeros(2, 64), "int8").scales.min() > 0


def test_widths_that_are_no_whole_groups(tmp_path: Path, tokenizer_path: Path) -> None:
    """They are filled up."""
    params = {**SMALL, "multiple_of": 8}
    width = ModelArgs(**{**params, "vocab_size": 384}).ffn_width
    assert width % 32
    weights = random_weights(params, 384, width)
    folder = write_shards(tmp_path / "m", params, weights)
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu", dtype="bfloat16", quantize="int4")
    want = quantize(weights["layers.0.feed_forward.w2.weight"], "int4", torch.bfloat16).dequantize()
    assert torch.equal(llama.model.layers[0].feed_forward.w2.weight, want)


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
    kernel = packing.pack_weight(quantize(random(384, 1024), "int4", dtype))
    x = random(rows, 1024).to(foreign)
    want = x.float() @ kernel.dequantize().float().t()  # type: ignore[union-attr]
    assert (kernel(x) - want).norm() < 0.02 * want.norm()  # type: ignore[misc]
