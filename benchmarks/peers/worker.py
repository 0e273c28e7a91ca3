"""One peer in one process: load the model, then answer one request per line of stdin with one line of stdout, in JSON.

    python -m peers.worker '{"peer": "ours", ...}'    # a peers.Job; started by speed.py, with this folder on PYTHONPATH

First line out: {"seconds": to load it and make one id, "device_peak": bytes on the GPU or 0}. Then, for each
{"prompts": [[ids], ...], "new": how many, "least": seconds}, a line {"times": [[first, rest], ...], "ids": [[ids], ...]}:
a request is repeated until it has taken `least` seconds, so that small models are timed over more than a blink.
"""

import json
import os
import sys
import time
from typing import Any

from peers import Job, find


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print does not get between the answers

    def say(**answer: Any) -> None:
        stdout.write(json.dumps(answer) + "\n")

    job = Job(**json.loads(sys.argv[1]))
    kind = find(job.peer)  # importing is not loading
    begun = time.perf_counter()
    peer = kind(job)
    peer.generate([[1]], 1)  # a mapped file is loaded only once it has been read
    seconds, device_peak = time.perf_counter() - begun, 0
    if job.device == "cuda":
        import torch

        device_peak = torch.cuda.max_memory_allocated()
    say(seconds=seconds, device_peak=device_peak)

    for line in sys.stdin:
        request = json.loads(line)
        times: list[tuple[float, float]] = []
        begun = time.perf_counter()
        while not times or time.perf_counter() - begun < request["least"]:
            answer = peer.generate(request["prompts"], request["new"])
            times.append((answer.first, answer.rest))
        say(times=times, ids=answer.ids)


if __name__ == "__main__":
    main()
