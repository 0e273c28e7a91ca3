"""A model may have more tokens than its tokenizer. They change no answer."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, InputError, Llama, plan, tuning
from llama.backends.cpu import CpuBackend
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.backends.layerwise import TorchBackend
from llama.backends.torch_compile import TorchCompileBackend
from llama.checkpoint import packed_file
from llama.engine import async_copy
from llama.engine.backend import Backend

from .support import assert_raises, random_weights, torchrun, write_shards

PARAMS = dict(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=64, norm_eps=1e-5, vocab_size=-1)
PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, 80, 81]]


def with_spare_rows(weights: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """Return weights with n more rows for tokens. If n > 1, the logit of a spare row is always far above all others."""
    loud = 100 * weights["output.weight"][5]
    signs = torch.tensor([1.0 if i % 2 else -1.0 for i in range(n)])
    output = torch.cat([weights["output.weight"], signs[:, None] * loud])
    embedding = torch.cat([weights["tok_embeddings.weight"], torch.full((n, output.shape[1]), 9.0)])
    return weights | {"output.weight": output, "tok_embeddings.weight": embedding}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> SimpleNamespace:
    """Write a model without spare rows, and the same model with 8; return their folders, the tokenizer and the weights."""
    weights, root = random_weights(PARAMS, 384, 192), tmp_path_factory.mktemp("spare")
    folders = {n: write_shards(root / str(n), PARAMS, with_spare_rows(weights, n)) for n in (0, 8)}
    return SimpleNamespace(folders=folders, tokenizer_path=tokenizer_path, weights=weights)


def build(models: SimpleNamespace, n: int, **options: Any) -> Llama:
    return Llama.build(models.folders[n], models.tokenizer_path, 32, 2, device="cpu", **options)


def all_answers(llama: Llama) -> list[Any]:
    """Return the answers of all kinds of calls: greedy, sampled, seeded, with a repetition penalty, streamed and scored."""
    torch.manual_seed(3)
    calls: list[dict[str, Any]] = [
        dict(temperature=0, echo=True),
        dict(temperature=1.0, top_p=1.0),
        dict(temperature=1.0, seed=7),
        dict(temperature=1.0, top_k=5, min_p=0.01, repetition_penalty=1.3, seed=[1, 2, 3]),
        dict(temperature=0, repetition_penalty=1.5),
    ]
    answers: list[Any] = [llama.generate(PROMPTS, 6, logprobs=True, **call) for call in calls]
    answers += [[list(token) for token in llama.generate_stream(PROMPTS, 6, 1.0, logprobs=True, seed=5)]]
    answers += ["".join(llama.text_completion_stream("the quick", 0, max_gen_len=8))]
    return [*answers, [score.logprobs for score in llama.score(["the quick"], [" brown fox"])]]


def assert_same(got: Any, want: Any) -> None:
    """Check that tokens and texts are equal, and that log probabilities are nearly equal."""
    assert type(got) is type(want)
    if isinstance(got, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        assert got == (pytest.approx(want, abs=1e-4) if isinstance(got, float) else want)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": TorchBackend,
    "cpu": CpuBackend,
    "cuda_graphs": CudaGraphsBackend,
    "torch_compile": lambda: TorchCompileBackend(backend="eager"),
}


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_spare_rows_change_no_answer_of_any_backend(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend == "cuda_graphs":  # launch each decode step before the host reads the tokens of the step before, as on CUDA
        monkeypatch.setattr(async_copy, "supports_async", lambda device: True)
    answers = []
    for n in (0, 8):
        llama = build(models, n, backend="eager" if backend == "eager" else "auto")
        if backend in BACKENDS:
            llama = Llama(llama.model, llama.tokenizer, BACKENDS[backend]())
        few = backend == "torch_compile"  # compiling is slow
        answers.append(llama.generate([[1, 5]], 3, temperature=0, logprobs=True) if few else all_answers(llama))
    assert_same(answers[1], answers[0])


@pytest.mark.parametrize("from_packed_file", [False, True])
@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_spare_rows_change_no_answer_of_packed_weights(
    models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, from_packed_file: bool
) -> None:
    """Use a single spare row, so that the size of the vocabulary is odd."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    answers = []
    for n in (0, 1):
        weights = {name: w.bfloat16() for name, w in with_spare_rows(models.weights, n).items()}
        folder = write_shards(tmp_path / str(n), PARAMS, weights, 1)
        if from_packed_file:
            packed_file.save_packed_file(folder, format)
            (folder / "consolidated.00.pth").unlink()
        quantize = None if format == "bfloat16" else format
        llama = Llama.build(folder, models.tokenizer_path, 32, 2, device="cpu", quantize=quantize)
        answers.append(all_answers(llama))
    assert_same(answers[1], answers[0])


def test_two_ranks_share_a_model_with_an_even_number_of_rows(models: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "answer.py"
    script.write_text(
        "import json, sys, torch.distributed as dist\nfrom llama import Llama, LlamaError\n"
        "*folders, tokenizer = sys.argv[1:]\n"
        "def build(folder): return Llama.build(folder, tokenizer, 32, 2, device='cpu')\n"
        f"answer = build(folders[0]).generate({PROMPTS}, 6, temperature=1.0, seed=7)[0]\n"
        "if dist.get_rank() == 0: print(json.dumps(answer))\n"
        "try: build(folders[1])\n"
        "except LlamaError as e:\n"
        "    if dist.get_rank() == 0: print(e)\n"
    )
    params = PARAMS | {"n_kv_heads": 2}
    weights = random_weights(params, 384, 192)
    folders = [write_shards(tmp_path / str(n), params, with_spare_rows(weights, n)) for n in (0, 8, 1)]
    want = Llama.build(folders[0], models.tokenizer_path, 32, 2, device="cpu").generate(PROMPTS, 6, 1.0, seed=7)[0]
    done = torchrun(2, script, *folders[1:], models.tokenizer_path)
    answer, error = done.stdout.splitlines()
    assert json.loads(answer) == want and "vocabulary: 385 cannot be divided among 2 ranks" in error


def test_build_reports_spare_rows_and_calls_reject_their_tokens(
    models: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = build(models, 8)
    assert (
        "vocabulary has 392 tokens, the tokenizer only 384: tokens from 384 on are never generated" in capsys.readouterr().err
    )
    assert llama.model.params.vocab_size == llama.model.vocab_size == 392
    assert llama.model.forward(torch.tensor([[1, 391]]), 0).shape == (1, 2, 392)
    for call in (
        lambda: llama.generate([[1, 384]], 2),
        lambda: llama.generate([[1]], 2, stop_token=384),
        lambda: llama.tokenizer.decode([384]),
    ):
        assert_raises(call, InputError, "384", "383")
    build(models, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "n_spare, declared, parts",
    [
        (8, 392, None),
        (8, 384, ("vocab_size=384", "tok_embeddings.weight has 392 rows", "set vocab_size to 392")),
        (-4, -1, ("tok_embeddings.weight is (380, 64)", "tokenizer has 384 tokens", "model's own tokenizer.model")),
        (1024, -1, None),
        (1025, -1, ("(1409, 64)", "tokenizer has 384 tokens", "at most 1,024 more", "model's own tokenizer.model")),
    ],
)
def test_rows_must_agree_with_params_json_and_suit_the_tokenizer(
    models: SimpleNamespace, tmp_path: Path, n_spare: int, declared: int, parts: tuple[str, ...] | None
) -> None:
    weights = with_spare_rows(models.weights, max(n_spare, 0))
    if n_spare < 0:
        weights = {k: w[:n_spare] if k in ("output.weight", "tok_embeddings.weight") else w for k, w in weights.items()}
    folder = write_shards(tmp_path, PARAMS | {"vocab_size": declared}, weights)
    call = lambda: Llama.build(folder, models.tokenizer_path, 16, 1, device="cpu")  # noqa: E731
    if parts is None:
        assert call().generate([[1, 5]], 3)[0]
    else:
        assert_raises(call, CheckpointError, *parts)


def test_embedding_and_output_must_have_the_same_number_of_rows(models: SimpleNamespace, tmp_path: Path) -> None:
    weights = with_spare_rows(models.weights, 8) | {"output.weight": models.weights["output.weight"]}
    folder = write_shards(tmp_path, PARAMS, weights)
    call = lambda: Llama.build(folder, models.tokenizer_path, 16, 1, device="cpu")  # noqa: E731
    assert_raises(call, CheckpointError, "output.weight is (384, 64)", "tok_embeddings.weight", "(392, 64)", "same rows")


def test_a_plan_counts_spare_rows(models: SimpleNamespace) -> None:
    sizes = [plan(ckpt_dir=models.folders[n], ranks=[1], memory=1, bandwidth=1).splitlines()[2] for n in (0, 8)]
    bytes_of = [float(line.split()[-2]) * 1e6 for line in sizes]
    assert bytes_of[1] - bytes_of[0] == pytest.approx(2 * 8 * 64 * 4, abs=1000)  # rows of 64 float32 in two matrices
