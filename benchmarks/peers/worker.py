"""Run one peer in one process: load the model, then answer each line of stdin with a line of stdout, in JSON.

    python -m peers.worker '{"peer": "ours", ...}'    # a peers.Job; started by speed.py, with this folder on PYTHONPATH

The first line of output is {"seconds": to load the model and generate one token, "device_peak": bytes on the GPU or 0}. A
request {"prompts": [[tokens], ...], "new": number of new tokens, "min_seconds": seconds} is answered with
{"times": [[first, rest], ...], "tokens": [[tokens], ...]}. Each request is repeated until `min_seconds` have passed, because
a single run of a small model is too short to measure.
"""

import json
import os
import sys
import time
from typing import Any

from peers import Job, import_peer


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # anything that a library prints goes to stderr, so that stdout contains JSON only

    def reply(**fields: Any) -> None:
        stdout.write(json.dumps(fields) + "\n")

    job = Job(**json.loads(sys.argv[1]))
    peer_class = import_peer(job.peer)  # before the clock starts: load time excludes imports
    start = time.perf_counter()
    peer = peer_class(job)
    peer.generate([[1]], 1)  # a memory-mapped file is loaded only once its weights have been read
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
