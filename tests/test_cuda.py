"""What only a GPU can show: captured steps, compiled layers, and the CPU's answers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.backends.torch_compile import TorchCompileBackend
from llama.checkpoint import packed_file
from llama.kernels import int4, packing
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight

from .support import write_shards
from .test_kernels import engine_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, *range(20, 150)]]


def build(small: SimpleNamespace, folder: Path | None = None, **options: object) -> Llama:
    return Llama.build(folder or small.folder, small.tokenizer_path, 300, 4, **options)  # type: ignore[arg-type]


def captured(llama: Llama, captures: bool) -> CudaGraphsBackend:
    """Have all steps made anew, captured or not."""
    backend = llama.engine.backend
    assert isinstance(backend, CudaGraphsBackend)
    backend.captures = captures
    backend.steps.clear()
    return backend


def test_float32_answers_are_the_cpus(small: SimpleNamespace) -> None:
    want, values = build(small, device="cpu").generate(PROMPTS, 40, temperature=0, logprobs=True)
    got, mine = build(small, device="cuda").generate(PROMPTS, 40, temperature=0, logprobs=True)
    assert got == want
    for row, expected in zip(mine or [], values or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_and_uncaptured_greedy_ids_are_equal(small: SimpleNamespace, compile: bool, dtype: str) -> None:
    """Across buckets, rows and calls, and after a call of other rows in between."""
    llama = build(small, device="cuda", dtype=dtype, compile=compile)
    assert llama.backend == ("torch_compile" if compile else "cuda_graphs")
    captured(llama, False)
    want = [llama.generate(prompts, 160, temperature=0)[0] for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    backend = captured(llama, True)
    got = [llama.generate(prompts, 160, temperature=0)[0] for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    assert backend.captures, "nothing was captured"
    assert got == want
    assert backend.steps and all(step.replay.__name__ == "replay" for step in backend.steps.values())


def test_drawn_ids_do_not_depend_on_capture(small: SimpleNamespace) -> None:
    """Nor on static memory."""
    answers = []
    for backend in ("torch", "cuda_graphs"):
        llama = build(small, device="cuda", backend=backend)
        torch.manual_seed(3)
        answers.append(llama.generate(PROMPTS, 60, temperature=0.7, top_p=0.9)[0])
    assert answers[0] == answers[1]


def test_more_prompts_than_rows_answer_as_on_the_cpu(small: SimpleNamespace) -> None:
    """Prompts take slots between captured steps, of which each is launched before the last one's ids are read."""
    prompts = [[1, *range(5 * i + 5, 5 * i + 6 + i % 7)] for i in range(15)]
    options: dict = dict(logprobs=True, temperature=1.0, seed=range(15), repetition_penalty=1.2, top_k=50)
    want, values = build(small, device="cpu").generate(prompts, 40, **options)
    got, mine = build(small, device="cuda").generate(prompts, 40, **options)
    assert got == want
    for row, expected in zip(mine or [], values or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


def test_a_turn_goes_on_where_the_last_one_ended(small: SimpleNamespace) -> None:
    llama = build(small, device="cuda")
    text = "Once upon a time"
    for _ in range(3):
        answer = "".join(llama.text_completion_stream(text, 0, max_gen_len=20, reuse=True))
        assert answer == llama.text_completion([text], 0, max_gen_len=20)[0]["generation"]
        list(llama.text_completion_stream(text, 0, max_gen_len=20, reuse=True))
        text += answer + " and"


def test_shards_load_onto_the_gpu(tmp_path: Path, small: SimpleNamespace) -> None:
    want = build(small, device="cpu").generate(PROMPTS, 20, temperature=0)[0]
    folder = write_shards(tmp_path, small.params, small.weights, 4)
    assert build(small, folder, device="cuda").generate(PROMPTS, 20, temperature=0)[0] == want


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(384, 192), (344, 172), (64, 1088), (20, 7)], ids=str)
def test_quantized_products(kind: str, shape: tuple[int, int]) -> None:
    """Of a single row, of few and of many, also of widths that no kernel has."""
    g = torch.Generator().manual_seed(1)
    held = quantize(torch.randn(shape, generator=g).cuda().bfloat16(), kind)
    kernel = packing.pack_weight(held)
    assert kernel and held.scales.shape[1] == (1 if kind == "int8" else -(-shape[1] // 32))
    for rows in (1, 3, 8, 17, 40, 300):
        x = torch.randn(rows, shape[1], generator=g).cuda().bfloat16()
        want = x.double() @ kernel.dequantize().double().t()
        assert (kernel(x).double() - want).norm() < 0.01 * want.norm(), rows
    if kind == "int4":  # many rows are unpacked; else they would take five times as long
        assert all(int4._can_unpack_cuda(half_tiles, torch.device("cuda", 0)) for half_tiles in (1, 2, 4))
    again = kernel.unpack()
    assert (
        isinstance(again, QuantizedWeight) and torch.equal(again.values, held.values) and torch.equal(again.scales, held.scales)
    )


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_models_answer_as_on_the_cpu(tmp_path: Path, small: SimpleNamespace, kind: str, compile: bool) -> None:
    """From one shard, and from a saved file made of four; in captured steps as in others. In 8 bit the GPU has a scale for each
    row where the CPU, and the file, have groups."""
    prompt, options = [[1, 5, 9, 30, 8, 77]], dict(quantize=kind, dtype="bfloat16")
    llama = build(small, device="cuda", compile=compile, **options)
    ids = torch.tensor(prompt)
    want = build(small, device="cpu", **options).model.forward(ids, 0)
    for logits in (engine_logits(llama.engine.forward(), ids.cuda(), 0), llama.model.forward(ids, 0)):
        assert (logits.cpu() - want).norm() < 0.03 * want.norm()
    with torch.autocast("cuda", torch.float16):  # as test_quantize has it of the CPU
        assert (llama.model.forward(ids, 0).cpu() - want).norm() < 0.05 * want.norm()
    answers = []
    for captures in (False, True):
        backend = captured(llama, captures)
        answers.append(llama.generate(PROMPTS, 100, temperature=0, logprobs=True))
    assert backend.captures and backend.steps and answers[0] == answers[1]
    folder = write_shards(tmp_path, small.params, small.weights, 4)
    packed_file.save_packed_file(folder, kind)
    from_file = build(small, folder, device="cuda", compile=compile, **options).generate(PROMPTS, 100, 0.0, logprobs=True)
    assert compile or kind == "int8" or from_file == answers[0]  # what is tuned anew may sum in another order


def test_hooks_see_every_step(small: SimpleNamespace) -> None:
    """Of a captured step they would see the capture. The embedding, too."""
    llama = build(small, device="cuda")
    want, seen = llama.generate(PROMPTS[:1], 6, temperature=0), []
    for module in (llama.model.tok_embeddings, llama.model.layers[0].feed_forward.w2, llama.model.output):
        handle = module.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
        assert llama.generate(PROMPTS[:1], 6, temperature=0) == want
        handle.remove()
    assert seen == [5, 1, 1, 1, 1, 1] * 3
    assert llama.generate(PROMPTS[:1], 6, temperature=0) == want and len(seen) == 3 * 6


def test_the_fastest_is_chosen(small: SimpleNamespace) -> None:
    """On a GPU by itself the one that captures; the others by name. All give the same ids."""
    answers = {}
    for name in ("auto", "eager", "torch", "cuda_graphs", "torch_compile"):
        llama = build(small, device="cuda", backend=name)
        assert llama.backend == ("cuda_graphs" if name == "auto" else name)
        assert isinstance(llama.engine.backend, TorchCompileBackend) == (name == "torch_compile")
        answers[name] = llama.generate(PROMPTS, 40, temperature=0)[0]
    assert all(answer == answers["eager"] for answer in answers.values())
