"""On a GPU, captured decode steps and compiled layers give the same tokens as uncaptured steps and as the CPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, compat, tuning
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.backends.torch_compile import TorchCompileBackend
from llama.checkpoint import packed_file
from llama.kernels import packing
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight

from .support import write_shards
from .test_kernels import engine_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, *range(20, 150)]]


def build(small: SimpleNamespace, folder: Path | None = None, **options: object) -> Llama:
    return Llama.build(folder or small.folder, small.tokenizer_path, 300, 4, **options)  # type: ignore[arg-type]


def reset_steps(llama: Llama, captures: bool) -> CudaGraphsBackend:
    """Drop all decode steps of the backend and set whether new steps are captured in CUDA graphs; return the backend."""
    backend = llama.engine.backend
    assert isinstance(backend, CudaGraphsBackend)
    backend.captures = captures
    backend.steps.clear()
    return backend


def test_float32_answers_on_the_gpu_equal_those_on_the_cpu(small: SimpleNamespace) -> None:
    want, want_logprobs = build(small, device="cpu").generate(PROMPTS, 40, temperature=0, logprobs=True)
    got, got_logprobs = build(small, device="cuda").generate(PROMPTS, 40, temperature=0, logprobs=True)
    assert got == want
    for row, expected in zip(got_logprobs or [], want_logprobs or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_and_uncaptured_greedy_tokens_are_equal(small: SimpleNamespace, compile: bool, dtype: str) -> None:
    """Compare three calls whose answers grow through several context buckets. The second call has fewer rows."""
    llama = build(small, device="cuda", dtype=dtype, compile=compile)
    assert llama.backend == ("torch_compile" if compile else "cuda_graphs")
    reset_steps(llama, False)
    want = [llama.generate(prompts, 160, temperature=0)[0] for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    backend = reset_steps(llama, True)
    got = [llama.generate(prompts, 160, temperature=0)[0] for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    assert backend.captures, "nothing was captured"
    assert got == want
    assert backend.steps and all(step.replay.__name__ == "replay" for step in backend.steps.values())


def test_sampled_tokens_do_not_depend_on_capture_or_static_memory(small: SimpleNamespace) -> None:
    answers = []
    for backend in ("torch", "cuda_graphs"):
        llama = build(small, device="cuda", backend=backend)
        torch.manual_seed(3)
        answers.append(llama.generate(PROMPTS, 60, temperature=0.7, top_p=0.9)[0])
    assert answers[0] == answers[1]


def test_more_prompts_than_rows_are_answered_as_on_the_cpu(small: SimpleNamespace) -> None:
    """Waiting prompts take over rows between captured decode steps. Each step starts before the previous tokens are read."""
    prompts = [[1, *range(5 * i + 5, 5 * i + 6 + i % 7)] for i in range(15)]
    options: dict = dict(logprobs=True, temperature=1.0, seed=range(15), repetition_penalty=1.2, top_k=50)
    options |= {"logit_bias": {40: 3, 41: -100}}
    want, want_logprobs = build(small, device="cpu").generate(prompts, 40, **options)
    got, got_logprobs = build(small, device="cuda").generate(prompts, 40, **options)
    assert got == want
    for row, expected in zip(got_logprobs or [], want_logprobs or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


def test_a_growing_prompt_gives_the_answers_of_a_new_model(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTENTION_CHUNK", "MIN_SHARED_PREFIX", "MIN_AWAITED_PREFIX", "MIN_SAVED_PREFIX"):
        monkeypatch.setattr(tuning, name, 4)
    llama, text = build(small, device="cuda"), "Once upon a time"
    for _ in range(3):
        answers = llama.text_completion([text, text + " there", "a bear", text], 0, max_gen_len=20)
        assert answers == build(small, device="cuda").text_completion(
            [text, text + " there", "a bear", text], 0, max_gen_len=20
        )
        stream = llama.text_completion_stream(text, 0, max_gen_len=20)
        assert "".join(stream) == answers[0]["generation"] and stream.cached_tokens > 0
        text += answers[0]["generation"] + " and"


def test_a_model_in_several_shards_answers_on_the_gpu_as_on_the_cpu(tmp_path: Path, small: SimpleNamespace) -> None:
    want = build(small, device="cpu").generate(PROMPTS, 20, temperature=0)[0]
    folder = write_shards(tmp_path, small.params, small.weights, 4)
    assert build(small, folder, device="cuda").generate(PROMPTS, 20, temperature=0)[0] == want


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(384, 192), (344, 172), (64, 1088), (64, 256), (20, 7)], ids=str)
def test_quantized_weights_multiply_as_their_dequantized_values(
    format: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiply 1 to 300 rows, also with shapes that the kernels support only with padding."""
    g = torch.Generator().manual_seed(1)
    quantized = quantize(torch.randn(shape, generator=g).cuda().bfloat16(), format)
    kernel = packing.pack_weight(quantized)
    assert kernel and quantized.scales.shape[1] == (1 if format == "int8" else -(-shape[1] // 32))
    for rows in (1, 3, 8, 17, 40, 300):
        x = torch.randn(rows, shape[1], generator=g).cuda().bfloat16()
        want = x.double() @ kernel.dequantize().double().t()
        assert (kernel(x).double() - want).norm() < 0.01 * want.norm(), rows
    # For many rows int4 weights must be dequantized once; PyTorch's int4 kernel would take five times as long.
    with monkeypatch.context() as patch:
        patch.setattr(compat, "int4_linear_cuda", lambda *_: pytest.fail("many rows were multiplied by the int4 kernel"))
        kernel(torch.randn(300, shape[1], generator=g).cuda().bfloat16())
    unpacked = kernel.unpack()
    assert isinstance(unpacked, QuantizedWeight)
    assert torch.equal(unpacked.values, quantized.values) and torch.equal(unpacked.scales, quantized.scales)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_models_answer_as_on_the_cpu(tmp_path: Path, small: SimpleNamespace, format: str, compile: bool) -> None:
    """Check answers against the CPU's, for weights quantized at load or from a packed file, with and without capture.

    An int8 weight has one scale per row on the GPU, but one scale per group on the CPU and in the file.
    """
    prompt, options = [[1, 5, 9, 30, 8, 77]], dict(quantize=format, dtype="bfloat16")
    llama = build(small, device="cuda", compile=compile, **options)
    tokens = torch.tensor(prompt)
    want = build(small, device="cpu", **options).model.forward(tokens, 0)
    for logits in (engine_logits(llama.engine.forward(), tokens.cuda(), 0), llama.model.forward(tokens, 0)):
        assert (logits.cpu() - want).norm() < 0.03 * want.norm()
    with torch.autocast("cuda", torch.float16):  # test_quantize.py tests autocast on the CPU
        assert (llama.model.forward(tokens, 0).cpu() - want).norm() < 0.05 * want.norm()
    answers = []
    for captures in (False, True):
        backend = reset_steps(llama, captures)
        answers.append(llama.generate(PROMPTS, 100, temperature=0, logprobs=True))
    assert backend.captures and backend.steps and answers[0] == answers[1]
    folder = write_shards(tmp_path, small.params, small.weights, 4)
    packed_file.save_packed_file(folder, format)
    from_file = build(small, folder, device="cuda", compile=compile, **options).generate(PROMPTS, 100, 0.0, logprobs=True)
    # torch.compile tunes the kernels of the second model anew, and they may add in another order.
    assert compile or format == "int8" or from_file == answers[0]


def test_hooks_are_called_in_every_decode_step(small: SimpleNamespace) -> None:
    """If decode steps were captured, a hook on the embedding or on a linear layer would be called only during the capture."""
    llama = build(small, device="cuda")
    want, lengths = llama.generate(PROMPTS[:1], 6, temperature=0), []
    for module in (llama.model.tok_embeddings, llama.model.layers[0].feed_forward.w2, llama.model.output):
        handle = module.register_forward_hook(lambda module, args, y: lengths.append(y.shape[1]))
        assert llama.generate(PROMPTS[:1], 6, temperature=0) == want
        handle.remove()
    assert lengths == [5, 1, 1, 1, 1, 1] * 3
    assert llama.generate(PROMPTS[:1], 6, temperature=0) == want and len(lengths) == 3 * 6


def test_auto_chooses_cuda_graphs_and_all_backends_give_the_same_tokens(small: SimpleNamespace) -> None:
    answers = {}
    for name in ("auto", "eager", "torch", "cuda_graphs", "torch_compile"):
        llama = build(small, device="cuda", backend=name)
        assert llama.backend == ("cuda_graphs" if name == "auto" else name)
        assert isinstance(llama.engine.backend, TorchCompileBackend) == (name == "torch_compile")
        answers[name] = llama.generate(PROMPTS, 40, temperature=0)[0]
    assert all(answer == answers["eager"] for answer in answers.values())
