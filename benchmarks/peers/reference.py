"""A reimplementation of the decode loop of facebookresearch/llama, as a baseline.

The model consists of fairscale's layers, one for each of wq, wk, wv, w1, w2 and w3. The rotary embedding uses complex numbers.
Keys and values are expanded to every query head. Attention is a matmul, a softmax and a matmul. Logits are computed at every
position. Prompts of unequal length are prefilled together up to the end of the shortest. Then all rows advance by one token per
step. As long as a longer prompt continues, the prompt's token replaces the generated token.
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

PAD, EOS = -1, -2  # values that a model never generates, so that no row ends early


def column_parallel(n_in: int, n_out: int, gather: bool = False) -> ColumnParallelLinear:
    return ColumnParallelLinear(n_in, n_out, bias=False, gather_output=gather, init_method=lambda w: w)


def row_parallel(n_in: int, n_out: int) -> RowParallelLinear:
    return RowParallelLinear(n_in, n_out, bias=False, input_is_parallel=True, init_method=lambda w: w)


def apply_rope(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding: multiply adjacent pairs of x (B, S, heads, hd) by complex freqs (1, S, 1, hd/2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.head_dim, self.n_rep = dim // n_heads, n_heads // n_kv_heads
        self.wq, self.wo = column_parallel(dim, dim), row_parallel(dim, dim)
        self.wk, self.wv = (column_parallel(dim, n_kv_heads * self.head_dim) for _ in range(2))
        self.keys = self.values = torch.empty(0)  # the KV cache: (B, length, n_kv_heads, hd)

    def forward(self, x: torch.Tensor, start: int, freqs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        self.keys[:B, start : start + S] = apply_rope(k, freqs)
        self.values[:B, start : start + S] = v
        q = apply_rope(q, freqs).transpose(1, 2)
        k, v = (self.repeat_kv(c[:B, : start + S]).transpose(1, 2) for c in (self.keys, self.values))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        return self.wo(out.transpose(1, 2).contiguous().view(B, S, -1))

    def repeat_kv(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat each key/value head n_rep times: (B, length, kv heads, hd) -> (B, length, heads, hd)."""
        return x.unsqueeze(3).expand(-1, -1, -1, self.n_rep, -1).flatten(2, 3)


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = column_parallel(dim, width), row_parallel(width, dim), column_parallel(dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, n_heads, n_kv_heads), FeedForward(dim, width)
        self.attention_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: torch.Tensor, start: int, freqs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), start, freqs, mask)
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
        self.norm, self.output = RMSNorm(self.dim, eps), column_parallel(self.dim, vocab_size, gather=True)

    def allocate_cache(self, n_rows: int, length: int) -> None:
        head_dim, template = self.dim // self.n_heads, self.norm.weight
        for layer in self.layers:
            layer.attention.keys = template.new_zeros(n_rows, length, self.n_kv_heads, head_dim)
            layer.attention.values = template.new_zeros(n_rows, length, self.n_kv_heads, head_dim)
        freqs = self.theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(length).float(), freqs)
        self.freqs = torch.polar(torch.ones_like(angles), angles).to(template.device)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Return logits (B, S, vocab) of tokens (B, S). start: the position of the first token of each row."""
        S = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        freqs = self.freqs[start : start + S].view(1, S, 1, -1)
        mask = None
        if S > 1:  # only the prefill has S > 1, and it starts at position 0, so that the mask is square
            mask = torch.full((S, S), float("-inf"), device=h.device).triu(1).type_as(h)
        for layer in self.layers:
            h = layer(h, start, freqs, mask)
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
        self.model.allocate_cache(len(prompts), total)
        begin = first = time.perf_counter()
        tokens = torch.full((len(prompts), total), PAD, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        in_prompt = tokens != PAD
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        start = 0
        for position in range(shortest, total):
            logits = self.model(tokens[:, start:position], start)
            next_tokens = logits[:, -1].argmax(-1)
            next_tokens = torch.where(in_prompt[:, position], tokens[:, position], next_tokens)
            tokens[:, position] = next_tokens
            ended |= ~in_prompt[:, position] & (next_tokens == EOS)
            start = position
            if all(ended):
                break
            if position == longest:
                first = time.perf_counter()
        result = tokens.tolist()
        end = time.perf_counter()
        return Answer(first - begin, end - first, [row[n : n + new] for row, n in zip(result, lengths, strict=True)])
