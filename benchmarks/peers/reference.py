"""The reference's way of stepping, written anew from what is known of it, as users of Meta's code know it.

fairscale's layers, one for each of wq, wk, wv, w1, w2 and w3; complex numbers for the rotary embedding; keys and values
expanded to every query head; attention as matmul, softmax, matmul; logits at every position. Prompts of unequal length
are fed together from the shortest one's end on, id by id, those already known in place of those made.
"""

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from torch import distributed, nn

from peers import Answer, Job

PAD, EOS = -1, -2  # no id is EOS: nothing ends a row


def columns(n_in: int, n_out: int, gather: bool = False) -> ColumnParallelLinear:
    return ColumnParallelLinear(n_in, n_out, bias=False, gather_output=gather, init_method=lambda w: w)


def rows(n_in: int, n_out: int) -> RowParallelLinear:
    return RowParallelLinear(n_in, n_out, bias=False, input_is_parallel=True, init_method=lambda w: w)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn adjacent pairs of x (B, S, heads, hd) by complex numbers (1, S, 1, hd/2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.head_dim, self.n_rep = dim // n_heads, n_heads // n_kv_heads
        self.wq, self.wo = columns(dim, dim), rows(dim, dim)
        self.wk, self.wv = (columns(dim, n_kv_heads * self.head_dim) for _ in range(2))
        self.keys = self.values = torch.empty(0)  # (B, length, n_kv_heads, hd)

    def forward(self, x: torch.Tensor, start: int, turns: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        self.keys[:B, start : start + S] = rotate(k, turns)
        self.values[:B, start : start + S] = v
        q = rotate(q, turns).transpose(1, 2)
        k, v = (self.expand(c[:B, : start + S]).transpose(1, 2) for c in (self.keys, self.values))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        return self.wo(out.transpose(1, 2).contiguous().view(B, S, -1))

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, kv heads, hd) -> (B, L, heads, hd), each head repeated in place."""
        return x.unsqueeze(3).expand(-1, -1, -1, self.n_rep, -1).flatten(2, 3)


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = columns(dim, width), rows(width, dim), columns(dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, n_heads, n_kv_heads), FeedForward(dim, width)
        self.attention_norm, self.ffn_norm = Norm(dim, eps), Norm(dim, eps)

    def forward(self, x: torch.Tensor, start: int, turns: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), start, turns, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Model(nn.Module):
    def __init__(self, params: dict, vocab_size: int, width: int) -> None:
        super().__init__()
        self.dim, self.n_heads, self.theta = params["dim"], params["n_heads"], params.get("rope_theta", 10000.0)
        self.n_kv_heads, eps = params.get("n_kv_heads") or self.n_heads, params["norm_eps"]
        self.tok_embeddings = ParallelEmbedding(vocab_size, self.dim, init_method=lambda w: w)
        self.layers = nn.ModuleList(
            Block(self.dim, self.n_heads, self.n_kv_heads, width, eps) for _ in range(params["n_layers"])
        )
        self.norm, self.output = Norm(self.dim, eps), columns(self.dim, vocab_size, gather=True)

    def allocate(self, n_rows: int, length: int) -> None:
        head_dim, like = self.dim // self.n_heads, self.norm.weight
        for layer in self.layers:
            layer.attention.keys = like.new_zeros(n_rows, length, self.n_kv_heads, head_dim)
            layer.attention.values = like.new_zeros(n_rows, length, self.n_kv_heads, head_dim)
        freqs = self.theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(length).float(), freqs)
        self.turns = torch.polar(torch.ones_like(angles), angles).to(like.device)

    def forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """ids (B, S) -> logits (B, S, vocab)."""
        S = ids.shape[1]
        h = self.tok_embeddings(ids)
        turns = self.turns[start : start + S].view(1, S, 1, -1)
        mask = None
        if S > 1:  # only ever from position 0 on
            mask = torch.full((S, S), float("-inf"), device=h.device).triu(1).type_as(h)
        for layer in self.layers:
            h = layer(h, start, turns, mask)
        return self.output(self.norm(h)).float()


class Reference:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        initialize_model_parallel(1)
        params = json.loads(Path(job.ckpt, "params.json").read_text())
        stored = torch.load(f"{job.ckpt}/consolidated.00.pth", map_location="cpu", weights_only=True)
        width, vocab_size = len(stored["layers.0.feed_forward.w1.weight"]), len(stored["output.weight"])
        torch.set_default_dtype(getattr(torch, job.dtype))
        self.model = Model(params, vocab_size, width).to(job.device)
        torch.set_default_dtype(torch.float32)
        self.model.load_state_dict({name: w for name, w in stored.items() if name != "rope.freqs"})
        self.device = job.device

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        lengths = [len(p) for p in prompts]
        shortest, longest, total = min(lengths), max(lengths), max(lengths) + new
        self.model.allocate(len(prompts), total)
        begun = first = time.perf_counter()
        tokens = torch.full((len(prompts), total), PAD, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        given = tokens != PAD
        reached = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        start = 0
        for position in range(shortest, total):
            logits = self.model(tokens[:, start:position], start)
            chosen = logits[:, -1].argmax(-1)
            chosen = torch.where(given[:, position], tokens[:, position], chosen)
            tokens[:, position] = chosen
            reached |= ~given[:, position] & (chosen == EOS)
            start = position
            if all(reached):
                break
            if position == longest:
                first = time.perf_counter()
        result = tokens.tolist()
        ended = time.perf_counter()
        return Answer(first - begun, ended - first, [row[n : n + new] for row, n in zip(result, lengths, strict=True)])
