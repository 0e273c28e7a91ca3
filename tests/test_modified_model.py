"""Test that callers may read, edit and replace parts of a model. Each change takes effect, or raises an error with a remedy.

A model whose forward a caller has changed generates through its own `Transformer.forward`, on tokens (B, S), as the reference
does. Most tests run with plain float32 weights, with packed bfloat16 weights and with packed int8 weights.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from llama import InputError, Llama, Transformer, generation, model

from . import model_forms
from .model_forms import PROMPTS, agrees_with_forward, greedy

form, built = model_forms.form, model_forms.built  # fixtures


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
