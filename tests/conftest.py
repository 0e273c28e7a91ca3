"""Fixtures for all tests: a small random model, its tokenizer, and the reference model with the same weights."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, Tokenizer, Transformer
from llama.backends.cuda_graphs import CapturedStep, CudaGraphsBackend
from llama.backends.registry import choose_backend
from llama.engine import async_copy

from .fault_server import FILES, ONE_CLIENT, SHARD, Downloader, FaultServer, files_of
from .support import ROOT, random_weights, train_tokenizer, write_shards

# Use one thread: with small tensors, synchronizing threads takes longer than computing (200 times as long on a busy machine).
torch.set_num_threads(1)

SMALL = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
SMALL_HIDDEN, VOCAB = 192, 384


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hide all GPUs from the tests, except from those of test_cuda.py."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_cuda":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", VOCAB)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> SimpleNamespace:
    """Write a small random model in one shard; return its folder, tokenizer_path, params and unsharded weights."""
    weights = random_weights(SMALL, VOCAB, SMALL_HIDDEN)
    folder = write_shards(tmp_path_factory.mktemp("small"), SMALL, weights)
    return SimpleNamespace(folder=folder, tokenizer_path=tokenizer_path, params=SMALL, weights=weights)


@pytest.fixture(scope="session")
def shared_llama(small: SimpleNamespace) -> Llama:
    return Llama.build(small.folder, small.tokenizer_path, max_seq_len=64, max_batch_size=6, device="cpu")


@pytest.fixture
def llama(shared_llama: Llama) -> Llama:
    """Return the small model, and seed torch's generator before each test."""
    torch.manual_seed(1)
    return shared_llama


@pytest.fixture(scope="session")
def reference(small: SimpleNamespace) -> Transformer:
    """Return the small model with unpacked weights and the eager backend, as the reference for other backends."""
    return Llama.build(
        small.folder, small.tokenizer_path, max_seq_len=64, max_batch_size=6, device="cpu", backend="eager"
    ).model


@pytest.fixture
def as_on_cuda(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decode on the CPU as on CUDA: in static memory, starting each decode step before the host reads the previous tokens."""
    run = CapturedStep.run

    def run_into_static_logits(step: CapturedStep) -> None:
        static_logits = step.logits
        run(step)
        step.logits = step.logits if static_logits is None else static_logits.copy_(step.logits)

    monkeypatch.setattr(CapturedStep, "run", run_into_static_logits)
    monkeypatch.setattr(llama.engine, "backend", CudaGraphsBackend())
    monkeypatch.setattr(async_copy, "supports_async", lambda device: True)
    yield


@pytest.fixture(params=["cpu", "eager", "as_on_cuda"])
def any_way(llama: Llama, reference: Transformer, request: pytest.FixtureRequest) -> Llama:
    """Return a model for each way to generate: the engine, `Transformer.forward`, steps that start before tokens are read."""
    if request.param == "eager":
        return Llama(reference, llama.tokenizer, choose_backend("eager", torch.device("cpu"))())
    if request.param == "as_on_cuda":
        request.getfixturevalue("as_on_cuda")
    return llama


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(FILES) as running:
        yield running


@pytest.fixture(params=["curl", "wget"])
def download(request: pytest.FixtureRequest, server: FaultServer, tmp_path: Path) -> Downloader:
    """Return a runner of download.sh with only one HTTP client in its PATH: curl or wget."""
    return Downloader(server, request.param, tmp_path)


@pytest.fixture
def downloader(server: FaultServer, tmp_path: Path) -> Downloader:
    """Return a runner of download.sh with one client, for tests that need not run with both curl and wget."""
    return Downloader(server, ONE_CLIENT, tmp_path)


@pytest.fixture
def shard_missing(download: Downloader) -> Downloader:
    """Return a runner of download.sh whose target folder already contains every file except the shard, to save time."""
    for path in set(files_of("7B")) - {SHARD}:
        download.put(path, FILES[path])
    return download


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Tokenizer:
    """Return Llama 2's own tokenizer, from the repository root or the shared fixtures; skip the test if there is none."""
    for path in (ROOT / "tokenizer.model", ROOT.parent / "shared" / "fixtures" / "llama2" / "tokenizer.model"):
        if path.exists():
            return Tokenizer(path)
    pytest.skip("Llama 2's tokenizer is not here")


@pytest.fixture(params=[False, True], ids=["cpu", "as on CUDA"])
def either_backend(request: pytest.FixtureRequest) -> bool:
    """Run a test with the CPU's backend, and with the twin of the backend for CUDA, which launches steps ahead."""
    if request.param:
        request.getfixturevalue("as_on_cuda")
    return request.param
