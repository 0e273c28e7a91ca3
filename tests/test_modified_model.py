"""Test that callers may read, edit and replace parts of a model. Each change takes effect, or raises an error with a remedy.

A model whose forward a caller has changed generates through its own `Transformer.forward`, on tokens (B, S), as the reference
does. Most tests run with plain float32 weights, with packed bfloat16 weights and with packed int8 weights.
"""

import copy
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from llama import InputError, Llama, ModelArgs, Transformer, generation, model, tuning
from llama import model as reference
from llama.kernels import avx512
from llama.kernels.packed_weight import PackedWeight
from llama.layers import linear

from .support import run

PROMPTS = [[1, 5, 9, 30, 8], [1, 7]]
FORMS = ["plain", "packed", "int8"]


def build(small: SimpleNamespace, form: str = "plain", **options: Any) -> Llama:
    form_options = {"plain": {}, "packed": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}}[form]
    return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", **form_options, **options)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)  # pack even the small weights of the test model
    return request.param


@pytest.fixture
def built(small: SimpleNamespace, form: str) -> Llama:
    return build(small, form)


def greedy(llama: Llama) -> list[list[int]]:
    return llama.generate(PROMPTS, 8, temperature=0)[0]


def agrees_with_forward(llama: Llama, answers: list[list[int]]) -> bool:
    """Return True if all answers are greedy. Call `model.forward` as Meta's generation loop does, and compare the logit of each
    token with the largest logit."""
    tolerance = 0.05 if next(llama.model.parameters()).dtype == torch.float32 else 0.15
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    before = 0
    for position in range(min(map(len, PROMPTS)), tokens.shape[1]):
        logits = llama.model.forward(tokens[:, before:position], before)[:, -1]
        for row, prompt, row_logits in zip(rows, PROMPTS, logits, strict=True):
            if len(prompt) <= position < len(row) and row_logits.max() - row_logits[row[position]] > tolerance:
                return False
        before = position
    return True


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


# --- hooks and replaced modules, functions and weights ---


def zero_linear(layer: nn.Module) -> nn.Linear:
    zero = nn.Linear(layer.in_features, layer.weight.shape[0], bias=False).to(layer.weight.dtype)  # type: ignore[arg-type, union-attr]
    nn.init.zeros_(zero.weight)
    return zero


class Negative(nn.Module):
    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner, self.params = inner, inner.params

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        return -self.inner(tokens, start_pos)


class Subclass(Transformer):
    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        return -super().forward(tokens, start_pos)


class Skip(nn.Module):
    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return x


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(0)
        out, width = base.weight.shape  # type: ignore[union-attr, misc]
        self.a = nn.Parameter(torch.randn(4, width, generator=generator).to(base.weight.dtype))  # type: ignore[arg-type]
        self.b = nn.Parameter(torch.randn(out, 4, generator=generator).to(base.weight.dtype))  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def replace(llama: Llama, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    for layer in llama.model.layers:
        parent = layer.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], make(layer.get_submodule(name)))


def last_position(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[:, -1] += 0.5
    return y


def patch_block(llama: Llama) -> None:
    block = llama.model.layers[0]
    original = block.forward
    block.forward = types.MethodType(lambda self, x, *args: original(x, *args) - 1.5 * x, block)


def patch_forward(llama: Llama) -> None:
    original = llama.model.forward
    llama.model.forward = lambda tokens, start_pos: -original(tokens, start_pos)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Llama], Any]] = {
    "a hook that edits the last position": lambda x: x.model.layers[1].register_forward_hook(last_position),
    "a hook on wq": lambda x: x.model.layers[0].attention.wq.register_forward_hook(lambda m, i, y: y * 0),
    "a hook on w3": lambda x: x.model.layers[0].feed_forward.w3.register_forward_hook(lambda m, i, y: y * 0),
    "a hook before the output": lambda x: x.model.output.register_forward_pre_hook(lambda m, i: (i[0] * -1,)),
    "forward replaced": patch_forward,
    "a block's forward replaced": patch_block,
    "a subclass": lambda x: setattr(x.model, "__class__", Subclass),
    "a wrapped model": lambda x: setattr(x, "model", Negative(x.model)),
    "a block replaced": lambda x: x.model.layers.__setitem__(0, Skip()),
    "a layer removed": lambda x: setattr(x.model, "layers", x.model.layers[:-1]),
    "layers appended": lambda x: x.model.layers.extend([copy.deepcopy(x.model.layers[i]) for i in (1, 0)]),
    "wq replaced": lambda x: replace(x, "attention.wq", zero_linear),
    "lora around wv": lambda x: replace(x, "attention.wv", Lora),
    "other frequencies": lambda x: setattr(x.model, "freqs_cis", model.precompute_freqs_cis(8, 128, 50.0)),
    "wk pruned": lambda x: prune.l1_unstructured(x.model.layers[0].attention.wk, "weight", 0.9),
    "wo zeroed": lambda x: x.model.layers[0].attention.wo.weight.data.mul_(0),
    "wv set": lambda x: x.model.layers[0].attention.wv.weight.__setitem__(slice(0, 8), 0.5),
    "w1 by name": lambda x: [p.zero_() for name, p in x.model.named_parameters() if ".w1." in name],
    "wo in the state": lambda x: [t.zero_() for name, t in x.model.state_dict().items() if ".wo." in name],
    "wq loaded": lambda x: x.model.load_state_dict({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, strict=False),
    "a layer twice": lambda x: x.model.layers.append(x.model.layers[0]),
    "a bias": lambda x: setattr(
        x.model.output, "bias", nn.Parameter(((torch.arange(384) == 77) * 50.0).to(x.model.norm.weight.dtype))
    ),
    "wq another parameter": lambda x: setattr(
        x.model.layers[0].attention.wq, "weight", nn.Parameter(torch.zeros(64, 64).to(x.model.norm.weight.dtype))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_modified_model_generates_the_answers_of_its_own_forward(built: Llama, change: str) -> None:
    """Generate once before the model is changed. The next call must not use anything that the first call prepared."""
    before = greedy(built)
    with torch.no_grad():
        CHANGES[change](built)
        answers = greedy(built)
        assert answers != before and agrees_with_forward(built, answers)
    assert (
        "".join(built.text_completion_stream("the", 0, max_gen_len=4))
        == built.text_completion(["the"], 0, max_gen_len=4)[0]["generation"]
    )


def test_functions_and_methods_of_the_model_module_may_be_replaced(built: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    before = greedy(built)
    for owner, name, replacement in (
        (model, "apply_rotary_emb", lambda xq, xk, freqs_cis: (xq, xk)),
        (model.Attention, "forward", lambda self, x, *args: x * 0),
        (model.RMSNorm, "_norm", lambda self, x: x),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            answers = greedy(built)
            assert answers != before and agrees_with_forward(built, answers)
    assert greedy(built) == before


def test_hooks_get_whole_batches_and_a_message_is_printed_once(built: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    shapes: list[list[int]] = []
    handle = built.model.layers[1].register_forward_hook(lambda module, args, y: shapes.append(list(y.shape)))
    want = greedy(built)
    assert shapes[:2] == [[2, 2, 64], [2, 1, 64]] and greedy(built) == want
    message = "llama: layers.1 has a hook: generating through the model's own forward, which is slower\n"
    assert capsys.readouterr().err == message
    shapes.clear()
    built.chat_completion([[{"role": "user", "content": "hi"}]], temperature=0, max_gen_len=4)
    assert len(shapes) == 4 and shapes[1] == [1, 1, 64]
    handle.remove()
    assert greedy(built) == want and len(shapes) == 4


def test_a_hook_may_ban_tokens_with_logits_of_minus_infinity(built: Llama) -> None:
    """Set the logits of every second token to minus infinity in a hook. Logits of NaN or plus infinity must still raise an
    error."""

    def ban(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[..., ::2] = float("-inf")
        return y

    handle = built.model.output.register_forward_hook(ban)
    assert all(token % 2 for row in greedy(built) for token in row)
    torch.manual_seed(0)
    assert all(token % 2 for row in built.generate(PROMPTS, 8, temperature=1.0)[0] for token in row)
    _, logprobs = built.generate([[1, 2, 5]], 2, temperature=0, logprobs=True, echo=True)
    assert logprobs and logprobs[0][1] == float("-inf")
    handle.remove()
    for bad in (float("nan"), float("inf")):
        handle = built.model.output.register_forward_hook(
            lambda m, i, y, bad=bad: y.clone().index_fill_(-1, torch.tensor([3]), bad)
        )
        with pytest.raises(ValueError, match="not finite"):
            greedy(built)
        handle.remove()


def test_callers_may_replace_generate_the_tokenizer_and_the_sampler(built: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `generate`, `tokenizer` and `sample_top_p`. The next call must use the replacements."""
    options_of_calls: list[dict[str, Any]] = []

    class RecordingLlama(Llama):
        def generate(self, prompt_tokens: Any, **options: Any) -> Any:
            options_of_calls.append(options)
            return super().generate(prompt_tokens, **options)

    want = built.text_completion(["the"], 0, max_gen_len=4, logprobs=True)
    built.__class__ = RecordingLlama
    assert built.text_completion(["the"], 0, max_gen_len=4, logprobs=True) == want
    assert options_of_calls == [{"max_gen_len": 4, "temperature": 0.0, "top_p": 0.9, "logprobs": True}]
    built.generate = lambda prompt_tokens, **options: ([[40, 41, 42, 43]], None)  # type: ignore[method-assign]
    assert built.text_completion(["the"])[0]["generation"] == built.tokenizer.decode([40, 41, 42, 43])
    piece = built.tokenizer.decode([42])
    assert built.text_completion(["the"], stop=piece)[0]["generation"] == built.tokenizer.decode([40, 41, 42]).split(piece)[0]
    with pytest.raises(InputError, match="generate has been replaced, and streams do not go through it"):
        built.text_completion_stream("the")
    del built.generate
    built.__class__ = Llama

    class UpperCaseEncoder:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

        def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
            return self.inner.encode("Tom said " + s.upper(), bos=bos, eos=eos)

    want = built.text_completion(["Tom said THE"], 0, max_gen_len=4)
    built.tokenizer = UpperCaseEncoder(built.tokenizer)  # type: ignore[assignment]
    assert built.text_completion(["the"], 0, max_gen_len=4) == want
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "sample_top_p", lambda probs, p: probs.argmin(-1, keepdim=True))
        with pytest.raises(InputError, match="seed is for this library's sample_top_p"):
            built.generate([[1, 5]], 1, temperature=0.7, seed=3)
    monkeypatch.setattr(generation, "sample_top_p", lambda probs, p: probs.argmin(-1, keepdim=True))
    tokens = built.generate([[1, 5]], 1, temperature=0.7)[0][0]
    assert tokens == [int(built.model(torch.tensor([[1, 5]]), 0)[0, -1].argmin())]


def test_a_replaced_tokenizers_decode_makes_all_text(built: Llama) -> None:
    """Replace `tokenizer.decode`, and check the text of answers, echoed prompts, streams, dialogs and single tokens."""

    class UpperCaseDecoder:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

        def decode(self, tokens: list[int]) -> str:
            return self.inner.decode(tokens).upper()

    dialog = [{"role": "user", "content": "hi"}]

    def texts() -> list[str]:
        results = built.text_completion(["the", "once upon"], 0, max_gen_len=6, echo=True, logprobs=True)
        reply = built.chat_completion([dialog], 0, max_gen_len=6)[0]["generation"]["content"]
        stream = "".join(built.text_completion_stream("the", 0, max_gen_len=6))
        return [*(result["generation"] for result in results), *results[0]["tokens"], reply, stream]

    original_texts = texts()
    built.tokenizer = UpperCaseDecoder(built.tokenizer)  # type: ignore[assignment]
    assert texts() == [text.upper() for text in original_texts] != original_texts


def test_max_seq_len_and_eos_id_are_read_anew_at_each_call(built: Llama) -> None:
    answer = greedy(built)[0]
    built.model.params.max_seq_len = 9
    assert built.generate(PROMPTS[:1], 50, temperature=0)[0] == [answer[:4]]
    built.tokenizer.eos_id = answer[2]
    assert built.generate(PROMPTS[:1], 50, temperature=0)[0] == [answer[: answer.index(answer[2])]]


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


def test_a_context_longer_than_the_kv_cache_is_refused(built: Llama) -> None:
    greedy(built)
    built.model.params.max_seq_len = 128
    with pytest.raises(InputError, match="max_seq_len is 128, but the model was built with a cache for 64: build it anew"):
        greedy(built)
    with pytest.raises(InputError, match="max_seq_len is 128"):
        built.score(["the"], [" fox"])


def test_a_stream_of_a_modified_model_raises_after_another_call(built: Llama) -> None:
    built.model.layers[0].register_forward_hook(lambda module, args, y: None)
    stream = built.generate_stream(PROMPTS[:1], 8, 0)
    next(stream)
    greedy(built)
    with pytest.raises(InputError, match=r"this generate_stream ended .* generate has been called since"):
        list(stream)


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
