"""Test that callers may read, save, copy and edit the weights of a model, in every form in which they are stored."""

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama import InputError, Llama, ModelArgs, Transformer
from llama import model as reference
from llama.kernels import avx512
from llama.kernels.packed_weight import PackedWeight
from llama.layers import linear

from . import model_forms
from .model_forms import PROMPTS, agrees_with_forward, build, greedy
from .support import run

form, built = model_forms.form, model_forms.built  # fixtures


# --- reading the model ---


def test_modules_parameters_and_state_dict_have_metas_names_and_shapes(built: Llama) -> None:
    model, parts = built.model, ("wq", "wk", "wv", "wo")
    names = [name for name, _ in model.named_parameters()]
    assert names[1:10] == [
        *(f"layers.0.attention.{part}.weight" for part in parts),
        *(f"layers.0.feed_forward.{part}.weight" for part in ("w1", "w2", "w3")),
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
    ]
    assert [*model.state_dict()] == names and sum(p.numel() for p in model.parameters()) == 147_776
    attention = model.layers[0].attention
    assert [list(getattr(attention, part).weight.shape) for part in parts] == [[64, 64], [32, 64], [32, 64], [64, 64]]
    heads = attention.n_kv_heads, attention.n_local_heads, attention.n_local_kv_heads, attention.n_rep, attention.head_dim
    assert heads == (4, 8, 4, 2, 8)
    block = model.layers[1]
    assert (block.n_heads, block.dim, block.head_dim, block.layer_id) == (8, 64, 8, 1)
    assert model.freqs_cis.shape == (128, 4) and model.freqs_cis.dtype == torch.complex64


def test_weights_have_the_values_of_the_checkpoint_and_can_be_saved(built: Llama, small: SimpleNamespace, form: str) -> None:
    tolerance = 1e-6 if form == "plain" else 0.02
    for name, weight in built.model.state_dict().items():
        torch.testing.assert_close(weight.float(), small.weights[name], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close((2 * weight).float(), 2 * weight.float())
    saved = io.BytesIO()
    torch.save(built.model.state_dict(), saved)
    saved.seek(0)
    for name, weight in torch.load(saved, weights_only=True).items():
        assert type(weight) is torch.Tensor and torch.equal(weight, built.model.state_dict()[name].clone())


def test_a_linear_layer_multiplies_by_the_values_that_its_weight_shows(built: Llama, form: str) -> None:
    x = torch.randn(2, 5, 64).to(built.model.norm.weight.dtype)
    for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w3"):
        layer = built.model.layers[1].get_submodule(name)
        want = x.float() @ layer.weight.clone().float().T
        torch.testing.assert_close(layer(x).float(), want, atol=1e-5 if form == "plain" else 0.02, rtol=0.02)


def test_callers_may_read_and_write_the_kv_cache(built: Llama) -> None:
    attention, tokens = built.model.layers[1].attention, torch.tensor([[1, 5, 6, 40], [1, 7, 8, 90]])
    built.model(tokens, 0)
    assert attention.cache_k.shape == (4, 64, 4, 8) and attention.cache_k[:2, :4].abs().sum(-1).min() > 0
    next_, step = torch.tensor([[9], [11]]), built.model(torch.tensor([[9], [11]]), 4)
    for layer in built.model.layers:
        layer.attention.cache_k.zero_()
        layer.attention.cache_v.zero_()
    assert not torch.equal(built.model(next_, 4), step)
    greedy(built)  # prompt i of a batch is stored in row i of the KV cache
    row = PROMPTS[1] + greedy(built)[1]
    want = built.model(torch.tensor([row]), 0)[0, -1]
    greedy(built)
    both = [(prompt + answer)[:9] for prompt, answer in zip(PROMPTS, greedy(built), strict=True)]
    got = built.model(torch.tensor([tokens[8:] for tokens in both]), 8)[1, -1]
    assert built.model(torch.tensor([row[:9]]), 0)[0, -1].argmax() == got.argmax() and want.shape == got.shape


def test_logits_convert_to_numpy_without_detach(built: Llama) -> None:
    assert built.model(torch.tensor([[1, 5]]), 0).numpy().shape == (1, 2, 384)


# --- packed weights ---


@pytest.mark.parametrize("form", ["packed", "int8"], indirect=True)
def test_a_packed_weight_raises_for_operations_that_need_plain_memory(built: Llama) -> None:
    """Check that the error advises to build with backend="eager", which keeps plain tensors."""
    weight = built.model.layers[0].attention.wq.weight
    if not isinstance(weight, PackedWeight) and avx512.extension() is None:
        pytest.skip("this CPU keeps bfloat16 weights unpacked")
    assert isinstance(weight, PackedWeight) and isinstance(weight, nn.Parameter)
    for use in (
        lambda: weight[0].zero_(),
        lambda: weight.t(),
        lambda: weight.view(-1),
        lambda: weight.requires_grad_(),
        lambda: setattr(weight, "data", torch.zeros(64, 64)),
    ):
        with pytest.raises(InputError, match='build with backend="eager", which keeps plain tensors'):
            use()


def test_packed_weights_do_not_import_sympy(small: SimpleNamespace) -> None:
    """Importing sympy takes 40 MB and most of a second. PyTorch's distributed tensors import sympy, but packed weights must
    not."""
    code = (
        f"import sys; from llama import Llama; paths = {str(small.folder)!r}, {str(small.tokenizer_path)!r}\n"
        "llama = Llama.build(*paths, 64, 2, device='cpu', quantize='int8'); llama.generate([[1, 5]], 2)\n"
        "print(type(llama.model.output.weight).__name__, 'sympy' in sys.modules)"
    )
    assert run("-c", code).stdout == "PackedWeight False\n"


@pytest.mark.parametrize("form", ["packed", "int8"], indirect=True)
def test_an_edit_of_wk_leaves_wq_and_wv_unchanged(built: Llama) -> None:
    """Edit wk, which is packed as one matrix with wq and wv."""
    attention = built.model.layers[0].attention
    before = attention.wq.weight.clone(), attention.wv.weight.clone()
    attention.wk.weight.mul_(2)
    assert torch.equal(attention.wq.weight.clone(), before[0]) and torch.equal(attention.wv.weight.clone(), before[1])


def test_an_edit_of_a_copied_model_leaves_the_original_unchanged(built: Llama) -> None:
    want = greedy(built)
    for duplicate in (copy.deepcopy(built.model), pickle.loads(pickle.dumps(built.model))):
        llama_of_copy = Llama(duplicate, built.tokenizer)
        assert greedy(llama_of_copy) == want
        duplicate.layers[0].attention.wo.weight.mul_(0)
        assert greedy(llama_of_copy) != want and greedy(built) == want


def test_the_eager_backend_keeps_plain_tensors(small: SimpleNamespace, form: str) -> None:
    eager = build(small, form, backend="eager")
    assert all(type(p) is nn.Parameter for p in eager.model.parameters()) and eager.backend == "eager"
    assert agrees_with_forward(eager, greedy(eager))


@pytest.mark.parametrize("form", ["packed", "int8"], indirect=True)
def test_operations_that_write_into_a_packed_weight_take_effect(built: Llama) -> None:
    weight = built.model.layers[0].attention.wo.weight
    before = weight.clone().float()
    torch.mul(weight, 2, out=weight)
    torch._foreach_mul_([weight], 2)
    weight.data.add_(weight.clone(), alpha=-0.5)
    torch.testing.assert_close(weight.clone().float(), 2 * before, atol=0.02, rtol=0.02)


def test_a_model_can_be_trained_after_generating(small: SimpleNamespace) -> None:
    model = build(small, backend="eager").model.double()
    Llama(model, build(small).tokenizer).generate(PROMPTS, 2)
    model.requires_grad_(True)
    model(torch.tensor([[1, 5, 9]]), 0).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- models built without Llama.build ---


def test_constructing_a_transformer_leaves_torchs_generator_unchanged_and_accepts_metas_arguments() -> None:
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=64, max_seq_len=16, max_batch_size=2))
    assert torch.equal(torch.rand(1), want) and model(torch.tensor([[1, 2]]), 0).numpy().shape == (1, 2, 64)
    column = linear.ColumnParallelLinear(8, 16, bias=False, gather_output=False, init_method=lambda w: w)
    assert column.weight.shape == (16, 8)
    ffn = reference.FeedForward(dim=8, hidden_dim=32, multiple_of=8, ffn_dim_multiplier=None)
    assert ffn.w1.weight.shape == (24, 8) and ffn.w2.weight.shape == (8, 24)
    with pytest.raises(InputError, match="bias=True"):
        linear.ColumnParallelLinear(8, 16, bias=True)


def test_shards_may_have_any_name_that_ends_in_pth(small: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "finetuned.pth").write_bytes((small.folder / "consolidated.00.pth").read_bytes())
    (tmp_path / "params.json").write_bytes((small.folder / "params.json").read_bytes())
    renamed = Llama.build(tmp_path, small.tokenizer_path, 64, 4, device="cpu")
    assert greedy(renamed) == greedy(build(small))
