"""Count what the server does, and write it in Prometheus' text format."""

import bisect
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Histogram:
    """Observed seconds, counted by buckets with upper bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        lines, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*lines, f"{name}_sum {self.total}", f"{name}_count {so_far}"]


@dataclass
class Metrics:
    """What the server has done since its start. An answer waits until its first token, and then runs until its end."""

    rows: int  # answers that can run at a time
    in_flight: int = 0  # answers that have been accepted, and have not ended
    running: int = 0  # those of them that have got their first token
    prompt_tokens: int = 0
    completion_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path and status
    seconds_to_first_token: Histogram = field(
        default_factory=lambda: Histogram((0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0))
    )
    seconds_per_token: Histogram = field(
        default_factory=lambda: Histogram((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5))
    )

    def begin_answer(self, seconds: float) -> None:
        """Count the first token of an answer, which came after these seconds."""
        self.running += 1
        self.seconds_to_first_token.observe(seconds)

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        metrics: list[tuple[str, str, str, list[str] | int]] = [
            ("llama_rows", "gauge", "Rows of all batches: answers that can run at a time.", self.rows),
            ("llama_answers_running", "gauge", "Answers that have got their first token.", self.running),
            ("llama_answers_waiting", "gauge", "Answers that wait for their first token.", self.in_flight - self.running),
            ("llama_prompt_tokens_total", "counter", "Tokens of prompts, each prompt once.", self.prompt_tokens),
            ("llama_completion_tokens_total", "counter", "Tokens of answers.", self.completion_tokens),
            ("llama_guessed_tokens_total", "counter", "Guesses of tokens of ended answers.", self.guessed_tokens),
            ("llama_accepted_tokens_total", "counter", "Guesses that were right.", self.accepted_tokens),
            (
                "llama_requests_total", "counter", "HTTP requests, by path and status.",
                [
                    f'llama_requests_total{{path="{path}",status="{status}"}} {count}'
                    for (path, status), count in sorted(self.requests.items())
                ],
            ),
            (
                "llama_seconds_to_first_token", "histogram", "From the acceptance of an answer to its first token.",
                self.seconds_to_first_token.lines("llama_seconds_to_first_token"),
            ),
            (
                "llama_seconds_per_token", "histogram", "Mean time between two tokens of an answer.",
                self.seconds_per_token.lines("llama_seconds_per_token"),
            ),
        ]  # fmt: skip
        lines = []
        for name, kind, text, value in metrics:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name} {value}"] if isinstance(value, int) else value
        return "\n".join(lines) + "\n"
