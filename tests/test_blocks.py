"""Weights in blocks: our own C multiplies them as a few lines of PyTorch do, and packs them as quantize.py does."""

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from llama import tuning
from llama.kernels import avx2, avx512, half_precision, int4, int8, onednn, pack, packing
from llama.kernels.blocked_linear import ACTIVATION_GROUP, BlockedLinear, BlockedWeight
from llama.kernels.c_extension import CExtension
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight, group_size

from .support import in_whole_rows, no_extension

packs = pytest.mark.skipif(pack.extension() is None, reason="pack.c is not compiled, or this CPU has no AVX2")
DTYPES = torch.bfloat16, torch.float16, torch.float32
HALF_A_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # by which a result is rounded at most
ROWS = 1, 2, 3, 4, 5, 16, 130
LIBRARIES = {"AVX-512": avx512.extension(), "AVX2": avx2.extension()}


class Way(NamedTuple):
    """A kind of weight, the dtype and the digits of the rows that multiply it, and what does, whichever llama would take."""

    library: str
    kind: str
    dtype: torch.dtype
    digits: int

    def found(self) -> CExtension:
        found = LIBRARIES[self.library]
        if found is None or pack.extension() is None:
            pytest.skip(f"no compiled products by {self.library} here")
        return found

    def kernel(self, made: BlockedWeight) -> BlockedLinear:
        found = self.found()
        kernel = BlockedLinear(made, self.dtype)
        kernel.library, kernel.digits = found, self.digits
        if self.digits == 2:
            kernel.use_highest_precision()
        return kernel

    def held(self, weight: torch.Tensor) -> tuple[BlockedLinear, torch.Tensor]:
        """Return the weight in blocks, and its dequantized values in float64."""
        self.found()
        if self.kind == "bfloat16":
            return self.kernel(
                BlockedWeight.from_rows(self.kind, [weight.bfloat16()], ACTIVATION_GROUP)
            ), weight.bfloat16().double()
        held = quantize(weight, self.kind, self.dtype)
        return self.kernel(BlockedWeight.from_quantized(held)), dataclasses.replace(held, dtype=torch.float64).dequantize()

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Rows as the kernel multiplies them."""
        return x.double() if self.kind == "bfloat16" else in_8_bits(x, self.digits)


QUANTIZED = [Way(*way) for way in itertools.product(LIBRARIES, ("int8", "int4"), DTYPES, (1, 2))]
WAYS = [Way("AVX-512", "bfloat16", torch.bfloat16, 1), *QUANTIZED]
NAMES = {way: f"{way.kind} {str(way.dtype)[6:]} {way.digits} digit(s) {way.library}" for way in WAYS}
every_way = pytest.mark.parametrize("way", WAYS, ids=NAMES.get)
quantized_ways = pytest.mark.parametrize("way", QUANTIZED, ids=NAMES.get)
# Outputs and inputs that are no whole blocks and no whole groups, and rows of wider groups.
SHAPES = (64, 64), (100, 192), (37, 40), (129, 2304)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def in_8_bits(x: torch.Tensor, digits: int = 1, group: int = ACTIVATION_GROUP) -> torch.Tensor:
    """Rows as the kernels see them: whole numbers of 8 bits times a scale that each `group` neighbours share; the second
    digit is what the first one leaves, in the same way."""
    groups = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    seen = torch.zeros_like(groups, dtype=torch.float64)
    for _ in range(digits):
        scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-30) / 127
        whole = (groups * scale.reciprocal()).round()
        seen += whole.double() * scale.double()
        groups = groups - whole * scale
    return seen.flatten(1)[:, : x.shape[1]]


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, least: float = 1e-7) -> None:
    """y is x @ weight.T, but for float32 sums and one rounding to y's dtype."""
    want, sums = x @ weight.T, x.abs() @ weight.abs().T
    most = 1e-6 * sums + 1.01 * HALF_A_STEP[y.dtype] * want.abs() + least
    excess = ((y.double() - want).abs() - most).max().item()
    assert excess <= 0


# --- products ----------------------------------------------------------------------------------------------------------


@every_way
def test_products_are_those_of_rounded_rows_and_dequantized_weights(way: Way) -> None:
    for out, width in SHAPES:
        kernel, weight = way.held(random(out, width))
        for n in ROWS:
            x = random(n, width, seed=1).to(way.dtype)
            y = kernel(x)
            assert y.dtype == (torch.float32 if way.digits == 2 else way.dtype)
            assert_product(y, way.seen(x), weight)


@quantized_ways
def test_products_of_small_and_large_rows(way: Way) -> None:
    kernel, weight = way.held(random(100, 192))
    for scale in (1e-3, 1e3) if way.dtype == torch.float16 else (1e-20, 1e-3, 1e3, 1e20):
        x = (random(5, 192, seed=1) * scale).to(way.dtype)
        assert_product(kernel(x), way.seen(x), weight, least=1e-7 * scale)


@every_way
def test_a_row_is_the_same_to_the_bit_whatever_rows_stand_beside_it(way: Way, threads: int) -> None:
    kernel, _ = way.held(random(200, 320))
    x = random(135, 320, seed=1).to(way.dtype)
    together = kernel(x)
    for n in (1, 2, 3, 4, 5, 6, 7, 9, 64):
        assert torch.equal(torch.cat([kernel(rows) for rows in x.split(n)]), together), n
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(kernel(x[order]), together[order])


@every_way
def test_nan_and_infinity_make_their_own_row_not_finite_and_no_other(way: Way) -> None:
    kernel, _ = way.held(random(100, 192))
    x = random(7, 192, seed=1).to(way.dtype)
    clean = kernel(x)
    x[1, 7], x[3, 9], x[4, 191] = float("nan"), float("inf"), float("-inf")
    y = kernel(x)
    assert y[1].isnan().all() and not y[[1, 3, 4]].isfinite().any()
    assert torch.equal(y[[0, 2, 5, 6]], clean[[0, 2, 5, 6]])
    assert not kernel(torch.zeros_like(x)).any()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_too_large_for_float16_are_infinite(library: str, kind: str) -> None:
    kernel, _ = Way(library, kind, torch.float16, 1).held(torch.ones(64, 64))
    assert kernel(torch.full((1, 64), 4096.0).half()).eq(float("inf")).all()  # 262144
    assert kernel(torch.full((1, 64), 512.0).half()).sub(32768).abs().max() < 64


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_logits_are_float32_of_activations_of_two_digits(library: str, kind: str) -> None:
    """A hundred times nearer to what the weights held give than those of one digit, in bfloat16."""
    x = random(5, 2048, seed=1).bfloat16()
    errors = []
    for digits in (1, 2):
        kernel, weight = Way(library, kind, torch.bfloat16, digits).held(random(100, 2048))
        exact = x.double() @ weight.T
        errors.append((kernel(x).double() - exact).norm() / exact.norm())
    assert errors[1] < 1e-4 and errors[1] < errors[0] / 50


# --- a part of the inputs, as a rank holds it ----------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    ("width", "first", "last"), [(176, 44, 88), (176, 88, 176), (2304, 576, 1152), (192, 7, 12), (40, 21, 40)]
)
def test_a_part_that_is_no_whole_groups_multiplies_as_those_inputs_of_the_whole(
    way: Way, width: int, first: int, last: int
) -> None:
    """Packed from rows, cut from blocks, and from a quantized weight: the same values, and x is padded to whole groups."""
    rows = random(70, width).to(way.dtype)
    whole, weight = way.held(rows)
    parts = [whole.blocks.slice_inputs(first, last)]
    if way.kind != "bfloat16":
        assert parts[0].front == first % group_size(width, way.kind)
        parts.append(BlockedWeight.from_quantized(quantize(rows, way.kind).slice_inputs(first, last)))
        packed = packing.pack_rows(way.kind, [rows], way.dtype, width, first, last)
        assert isinstance(packed, BlockedLinear)
        parts.append(packed.blocks)
    x = random(5, last - first, seed=1).to(way.dtype)
    beside = F.pad(x, (first, width - last))  # 0 for the inputs of others
    for part in parts:
        assert part.in_features == last - first
        assert torch.equal(part.dequantize(torch.float64), weight[:, first:last])
        assert_product(way.kernel(part)(x), way.seen(beside), weight)


@packs
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_ranks_products_add_up_to_that_of_the_whole(kind: str) -> None:
    rows, x = random(70, 176), random(5, 176, seed=1)
    whole = packing.pack_rows(kind, [rows], torch.float32, 176, 0, 176)
    parts = [packing.pack_rows(kind, [rows], torch.float32, 176, first, first + 44) for first in range(0, 176, 44)]
    assert whole and all(parts)
    assert torch.equal(torch.cat([part.dequantize() for part in parts if part], 1), whole.dequantize())
    total = sum(part(own) for part, own in zip(parts, x.split(44, 1), strict=True) if part)
    assert (total - whole(x)).norm() < 0.01 * whole(x).norm()


@packs
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_part_of_the_outputs_multiplies_as_those_outputs_of_the_whole(kind: str) -> None:
    """To the bit, of the same memory, if the first one begins a block."""
    if kind == "bfloat16" and avx512.extension() is None:
        pytest.skip("no compiled products by AVX-512 here")
    whole = BlockedLinear(BlockedWeight.from_rows(kind, [random(200, 192).bfloat16()], ACTIVATION_GROUP), torch.bfloat16)
    x = random(5, 192, seed=1).bfloat16()
    for first, last in ((0, 64), (64, 200), (128, 150)):
        part = whole.rows(first, last)
        assert part is not None and torch.equal(part(x), whole(x)[:, first:last])
        assert torch.equal(part.dequantize(), whole.dequantize()[first:last])
        assert part.blocks.weight.untyped_storage().data_ptr() == whole.blocks.weight.untyped_storage().data_ptr()
    assert whole.rows(32, 64) is None


# --- packing -------------------------------------------------------------------------------------------------------------


def awkward(out: int, width: int) -> torch.Tensor:
    """Rows of all sizes, rows and groups of zeros, of one number over and over, of outliers, and as large as float16 allows."""
    weight = random(out, width) * torch.logspace(-6, 1, out).unsqueeze(1)
    weight[1], weight[2, : width // 2], weight[3] = 0, 0, 0.37
    weight[4, width // 3], weight[5], weight[6] = 50, weight[5].abs(), -weight[6].abs()
    weight[7] *= 60000 / weight[7].abs().max()
    return weight


@packs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("out", "width"), [(64, 64), (100, 200), (37, 40), (20, 7), (70, 2048), (66, 2304), (66, 2080)])
def test_pack_c_quantizes_as_quantize_py_does_to_the_bit(kind: str, dtype: torch.dtype, out: int, width: int) -> None:
    rows = awkward(out, width).to(dtype)
    want, got = quantize(rows, kind), BlockedWeight.from_rows(kind, [rows], group_size(width, kind)).to_quantized(dtype)
    assert torch.equal(got.values, want.values) and torch.equal(got.scales, want.scales)
    assert (got.zeros is None and want.zeros is None) or torch.equal(got.zeros, want.zeros)  # type: ignore[arg-type]


@packs
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e37])
def test_pack_c_quantizes_tiny_and_huge_weights_as_quantize_py_does(kind: str, size: float) -> None:
    rows = random(70, 96).clamp(-3, 3) * size
    want, got = quantize(rows, kind), BlockedWeight.from_rows(kind, [rows], 32).to_quantized(torch.float32)
    assert torch.equal(got.dequantize(), want.dequantize()) and got.dequantize().isfinite().all()


@packs
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_rows_of_several_views_are_packed_one_after_the_other(kind: str, threads: int) -> None:
    """Views into wider matrices, as a checkpoint's shards give them."""
    file = random(90, 400).bfloat16()
    views = [file[:10, 3:131], file[10:77, :128], file[::2, 200:328]]
    assert torch.equal(
        BlockedWeight.from_rows(kind, views, ACTIVATION_GROUP).dequantize(torch.float32),
        BlockedWeight.from_rows(kind, [torch.cat(views)], ACTIVATION_GROUP).dequantize(torch.float32),
    )


@packs
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_weights_are_packed_whatever_device_is_the_callers_default(kind: str) -> None:
    rows = random(70, 96).bfloat16()
    want = BlockedWeight.from_rows(kind, [rows], ACTIVATION_GROUP)
    with torch.device("meta"):
        got = BlockedWeight.from_rows(kind, [rows], ACTIVATION_GROUP)
    assert torch.equal(got.weight, want.weight)


@packs
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_what_lies_in_blocks_is_given_back_as_it_was(kind: str, out: int, width: int) -> None:
    held = quantize(random(out, width), kind)
    made = BlockedWeight.from_quantized(held)
    kernel = BlockedLinear(made, torch.float32)
    for again in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        back = again.unpack()
        assert isinstance(back, QuantizedWeight)
        for field in dataclasses.fields(QuantizedWeight):
            a, b = getattr(held, field.name), getattr(back, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
        assert torch.equal(again.dequantize(), held.dequantize())
    if out > 64:  # an output layer of several ranks, in whole blocks
        assert torch.equal(made.slice_outputs(64, out).dequantize(torch.float32), held.dequantize()[64:])


@packs
@pytest.mark.parametrize(("out", "width"), [(64, 64), (100, 190), (37, 2)])
def test_bfloat16_in_blocks_is_the_weight_itself(out: int, width: int) -> None:
    weight = random(out, width).bfloat16()
    made = BlockedWeight.from_rows("bfloat16", [weight], ACTIVATION_GROUP)
    assert torch.equal(made.dequantize(torch.bfloat16), weight)
    first, last = 1, width - width // 3
    assert torch.equal(made.slice_inputs(first, last).dequantize(torch.bfloat16), weight[:, first:last])


# --- what it is used for, and what it is not -------------------------------------------------------------------------------


@packs
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_without_compiled_code_the_products_are_nearly_the_same(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rounds no rows, and for bfloat16 leaves the product to PyTorch."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    rows, x = random(200, 192).bfloat16(), random(9, 192, seed=1).bfloat16()
    weight = quantize(rows, kind) if kind else rows
    ours = packing.pack_weight(weight)
    for module, name in ((avx512, "status"), (avx2, "status"), (pack, "status")):
        monkeypatch.setattr(module, name, no_extension)
    other = packing.pack_weight(weight)
    assert isinstance(
        other, {"int8": int8.Int8DequantLinear, "int4": int4.Int4CpuLinear}.get(kind or "", onednn.OneDnnLinear | None)
    )
    assert packing.pack_rows(kind, [rows], rows.dtype, 192, 0, 192) is None
    want = rows.float() if other is None else other.dequantize().float()
    if kind and ours:
        assert torch.equal(ours.dequantize().float(), want)
    y = half_precision.linear(x, rows) if other is None else other(x)
    for product in (y, ours(x) if ours else y):
        assert (product.float() - x.float() @ want.T).norm() < 0.01 * (x.float() @ want.T).norm()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_what_c_may_not_look_at_goes_through_pytorch(kind: str) -> None:
    """Compiled, mapped, with gradients; and rows of another width raise PyTorch's own error."""
    library = "AVX-512" if kind == "bfloat16" or avx512.extension() else "AVX2"
    kernel, weight = Way(library, kind, torch.bfloat16, 1).held(random(64, 64))
    x = random(3, 64, seed=1).bfloat16()
    want = x.double() @ weight.T

    def near(y: torch.Tensor) -> bool:
        return bool((y.double() - want).norm() < 0.02 * want.norm())

    assert near(torch.vmap(kernel)(x.unsqueeze(1)).squeeze(1))
    torch._dynamo.reset()
    assert near(torch.compile(kernel, fullgraph=True, backend="eager")(x))
    (gradient,) = torch.autograd.grad(kernel(x.requires_grad_()).float().sum(), x)
    torch.testing.assert_close(gradient.double(), weight.sum(0).expand(3, -1), atol=0.2, rtol=0.02)
    assert kernel(x[:0].detach()).shape == (0, 64) and kernel(x.detach().view(1, 3, 64)).shape == (1, 3, 64)
    for wrong in (x[:, :63], x.repeat(1, 2)):
        with pytest.raises(RuntimeError):
            kernel(wrong.detach())


FORMS = {
    "int8 in blocks": lambda weight: BlockedLinear(BlockedWeight.from_quantized(quantize(weight, "int8")), weight.dtype),
    "int4 in blocks": lambda weight: BlockedLinear(BlockedWeight.from_quantized(quantize(weight, "int4")), weight.dtype),
    "int8 on a GPU": lambda weight: int8.Int8CudaLinear(in_whole_rows(weight, weight.dtype)),
}


@packs
@pytest.mark.parametrize("form", FORMS)
def test_what_stands_beside_a_large_activation_is_not_lost(form: str) -> None:
    """Real models have activations a hundred times as large as the others. A row of one scale for 8 bits rounds these others
    to a few values; the product must still hold them."""
    weight, x = random(256, 4096), random(4, 4096, seed=1)
    x[:, 1234] = 100 * x.std()
    kernel = FORMS[form](weight)
    others = x.clone()
    others[:, 1234] = 0
    own = kernel.dequantize().double()

    def lost(y: torch.Tensor) -> float:
        return float((y.double() - x.double() @ own.T).norm() / (others.double() @ own.T).norm())

    assert lost(kernel(x)) < 0.03
    assert lost(in_8_bits(x, group=4096) @ own.T) > 0.15  # with one scale for the whole row


@packs
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_small_models_keep_16_bits_of_activations(kind: str) -> None:
    """Where one is large, 8 bits would leave few for its neighbours; of wide rows they do."""
    lost = {}
    for width in (576, 2304):
        weight, x = random(64, width), random(4, width, seed=1)
        x[:, ::ACTIVATION_GROUP] *= 100
        kernel = packing.pack_rows(kind, [weight], torch.float32, width, 0, width)
        assert isinstance(kernel, BlockedLinear)
        want = x.double() @ kernel.blocks.to_quantized(torch.float64).dequantize().T
        lost[width] = ((kernel(x) - want).norm() / want.norm()).item()
    assert lost[576] < 1e-4 < 1e-3 < lost[2304]
