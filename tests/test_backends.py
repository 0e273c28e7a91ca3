"""Every backend gives the results of the reference model. Backends are chosen by name, and missing extensions are reported.

Decode steps for CUDA run on the CPU here: in static memory as on a GPU, but without CUDA graphs.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llama import DeviceError, InputError, Llama, info, tuning
from llama.backends import cpu, registry
from llama.backends.cpu import CpuBackend
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.backends.layerwise import TorchBackend
from llama.backends.torch_compile import TorchCompileBackend
from llama.engine.backend import Backend
from llama.engine.kv_cache import RaggedBatch
from llama.kernels import avx2, avx512, pack

from .support import TORCHRUN, no_extension, random_weights, run, write_shards

PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, 80, 81]]
MAX_SEQ_LEN = 40
PARAMS = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=64, norm_eps=1e-5, vocab_size=-1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> SimpleNamespace:
    """Write a model in two shards that is wide enough for all compiled kernels, with 64 values per head."""
    folder = write_shards(tmp_path_factory.mktemp("wide"), PARAMS, random_weights(PARAMS, 384, 704), 2)
    return SimpleNamespace(folder=folder, tokenizer_path=tokenizer_path)


@pytest.fixture(params=["with compiled code", "without"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Run the test twice: with the compiled kernels (yield True) and without them (yield False)."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)  # sets no minimum size, so that even small weights are packed
    if request.param == "without":
        for module, name in ((avx512, "status"), (avx2, "status"), (pack, "status")):
            monkeypatch.setattr(module, name, no_extension)
    yield request.param != "without"


def build(wide: SimpleNamespace, **options: object) -> Llama:
    return Llama.build(wide.folder, wide.tokenizer_path, MAX_SEQ_LEN, 4, device="cpu", **options)  # type: ignore[arg-type]


def build_with_backend(wide: SimpleNamespace, make_backend: Callable[[], Backend], **options: object) -> Llama:
    built = build(wide, **options)
    return Llama(built.model, built.tokenizer, make_backend())


@pytest.mark.parametrize("make_backend", [TorchBackend, CpuBackend, CudaGraphsBackend], ids=lambda backend: backend.name)
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_backend_gives_the_logits_of_the_reference(
    wide: SimpleNamespace, compiled: bool, dtype: str, format: str | None, make_backend: Callable[[], Backend]
) -> None:
    """Compare the logits of a ragged batch of prompts and of decode steps up to the last position of the context.

    A quantized model is compared with an unquantized model that has the dequantized weights.
    """
    reference = build(wide, dtype=dtype, quantize=format, backend="eager").model
    llama = build_with_backend(wide, make_backend, dtype=dtype, quantize=format)
    tolerance = 1e-3 if dtype == "float32" and format is None else 0.02 if dtype == "float32" else 0.12
    tokens = torch.randint(3, 384, (4, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(2))
    want = reference.forward(tokens, 0)
    starts = [5, 1, 12, MAX_SEQ_LEN - 1]
    forward = llama.engine.forward()
    with torch.inference_mode():
        ragged = torch.cat([row[:n] for row, n in zip(tokens, starts, strict=True)])
        hidden = forward.hidden_states(ragged, RaggedBatch.from_segments((row, 0, n) for row, n in enumerate(starts)))
        expected = torch.cat([row[:n] for row, n in zip(want, starts, strict=True)])
        torch.testing.assert_close(forward.logits(hidden), expected, atol=tolerance, rtol=0)
        decode, positions = llama.engine.backend.begin(forward, 4), list(starts)
        for _ in range(3):
            logits = decode(tokens[range(4), positions], torch.tensor(positions), positions)
            torch.testing.assert_close(logits, want[range(4), positions], atol=tolerance, rtol=0)
            positions = [min(position + 1, MAX_SEQ_LEN - 1) for position in positions]


@pytest.mark.parametrize("make_backend", [TorchBackend, CpuBackend, CudaGraphsBackend], ids=lambda backend: backend.name)
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_every_backend_generates_the_tokens_and_log_probabilities_of_the_reference(
    wide: SimpleNamespace, compiled: bool, format: str | None, make_backend: Callable[[], Backend]
) -> None:
    """Generate for more prompts than the batch has rows, up to the end of the context."""
    want, want_logprobs = build(wide, quantize=format, backend="eager").generate(
        PROMPTS * 2, 60, temperature=0, logprobs=True, echo=True
    )
    got, got_logprobs = build_with_backend(wide, make_backend, quantize=format).generate(
        PROMPTS * 2, 60, temperature=0, logprobs=True, echo=True
    )
    assert want_logprobs and got_logprobs
    for row, expected, logprobs, expected_logprobs in zip(got, want, got_logprobs, want_logprobs, strict=True):
        n_equal = next((i for i, (a, b) in enumerate(zip(row, expected, strict=True)) if a != b), len(expected))
        # With 8-bit activations two tokens of nearly equal probability may change places, after which the answers differ.
        assert n_equal == len(expected) or (format and n_equal > 6)
        assert logprobs[:n_equal] == pytest.approx(expected_logprobs[:n_equal], abs=0.05 if format else 1e-3)


def test_two_ranks_generate_the_tokens_of_one_process(wide: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "answer.py"
    script.write_text(
        "import json, sys\nfrom llama import Llama\nimport torch.distributed as dist\nfor format in (None, 'int8', 'int4'):\n"
        "    for backend in ('auto', 'eager'):\n"
        f"        llama = Llama.build(*sys.argv[1:], {MAX_SEQ_LEN}, 4, device='cpu', backend=backend, quantize=format)\n"
        f"        tokens, values = llama.generate({PROMPTS}, 12, temperature=0, logprobs=True)\n"
        "        if dist.get_rank() == 0: print(json.dumps([format, llama.backend, tokens, values]))\n"
    )
    done, tested = run(*TORCHRUN, 2, script, wide.folder, wide.tokenizer_path), []
    for line in done.stdout.splitlines():
        format, name, tokens, values = json.loads(line)
        tested.append((format, name))
        alone = build(wide, quantize=format, backend="eager").generate(PROMPTS, 12, temperature=0, logprobs=True)
        for row, expected, logprobs, expected_logprobs in zip(tokens, alone[0], values, alone[1] or [], strict=True):
            n_equal = next((i for i, (a, b) in enumerate(zip(row, expected, strict=True)) if a != b), len(expected))
            assert n_equal == len(expected) or (format and n_equal > 3)
            assert logprobs[:n_equal] == pytest.approx(expected_logprobs[:n_equal], abs=0.05 if format else 1e-3)
    default = build(wide).backend
    assert tested == [(format, name) for format in (None, "int8", "int4") for name in (default, "eager")], done.stderr


def test_without_compiled_kernels_answers_are_the_same_and_the_reason_is_printed(wide: SimpleNamespace) -> None:
    """LLAMA_COMPILED=0 switches the kernels off; stderr and `llama info` name the reason."""
    code = (
        f"from llama import Llama; paths = {str(wide.folder)!r}, {str(wide.tokenizer_path)!r}; "
        f"l = Llama.build(*paths, {MAX_SEQ_LEN}, 4, device='cpu'); print(l.backend, l.generate({PROMPTS}, 6, temperature=0)[0])"
    )
    done = run("-c", code, LLAMA_COMPILED="0")
    assert done.stdout == f"torch {build(wide, backend='eager').generate(PROMPTS, 6, temperature=0)[0]}\n"
    assert done.stderr.count("\n") == 1 and "slower than it could be, without compiled kernels: switched off" in done.stderr
    report = run("-m", "llama", "info", "--ckpt_dir", wide.folder, "--device", "cpu", LLAMA_COMPILED="0").stdout
    assert "backend: cpu            not available: switched off by LLAMA_COMPILED=0" in report


@pytest.mark.skipif(avx2.extension() is None, reason="nothing is compiled here")
@pytest.mark.parametrize("module", [avx512, avx2, pack], ids=lambda module: module.__name__)
def test_each_missing_extension_is_reported_on_stderr(
    wide: SimpleNamespace, module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the three extensions is missing, the other two are compiled. This CPU may lack instructions for one of them."""
    monkeypatch.setattr(module, "status", no_extension)
    kernels = avx512.extension() is not None or avx2.extension() is not None
    assert build(wide).backend == ("cpu" if kernels else "torch")
    assert capsys.readouterr().err == (
        f"llama: decoding is slower than it could be, without compiled kernels: {no_extension().reason}\n"
    )


def test_a_backend_is_chosen_by_name_and_an_unusable_name_raises(
    wide: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torch", "eager"):
        assert build(wide, backend=name).backend == name
    for bad in ("fast", 3, None, ["cpu"]):
        with pytest.raises(
            InputError, match=r"backend is .*use 'auto' or one of 'torch_compile', 'cuda_graphs', 'cpu', 'torch'"
        ):
            build(wide, backend=bad)
    with pytest.raises(DeviceError, match="backend='cuda_graphs': it is for CUDA, and the device is cpu; use backend='auto'"):
        build(wide, backend="cuda_graphs")
    with pytest.raises(DeviceError, match="compile=True is for CUDA, and this is cpu"):
        build(wide, compile=True)
    assert capsys.readouterr().err == ""
    report = info(wide.folder, "cpu")
    assert all(f"backend: {name}" in report for name in registry.BACKENDS) and "dim 256, 2 layers" in report


@pytest.mark.skipif(avx512.extension() is None, reason="the AVX-512 extension is not compiled, or this CPU cannot run it")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_width_that_prevents_the_fused_decode_step_is_reported(
    dtype: torch.dtype, tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A feed-forward width that is no multiple of 64 costs speed: each decode step then runs layer by layer."""
    params = PARAMS | {"multiple_of": 48}  # results in a feed-forward width of 720
    weights = {name: w.to(dtype) for name, w in random_weights(params, 384, 720).items()}
    folder = write_shards(tmp_path / "odd", params, weights)
    built = Llama.build(folder, tokenizer_path, MAX_SEQ_LEN, 2, device="cpu")
    message = (
        "layer by layer: the compiled decode step needs a feed-forward width that is a multiple of 64, and this one is 720"
    )
    assert message in capsys.readouterr().err
    assert "a multiple of 64, and this one is 720" in info(folder, "cpu")
    reference = Llama.build(folder, tokenizer_path, MAX_SEQ_LEN, 2, device="cpu", backend="eager")
    assert built.generate([[1, 5, 9]], 8, temperature=0) == reference.generate([[1, 5, 9]], 8, temperature=0)


@pytest.mark.skipif(avx512.extension() is None, reason="the AVX-512 extension is not compiled, or this CPU cannot run it")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_info_reports_which_models_decode_in_one_call(
    dtype: str, wide: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    weights = {name: w.to(getattr(torch, dtype)) for name, w in random_weights(PARAMS, 384, 704).items()}
    report = info(write_shards(tmp_path / dtype, PARAMS, weights), "cpu")
    forward = build(wide, dtype=dtype).engine.forward()
    why = "the compiled decode step needs bfloat16 or float32, and the model is in float16" if dtype == "float16" else None
    assert cpu.why_unsupported(forward) == why
    assert (f"layer by layer: {why}" if why else "one call of compiled code for all layers") in report


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_model_with_packed_weights_can_be_compiled(quantize: str | None, wide: SimpleNamespace) -> None:
    """torch.compile cannot trace the C kernels, so it must not reach them."""
    packed = build(wide, quantize=quantize, dtype="bfloat16")
    torch.compiler.reset()
    compiled = Llama(packed.model, packed.tokenizer, TorchCompileBackend(backend="eager"))
    assert len(compiled.generate(PROMPTS[:2], 3, temperature=0)[0]) == 2


def test_a_restored_model_needs_what_its_backend_needs(wide: SimpleNamespace) -> None:
    built = build(wide)
    on_gpu = pickle.dumps(Llama(built.model, built.tokenizer, CudaGraphsBackend()))
    with pytest.raises(DeviceError, match="backend='cuda_graphs': it is for CUDA, and the device is cpu"):
        pickle.loads(on_gpu)
    assert pickle.loads(pickle.dumps(built)).generate(PROMPTS[:2], 3, 0) == built.generate(PROMPTS[:2], 3, 0)
