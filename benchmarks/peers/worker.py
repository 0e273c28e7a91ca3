"""Run one peer in one process: load the model, then answer each request on stdin with a line on stdout, both in JSON.

    python -m peers.worker '{"peer": "ours", ...}'    # a peers.Job; started by speed.py, with this folder on PYTHONPATH

When the model is loaded, the worker prints {"seconds": S, "device_peak": N}. S is the time to load the model and generate one
token, and N is the peak GPU memory in bytes, 0 on a CPU. Each request is a line {"prompts": [[token, ...], ...], "new": number
of new tokens, "min_seconds": seconds}, and its answer is a line {"times": [[first, rest], ...], "tokens": [[token, ...], ...]}.
The worker repeats a request until `min_seconds` have passed, because a single run of a small model is too short to measure.
"times" contains the seconds of each repetition, as in `peers.Answer`; "tokens" contains the new tokens of the last repetition.
"""

import json
import os
import sys
import time
from typing import Any

from peers import Job, import_peer


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # redirect the output of all libraries to stderr, so that stdout contains only JSON

    def reply(**fields: Any) -> None:
        stdout.write(json.dumps(fields) + "\n")

    job = Job(**json.loads(sys.argv[1]))
    peer_class = import_peer(job.peer)  # import before the clock starts, because load time excludes imports
    start = time.perf_counter()
    peer = peer_class(job)
    peer.generate([[1]], 1)  # run the model once, because a memory-mapped file is loaded when the weights are first read
    seconds, device_peak = time.perf_counter() - start, 0
    if job.device == "cuda":
        import torch

        device_peak = torch.cuda.max_memory_allocated()
    reply(seconds=seconds, device_peak=device_peak)

    for line in sys.stdin:
        request = json.loads(line)
        times: list[tuple[float, float]] = []
        start = time.perf_counter()
        while not times or time.perf_counter() - start < request["min_seconds"]:
            answer = peer.generate(request["prompts"], request["new"])
            times.append((answer.first, answer.rest))
        reply(times=times, tokens=answer.tokens)


if __name__ == "__main__":
    main()
