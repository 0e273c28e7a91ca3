"""Test quantization to int8 and int4: accuracy, kernels, sharding, whole models, memory, and refused arguments."""

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

from llama import DeviceError, InputError, Llama, ModelArgs, Transformer, compat, tuning
from llama.checkpoint import loading, packed_file, resharding
from llama.checkpoint.shards import open_shards, split_dim
from llama.kernels import blocked_linear, half_precision, int4, int8, packing
from llama.kernels.blocked_linear import BlockedLinear
from llama.kernels.packed_weight import PackedWeight, SharedKernel
from llama.planning import estimate
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight

from .conftest import SMALL
from .support import ROOT, quantize_int8_per_row, random_weights, run, torchrun, write_shards
from .test_kernels import engine_logits, linear_weights

DEMO, DEMO_TOKENIZER = ROOT / "demo/model", ROOT / "demo/tokenizer.model"
DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = (384, 192), (344, 172), (64, 1088), (20, 7)  # 344 x 172 and 20 x 7 are not multiples of the kernels' block sizes


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a random matrix whose rows differ in scale, as rows of trained weights do."""
    g = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


def in_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))


@pytest.mark.parametrize("shape", [*SHAPES, (64, 2304)], ids=str)
def test_int8_errors_stay_within_one_step_and_both_formats_use_their_full_range(shape: tuple[int, int]) -> None:
    """Allow an int8 value an error of half a step, because the value is rounded, plus a quarter step, because the scale is."""
    weight = random(*shape)
    int8_weight, int4_weight = quantize(weight, "int8"), quantize(weight, "int4")
    error = in_groups(int8_weight.dequantize() - weight, int8_weight.group_size).abs()
    assert (error <= 0.76 * int8_weight.scales.unsqueeze(2)).all()
    assert in_groups(int8_weight.values, int8_weight.group_size).abs().amax(2).ge(126).all()
    assert int4_weight.values.min() == -8 and int4_weight.values.max() == 7


def test_an_outlier_changes_the_values_of_its_own_group_only() -> None:
    weight = random(64, 2304)
    with_outlier = weight.clone()
    with_outlier[:, 200] = 50
    for format in ("int8", "int4"):
        before, after = quantize(weight, format), quantize(with_outlier, format)
        other_groups = torch.arange(2304) // before.group_size != 200 // before.group_size
        assert torch.equal(after.dequantize()[:, other_groups], before.dequantize()[:, other_groups])


@pytest.mark.parametrize(("format", "max_error"), [("int8", 4.5e-5), ("int4", 0.00665)])
def test_the_squared_error_of_gaussian_weights_is_that_of_least_squares(format: str, max_error: float) -> None:
    """Divide the mean squared error by the mean square of the weights. For int4 this ratio must stay below 0.00665. The ratio
    would be 0.0080 if each group were rounded between its minimum and maximum, and 0.0067 with the best fixed fraction of that
    range."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert (quantize(weight, format).dequantize() - weight).square().mean() < max_error * weight.square().mean()


def test_weights_of_zero_stay_zero() -> None:
    for format in ("int8", "int4"):
        zeros = quantize(torch.zeros(64, 64), format)
        kernel = packing.pack_weight(zeros)
        assert kernel
        assert zeros.dequantize().abs().max() < 1e-20
        assert kernel(torch.ones(2, 64)).abs().max() < 1e-20
        assert not kernel(torch.zeros(1, 64)).any()


def int8_matmul_overflows() -> bool:
    """Return True if the 8-bit matrix product overflows on this CPU. On a CPU with AVX2 and nothing newer, oneDNN adds 8-bit
    products in 16 bits."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((compat.int8_matmul(largest, largest.t()) != 64 * 127 * 127).any())


KERNELS = {
    "Int8": ("int8", int8.Int8DequantLinear),
    "Int8Cuda": ("int8", int8.Int8CudaLinear),
    "Int4": ("int4", int4.Int4CpuLinear),
}


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel_name", KERNELS)
def test_kernels_multiply_by_the_dequantized_weight(
    kernel_name: str, shape: tuple[int, int], dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test the kernels that need no compiled C. One of them is Int8CudaLinear, which runs on the CPU in this test. Each kernel
    must also work under torch.compile, and keep its weight when it is copied or pickled. test_blocked_linear.py tests the
    compiled kernels."""
    if kernel_name == "Int8Cuda" and int8_matmul_overflows():
        pytest.skip("this CPU's 8-bit matrix product overflows")
    monkeypatch.setattr(tuning, "PIECE_BYTES", 1 << 15)  # divide each weight into several pieces
    format, kernel_class = KERNELS[kernel_name]
    weight = random(*shape, dtype=dtype)
    quantized = quantize_int8_per_row(weight, dtype) if kernel_name == "Int8Cuda" else quantize(weight, format)
    kernel, x = kernel_class(quantized), random(n, shape[1]).to(dtype)
    rows = x.double()
    if kernel_name == "Int8Cuda":  # Int8CudaLinear rounds each row of x to integers of 15 bits
        scale = (x.float().abs().amax(1, keepdim=True) / 16256).double()
        rows = (rows / scale).round() * scale
    want = rows @ dataclasses.replace(quantized, dtype=torch.float64).dequantize().T
    got = kernel(x)
    assert got.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    if kernel_name == "Int8Cuda" and dtype == torch.float32:
        tolerance = 3e-5  # near the middle between two integers, float32 and float64 may round differently
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
    assert kernel(x.view(1, n, -1)).shape == (1, n, shape[0])
    torch.compiler.reset()
    compiled = torch.compile(kernel, fullgraph=True, dynamic=False, backend="eager")(x)
    assert compiled.dtype == dtype and (compiled.double() - want).abs().max() <= max(tolerance, 1e-2) * want.abs().max()

    for duplicate in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        unpacked = duplicate.unpack()
        assert torch.equal(unpacked.values, quantized.values)
        # Kernels in float16 round the scales, so unpacking does not give the exact scales back.
        for field in dataclasses.fields(QuantizedWeight) if dtype != torch.float16 else ():
            a, b = getattr(quantized, field.name), getattr(unpacked, field.name)
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), field.name


def test_int4_products_of_many_rows_equal_those_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many rows, the int4 CPU kernel unpacks its weight in pieces. If PyTorch packs weights in an unknown layout, PyTorch's
    own kernel multiplies any number of rows."""
    kernel = int4.Int4CpuLinear(quantize(random(200, 192, dtype=torch.bfloat16), "int4"))
    x = random(7, 192, dtype=torch.bfloat16)
    want, linear_in_pieces, n_unpacked = kernel(x), half_precision.linear_in_pieces, []
    monkeypatch.setattr(
        half_precision, "linear_in_pieces", lambda x, *rest: (n_unpacked.append(len(x)), linear_in_pieces(x, *rest))[1]
    )
    monkeypatch.setattr(tuning, "INT4_CPU_MAX_ROWS", 0)
    monkeypatch.setattr(tuning, "PIECE_BYTES", 192 * 64 * 2)
    torch.testing.assert_close(kernel(x), want, atol=0.05, rtol=0.02)
    assert n_unpacked == ([7] if int4._half_block_outputs() else [])
    monkeypatch.setattr(int4, "_half_block_outputs", lambda: None)
    assert torch.equal(kernel(x), want)


def pack_as_cuda_does(q: torch.Tensor, tiles: int) -> torch.Tensor:
    """Pack 4-bit values in the layout of PyTorch's CUDA kernel `matrix_to_m16n8k16_Bint4_layout`, which stores the values for
    each of 32 threads next to each other."""
    u = (q + 8).tolist()
    blocks = torch.zeros(len(u) // 8, len(u[0]) // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for n, k, thread, pair in itertools.product(*map(range, blocks.shape)):
        first = (k * tiles + 2 * pair) * 16 + thread % 4 * 2
        values = [u[8 * n + thread // 4][first + i] for i in (0, 1, 8, 9, 16, 17, 24, 25)]
        blocks[n, k, thread, pair] = sum(values[v] << 4 * i for i, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return torch.where(blocks >= 2**31, blocks - 2**32, blocks).to(torch.int32)


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_int4_weights_packed_on_a_gpu_are_unpacked(tiles: int) -> None:
    q = torch.randint(-8, 8, (16, 16 * tiles * 3), dtype=torch.int8)
    assert torch.equal(int4._unpack_int4_cuda(pack_as_cuda_does(q, tiles), torch.bfloat16), q.bfloat16())


def shared_kernels(model: Transformer) -> list[SharedKernel]:
    """Return the distinct shared kernels of a model. Fail unless all matrices of the model, except the embedding, are
    packed."""
    weights = linear_weights(model)
    assert weights and all(isinstance(weight, PackedWeight) for weight in weights)
    return list({id(weight.shared): weight.shared for weight in weights if isinstance(weight, PackedWeight)}.values())


def formats(model: Transformer) -> set[tuple[bool, str | None]]:
    """Return a set with one pair for each matrix of a model except the embedding: whether the matrix is the output layer, and
    its format, which is None if it is not quantized."""
    return {(shared.computes_logits, shared.kernel.format) for shared in shared_kernels(model)}


@pytest.mark.parametrize("format, bound", [("int8", 0.15), ("int4", 1.2)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_quantized_models_logits_are_close_to_float32_and_identical_from_any_number_of_shards(
    small: SimpleNamespace, shared_llama: Llama, tmp_path: Path, format: str, bound: float, dtype: str | None
) -> None:
    """Compare the logits of the engine and of the model's own forward with float32, in prefill and in decode steps. Logits
    range from about -4 to 4. Copies keep the quantized weights, `load_state_dict` quantizes new weights, and a change of the
    model's dtype dequantizes all weights."""
    tokens = torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))
    want, whole_logits = shared_llama.model.forward(tokens, 0), []
    for n in (1, 2, 4):
        folder = write_shards(tmp_path / str(n), small.params, small.weights, n)
        llama = Llama.build(folder, small.tokenizer_path, 64, 3, device="cpu", dtype=dtype, quantize=format)
        model = llama.model
        assert formats(model) == {(True, "int8"), (False, format)}
        for logits in (functools.partial(engine_logits, llama.engine.forward()), model.forward):
            steps = [logits(tokens[:, :12], 0), *(logits(tokens[:, i : i + 1], i) for i in range(12, 20))]
            torch.testing.assert_close(torch.cat(steps, 1), want, atol=bound, rtol=0)
            whole_logits.append(logits(tokens, 0))
    for i, logits in enumerate(whole_logits):
        assert torch.equal(logits, whole_logits[i % 2])

    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate.forward(tokens, 0), whole_logits[1])
    duplicate.load_state_dict(shared_llama.model.state_dict())
    assert formats(duplicate) == formats(model)
    torch.testing.assert_close(duplicate.forward(tokens, 0), whole_logits[1], atol=0 if dtype is None else bound, rtol=0)
    duplicate.to(torch.float64)
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float64 for p in duplicate.parameters())
    torch.testing.assert_close(duplicate.forward(tokens, 0), want, atol=bound, rtol=0)
    weights = model.state_dict()
    assert weights.keys() == small.weights.keys()
    torch.testing.assert_close(weights["output.weight"].float(), small.weights["output.weight"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_slice_of_inputs_inside_one_group_is_packed_and_multiplied(format: str) -> None:
    quantized, x = quantize(random(64, 32), format), random(3, 16)
    kernel = packing.pack_weight(quantized.slice_inputs(8, 24))
    assert kernel and torch.equal(kernel.dequantize(), quantized.dequantize()[:, 8:24])
    torch.testing.assert_close(kernel(x), x @ quantized.dequantize()[:, 8:24].T, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_each_ranks_part_equals_that_part_of_the_weight_quantized_on_one_rank(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, ranks: int
) -> None:
    """Read weights from 1 and from 4 shards. On four ranks, each rank has 16 of the 64 inputs of wo: only half of the
    inputs that share a scale."""

    def part(name: str, folder: Path, rank: int, ranks: int) -> torch.Tensor:
        for module in (loading, resharding):
            monkeypatch.setattr(module, "model_parallel", lambda: (rank, ranks))
        shards = open_shards(folder)
        read = resharding.shard_parts if split_dim(name) == 1 else resharding.rank_views
        weights = loading.quantize_rank_part(name, read(name, shards), shards, format, torch.float32, torch.device("cpu"))
        kernel = packing.pack_weight(QuantizedWeight.cat(list(weights)))
        assert kernel
        return kernel.dequantize()

    for n, name in itertools.product((1, 4), ("layers.1.attention.wo.weight", "layers.1.feed_forward.w1.weight")):
        folder = write_shards(tmp_path / str(n), small.params, small.weights, n)
        parts = [part(name, folder, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts, 1 if "wo" in name else 0), quantize(small.weights[name], format).dequantize())


def test_the_demo_models_int8_answers_are_the_same_from_any_shards_on_1_and_2_ranks(tmp_path: Path) -> None:
    """Load the weights from 1, 2 and 4 shards, and from int8.safetensors alone. Compare 12 answers of up to 60 tokens. Some of
    the answers would change if the logits differed even slightly."""
    params = json.loads((DEMO / "params.json").read_text())
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    folders = [write_shards(tmp_path / f"{n}", params, weights, n) for n in (1, 2, 4)]
    packed_only = write_shards(tmp_path / "packed", params, weights, 2)
    packed_file.save_packed_file(packed_only, "int8")
    for shard in packed_only.glob("*.pth"):
        shard.unlink()
    worker, out, answers = Path(__file__).with_name("quantized_worker.py"), tmp_path / "out.json", []
    for ranks in (1, 2):
        done = (torchrun if ranks > 1 else lambda _, *arguments: run(*arguments))(
            ranks, worker, out, DEMO_TOKENIZER, *folders, packed_only
        )
        assert done.returncode == 0, done.stderr
        answers += json.loads(out.read_text())
    assert all(answer == answers[0] for answer in answers) and len(answers) == 2 * 4
    assert answers[0][0] == "The capital of France is Paris." and len(set(answers[0])) == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_rows_logits_do_not_depend_on_other_rows(small: SimpleNamespace, format: str, dtype: str) -> None:
    """Test the engine and the model's own forward. Logits may differ slightly for two reasons. In bfloat16, PyTorch's int4
    kernel rounds differently for few and for many rows. In float32, attention of several rows and of one row may differ in the
    last bit, which may change how an activation is rounded to 16 bits."""
    llama = Llama.build(small.folder, small.tokenizer_path, 128, 4, device="cpu", dtype=dtype, quantize=format)
    tokens = torch.randint(3, 384, (4, 100), generator=torch.Generator().manual_seed(5))
    exact_rows = format == "int8" or dtype == "float32" or blocked_linear.extension_for(format)
    forwards = functools.partial(engine_logits, llama.engine.forward()), llama.model.forward
    for logits, inference in itertools.product(forwards, (False, True)):  # norms use other kernels in inference mode
        with torch.inference_mode(inference):
            together = logits(tokens[:, :1], 0)
            for row in range(4):
                alone = logits(tokens[row : row + 1, :1], 0)[0]
                torch.testing.assert_close(alone, together[row], atol=5e-4 if exact_rows else 0.1, rtol=0)


def test_int8_products_in_float16_neither_overflow_nor_underflow() -> None:
    """Test sums that are large before they are scaled, and rows of x whose scale is below the smallest positive float16
    value."""
    quantized = quantize(random(64, 4096) * 0.02, "int8")
    weight, in_float16 = quantized.dequantize().double(), quantized.to(quantized.device, torch.float16)
    x = random(130, 4096)
    x[:, 7] = 700
    want = x.half().double() @ weight.T
    assert (int8.Int8DequantLinear(in_float16)(x.half()).double() - want).abs().max() < 0.01 * want.abs().max()
    x = random(8, 4096) * 1e-4
    want, kernel = x.half().double() @ weight.T, packing.pack_weight(in_float16)
    assert kernel and (kernel(x.half()).double() - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("format, max_divergence", [("int8", 1e-3), ("int4", 0.03)])
def test_the_quantized_demo_model_predicts_nearly_the_float32_distribution(format: str, max_divergence: float) -> None:
    """Compute the mean KL divergence between the next-token probabilities of the float32 model and of the quantized model, over
    answers of the float32 model. benchmarks/quality.py measures more models and formats."""
    float32 = Llama.build(DEMO, DEMO_TOKENIZER, 128, 1, device="cpu", dtype="float32")
    quantized = Llama.build(DEMO, DEMO_TOKENIZER, 128, 1, device="cpu", dtype="float32", quantize=format)
    questions = ["What is the capital of France?", "What is 3 + 4?", "Tell me about the sea.", "What do I need to bake bread?"]
    total = torch.zeros(2)
    for question in questions:
        answer = float32.chat_completion([[{"role": "user", "content": question}]], temperature=0)[0]["generation"]["content"]
        tokenizer = float32.tokenizer
        start = tokenizer.encode(f"[INST] {question} [/INST]", bos=True, eos=False)
        tokens = torch.tensor([start + tokenizer.encode(answer, bos=False, eos=True)])
        p, q = (llama.model.forward(tokens, 0)[0, len(start) - 1 :].log_softmax(-1) for llama in (float32, quantized))
        total += torch.tensor([(p.exp() * (p - q)).sum().item(), len(p)])
    assert 0 < total[0] / total[1] < max_divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_estimated_bytes_of_quantized_weights_are_those_of_a_real_model(
    tmp_path: Path, tokenizer_path: Path, format: str, dtype: torch.dtype
) -> None:
    params = dict(dim=1024, n_layers=1, n_heads=8, multiple_of=1024, norm_eps=1e-5, vocab_size=-1)
    folder = write_shards(tmp_path, params, random_weights(params, 384, 3072))
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu", dtype=dtype, quantize=format)
    total = sum(p.nbytes for p in llama.model.parameters() if not isinstance(p, PackedWeight))
    for kernel in (shared.kernel for shared in shared_kernels(llama.model)):
        weight = kernel.unpack()
        assert isinstance(weight, QuantizedWeight)
        if isinstance(kernel, BlockedLinear):
            total += sum(part.nbytes for part in (kernel.blocks.weight, kernel.blocks.scales) if part is not None)
        else:
            value_bytes = weight.values.numel() // 2 if kernel.format == "int4" else weight.values.numel()
            total += value_bytes + sum(part.nbytes for part in (weight.scales, weight.zeros) if part is not None)
    assert estimate.weight_bytes(llama.model.params, 1, dtype, format) == pytest.approx(total, rel=0.01)


# --- refused arguments, special shapes and dtypes ---


@pytest.mark.parametrize("bad", ["int3", "", 8, True, ["int8"], "INT8"])
def test_unknown_formats_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match=r"quantize is .*use 'int8' or 'int4'"):
        Llama.build("nowhere", "nowhere", quantize=bad)
    with pytest.raises(InputError, match=r"format is .*one of 'bfloat16', 'int8', 'int4'"):
        packed_file.save_packed_file("nowhere", bad)


def test_the_error_for_a_format_without_a_kernel_names_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"no kernel on mps; use quantize='int8'"):
        packing.check_kernel("int4", torch.device("mps"), torch.float32)
    with pytest.raises(DeviceError, match=r"dtype is torch.float16; use dtype='bfloat16'"):
        packing.check_kernel("int4", torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(DeviceError, match=r"capability 8.0 or higher, and cuda:0 has 7.5; use quantize='int8'"):
        packing.check_kernel("int4", torch.device("cuda:0"), torch.bfloat16)
    packing.check_kernel("int4", torch.device("cuda"), torch.bfloat16)
    for format, device in (("int8", "cuda"), ("int8", "mps"), ("int4", "cpu")):
        packing.check_kernel(format, torch.device(device), torch.float16)


def test_a_row_of_zeros_has_a_scale_above_zero() -> None:
    assert quantize(torch.zeros(2, 64), "int8").scales.min() > 0


def test_int4_weights_whose_width_is_no_multiple_of_the_group_are_padded(tmp_path: Path, tokenizer_path: Path) -> None:
    params = {**SMALL, "multiple_of": 8}
    width = ModelArgs(**{**params, "vocab_size": 384}).ffn_width
    assert width % 32
    weights = random_weights(params, 384, width)
    folder = write_shards(tmp_path / "m", params, weights)
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu", dtype="bfloat16", quantize="int4")
    want = quantize(weights["layers.0.feed_forward.w2.weight"], "int4", torch.bfloat16).dequantize()
    assert torch.equal(llama.model.layers[0].feed_forward.w2.weight, want)


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_works_under_autocast(format: str | None, dtype: torch.dtype) -> None:
    """Run `forward` under autocast, where the outputs of attention have another dtype than the weights."""
    name = str(dtype).removeprefix("torch.")
    model = Llama.build(DEMO, DEMO_TOKENIZER, 64, 1, device="cpu", dtype=name, quantize=format).model
    for tokens in (torch.tensor([[1]]), torch.tensor([[1, 5, 9]]), torch.arange(1, 41)[None]):
        want = model(tokens, 0)
        for autocast_dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", autocast_dtype):
                assert (model(tokens, 0) - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_kernels_multiply_inputs_of_another_dtype(dtype: torch.dtype, x_dtype: torch.dtype, rows: int) -> None:
    kernel = packing.pack_weight(quantize(random(384, 1024), "int4", dtype))
    x = random(rows, 1024).to(x_dtype)
    want = x.float() @ kernel.dequantize().float().t()  # type: ignore[union-attr]
    assert (kernel(x) - want).norm() < 0.02 * want.norm()  # type: ignore[misc]
