"""`build` leaves no OpenMP threads waiting for the thread that called it, and computing goes on to work."""

import subprocess
import sys
from pathlib import Path

import pytest

from .support import ROOT

CODE = f"""
import os
import torch
from llama import Llama
from llama.distributed import threads

def n_threads():
    return len(os.listdir("/proc/self/task"))

if threads._openmp() is None:
    print("no function to release threads")
    raise SystemExit
torch.set_num_threads(3)
torch.ones(500, 500) @ torch.ones(500, 500)
before = n_threads()
llama = Llama.build({str(ROOT / "demo/model")!r}, {str(ROOT / "demo/tokenizer.model")!r}, 64, 1, device="cpu")
after = n_threads()
answers = [llama.text_completion(["The capital of France is"], temperature=0, max_gen_len=5) for _ in range(2)]
threads.release_pool()
answers.append(llama.text_completion(["The capital of France is"], temperature=0, max_gen_len=5))
print(before - after, all(answer == answers[0] for answer in answers))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux only")
def test_build_releases_the_openmp_threads_of_its_thread() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    if "no function" in result.stdout:
        pytest.skip("this OpenMP library cannot release threads")
    assert result.stdout.split() == ["2", "True"]
