"""Test quantized models: the answers, their distance from float32, parts of weights on ranks, and the bytes of weights."""

import copy
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import loading, packed_file, resharding
from llama.checkpoint.shards import open_shards, split_dim
from llama.kernels import blocked_linear, packing
from llama.kernels.blocked_linear import BlockedLinear
from llama.kernels.packed_weight import PackedWeight, SharedKernel
from llama.planning import estimate
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight

from .conftest import SMALL
from .support import ROOT, random_weights, run, torchrun, write_shards
from .test_kernels import engine_logits, linear_weights

DTYPES = torch.float32, torch.bfloat16, torch.float16

DEMO, DEMO_TOKENIZER = ROOT / "demo/model", ROOT / "demo/tokenizer.model"


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
