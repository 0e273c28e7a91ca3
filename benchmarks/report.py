"""Print the results of speed.py as a table, and with --plot also plot them.

python benchmarks/report.py benchmarks/results/speed-1.1B-cpu.json [--plot FILE.svg]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def seconds_by_workload(results: Results, peer: str) -> dict[str, list[float]]:
    """Return the seconds that a peer needs for each workload, as a list with one value per run."""
    runs: dict[str, list[float]] = {workload["name"]: [] for workload in results["workloads"]}
    for record in results["runs"]:
        if record["peer"] == peer:
            runs[record["workload"]].append(record["seconds"])
    return runs


def median_ratio(seconds: list[float], baseline: list[float]) -> float:
    """Return the median of the ratio seconds / baseline over all runs.

    If the machine is slow during one run, both values of that run are longer, and their ratio is hardly affected.
    """
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def read_speed(results: Results, peer: str) -> tuple[float, float]:
    """Return the speed in bytes/s at which the workload decode-1 reads weights, and its ratio to the memory bandwidth."""
    size = results["step_bytes"][peer]
    runs = [r for r in results["runs"] if (r["peer"], r["workload"]) == (peer, "decode-1")]
    shares = [size / r["seconds"] / r["bandwidth"] for r in runs]
    return size / statistics.median(r["seconds"] for r in runs), statistics.median(shares)


def table(results: Results) -> list[str]:
    """Return the lines of a table with one column for each peer. The first column is this library.

    In the other columns, each figure is followed by a ratio that says how many times better this library is. The ratio is the
    median over the runs.
    """
    peers = list(results["load"])
    seconds = {peer: seconds_by_workload(results, peer) for peer in peers}
    ours = seconds[peers[0]]
    rows: list[list[str]] = [["", *(f"{peer}{'':8}" for peer in peers)]]

    def add_figures(label: str, values: list[float], number_format: str, ratios: list[float]) -> None:
        suffixes = ["", *(f"{ratio:.2f}x" for ratio in ratios[1:])]
        rows.append([label, *(f"{v:{number_format}}{suffix:>8}" for v, suffix in zip(values, suffixes, strict=True))])

    def add_detail(label: str, cells: list[str]) -> None:
        rows.append([f"  {label}", *(f"{cell}{'':8}" for cell in cells)])

    for name, n in ((w["name"], w["ids"]) for w in results["workloads"]):
        medians = [statistics.median(s[name]) for s in seconds.values()]
        ratios = [median_ratio(s[name], ours[name]) for s in seconds.values()]
        if n:
            add_figures(f"{name}, tokens/s", [n / t for t in medians], ",.1f", ratios)
        else:
            add_figures(f"{name}, s", medians, ".2f", ratios)
        if name == "decode-1":
            speeds = [read_speed(results, peer) for peer in peers]
            add_detail("weights read, GB/s", [f"{speed / 1e9:,.1f}" for speed, _ in speeds])
            add_detail("of the bandwidth", [f"{share:.0%}" for _, share in speeds])
        if name.startswith("decode-") and name != "decode-1" and "decode-1" in ours:
            add_detail("of one row's tokens/s", [f"{n * median_ratio(s['decode-1'], s[name]):.2f}x" for s in seconds.values()])
        if name.startswith("context-") and name != "context-128" and "context-128" in ours:
            add_detail("of context-128's time", [f"{median_ratio(s[name], s['context-128']):.2f}x" for s in seconds.values()])
    for label, key, unit in (("load, s", "seconds", 1.0), ("peak memory, GB", "peak", 1e9)):
        values = [statistics.median(load[key] for load in results["load"][peer]) / unit for peer in peers]
        add_figures(label, values, ".2f", [v / values[0] for v in values])
    add_detail("first tokens as ours", [f"{results['agreement'][peer]['first']:.0%}" for peer in peers])
    return [title(results), *(f"{label:24}" + "".join(f"{cell:>20}" for cell in cells).rstrip() for label, *cells in rows)]


def title(results: Results) -> str:
    n_runs = 1 + max(record["run"] for record in results["runs"])
    bandwidths = [r["bandwidth"] for r in results["runs"] if r["bandwidth"]]
    memory = f"; memory: {statistics.median(bandwidths) / 1e9:,.1f} GB/s" if bandwidths else ""
    threads = f"{results['threads']} threads on " if results["device"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['model']}, {results['bytes'] / 1e9:.2f} GB in {results['dtype']}; {threads}{results['machine']}{memory}\n"
        f"{versions}; medians of {n_runs}; x: how many times better ours is, the median over the runs\n"
    )


def plot(results: Results, path: Path) -> None:
    """Write an SVG with a group of bars for each workload: the speed of each peer, relative to the fastest other library."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = "#808a94"  # readable on a white and on a black background
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 9, "text.color": grey})
    peers, names = list(results["load"]), [w["name"] for w in results["workloads"]]
    seconds = {peer: seconds_by_workload(results, peer) for peer in peers}
    others = [peer for peer in peers if not peer.startswith("ours")] or peers
    colors = ["#2f81f7", "#e0823d", "#8b949e", "#3fa45b", "#a371f7"]
    figure, axes = pyplot.subplots(figsize=(8, 2.8))
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        fastest = {name: [min(run) for run in zip(*(seconds[other][name] for other in others), strict=True)] for name in names}
        speeds = [median_ratio(fastest[name], seconds[peer][name]) for name in names]
        centers = [x + (i - (len(peers) - 1) / 2) * width for x in range(len(names))]
        bars = axes.bar(centers, speeds, width * 0.92, color=colors[i % len(colors)], label=peer)
        if i == 0:
            axes.bar_label(bars, [f"{speed:.2f}" for speed in speeds], padding=1, color=grey, fontsize=8)
    axes.axhline(1, color=grey, linewidth=0.6)
    axes.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names], color=grey)
    axes.tick_params(colors=grey, length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("speed, fastest other = 1", color=grey)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(peers), frameon=False, labelcolor=grey)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file that speed.py wrote")
    parser.add_argument("--plot", type=Path, help="SVG file for a plot")
    a = parser.parse_args()
    results = json.loads(a.results.read_text())
    if not isinstance(results, dict) or "workloads" not in results:
        parser.error(f"{a.results} has no workloads: give a JSON file that speed.py wrote")
    print("\n".join(table(results)))
    if a.plot:
        plot(results, a.plot)


if __name__ == "__main__":
    main()
