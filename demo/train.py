"""Train the demo model from nothing: tokenizer, weights, params.json and checklist.chk, into the folder demo/trained.

python demo/train.py
"""

import argparse
import hashlib
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo.corpus import Document, documents
from llama import ModelArgs, Tokenizer, Transformer
from llama.chat import encode_dialog
from llama.engine.kv_cache import RaggedBatch

HERE = Path(__file__).parent
SEED = 1
VOCAB_SIZE = 2048
PARAMS = dict(dim=160, n_layers=4, n_heads=8, n_kv_heads=4, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
WINDOW = 256  # longer documents are left out
BATCH_TOKENS, BATCH_ROWS = 2048, 128  # of all workers together
STEPS = 8000
WORKERS = 2  # on a CPU
PEAK, WARMUP, DECAY, CLIP = 4e-3, 150, 0.05, 1.0


def train_tokenizer(path: Path, n_documents: int = 30000) -> Tokenizer:
    """SentencePiece BPE as Llama 2's: byte fallback, digits apart, text as it is, BOS 1, EOS 2, no padding piece."""
    lines: list[str] = []
    stream = documents(SEED)
    for _ in range(n_documents):
        document = next(stream)
        lines += [line for line in document.plain().split("\n") if line]
        if document.dialog:  # the format's own tags
            lines.append("[INST] <<SYS>> <</SYS>> [/INST]")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        pad_id=-1,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=2,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], set[int]]:
    """A document's ids, and the places to learn: all of a text, the answers of a dialog.

    A finished exchange has a space between answer and EOS, as `encode_dialog` writes it. That space is not learned, so
    that the model ends right after its last word.
    """
    if document.text:
        ids = tokenizer.encode(document.text, bos=True, eos=True)
        return ids, set(range(1, len(ids)))
    dialog, learned, ids = document.dialog, set(), []
    for i, message in enumerate(dialog):
        if message["role"] == "assistant":
            prompt = encode_dialog(tokenizer, dialog[:i])
            answer = tokenizer.encode(message["content"], bos=False, eos=i == len(dialog) - 1)
            ids = prompt + answer
            learned.update(range(len(prompt), len(ids)))
    return ids, learned


def batches(tokenizer: Tokenizer, seed: int, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, RaggedBatch]]:
    """(ids, targets, where) for ever. Documents lie packed, each with its own attention; a target of -1 is not learned."""
    stream, rows, n_ids = documents(seed), [], 0
    while True:
        ids, learned = encode(tokenizer, next(stream))
        if len(ids) > WINDOW + 1:
            continue
        targets = [id_ if i in learned else -1 for i, id_ in enumerate(ids)][1:]
        ids = ids[:-1]
        fill = -len(ids) % 8  # few different lengths: few calls of the attention kernel
        rows.append((ids + [tokenizer.eos_id] * fill, targets + [-1] * fill))
        n_ids += len(rows[-1][0])
        if n_ids >= BATCH_TOKENS // workers or len(rows) == BATCH_ROWS // workers:
            rows.sort(key=lambda row: len(row[0]))
            packed = [torch.tensor([id_ for row in rows for id_ in row[i]]) for i in (0, 1)]
            yield packed[0], packed[1], RaggedBatch.of((i, 0, len(row[0])) for i, row in enumerate(rows))
            rows, n_ids = [], 0


def make_model(vocab_size: int, device: str) -> Transformer:
    torch.manual_seed(SEED)
    model = Transformer(ModelArgs(**PARAMS | {"vocab_size": vocab_size}, max_batch_size=BATCH_ROWS, max_seq_len=WINDOW))
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.dim() == 2:
            deep = (2 * PARAMS["n_layers"]) ** -0.5 if name.endswith(("wo.weight", "w2.weight")) else 1.0
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * deep)
    return model.to(device)


def learning_rate(step: int, done: float) -> float:
    """A share of the peak: up in a line, down in half a cosine; `done` goes from 0 to 1."""
    return min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def loss_of(model: Transformer, ids: torch.Tensor, targets: torch.Tensor, where: RaggedBatch) -> torch.Tensor:
    hidden = model.hidden(ids, where, keep=False)
    learned = targets >= 0  # logits only where something is learned
    return F.cross_entropy(model.logits(hidden[learned]), targets[learned])


def save(model: Transformer, folder: Path) -> None:
    """The checkpoint as Meta lays it out, in bfloat16, with its checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to("cpu", torch.bfloat16).clone() for name, weight in model.state_dict().items()}
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    names = ("consolidated.00.pth", "params.json")
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(sums))


class Progress:
    """A bar on a terminal, else a line now and then; on stderr."""

    def __init__(self, steps: int) -> None:
        self.steps, self.begun, self.tokens, self.mean = steps, time.monotonic(), 0, 0.0

    def show(self, step: int, tokens: int, loss: float) -> None:
        self.tokens += tokens
        self.mean = loss if step == 1 else 0.98 * self.mean + 0.02 * loss
        took = time.monotonic() - self.begun
        left = took / step * (self.steps - step)
        text = f"step {step}/{self.steps}, loss {self.mean:.4f}, {self.tokens / took:,.0f} ids/s, {left / 60:.1f} min left"
        if sys.stderr.isatty():
            done = 30 * step // self.steps
            print(f"\r[{'#' * done}{'.' * (30 - done)}] {text}  ", end="", file=sys.stderr, flush=True)
        elif step % 100 == 0 or step == self.steps:
            print(text, file=sys.stderr, flush=True)


def share(model: Transformer, workers: int, minutes: float) -> float:
    """Every worker's gradients become the mean of all; returns rank 0's `minutes`."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()] + [torch.tensor([minutes])])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in model.parameters()] + [1]
    *grads, minutes = flat.split(sizes)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad.copy_(grad.view_as(p) / workers)
    return minutes.item()


def work(rank: int, workers: int, meeting: str, args: argparse.Namespace) -> None:
    """One worker's training: on a CPU one worker for each core, which needs less waiting than threads do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    tokenizer = Tokenizer(args.out / "tokenizer.model")
    model = make_model(tokenizer.n_words, device)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), fused=True)
    if args.resume:
        model.load_state_dict(torch.load(args.out / "model" / "consolidated.00.pth", weights_only=True))
    progress = Progress(args.steps)
    if rank == 0:
        n_params = sum(weight.numel() for weight in model.parameters())
        print(f"{n_params:,} parameters, {tokenizer.n_words} pieces, on {workers} {device}", file=sys.stderr, flush=True)
    for step, (ids, targets, where) in enumerate(batches(tokenizer, args.seed + 1 + rank, workers), 1):
        if device != "cpu":
            ids, targets = ids.to(device), targets.to(device)
            where = RaggedBatch(where.rows.to(device), where.positions.to(device), where.spans)
        loss = loss_of(model, ids, targets, where)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        minutes = (time.monotonic() - progress.begun) / 60 * (rank == 0)
        if workers > 1:
            minutes = share(model, workers, minutes)
        done = max(step / args.steps, minutes / args.minutes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = args.peak * learning_rate(step - 1, done)
        optimizer.step()
        if rank == 0:
            progress.show(step, len(ids) * workers, loss.item())
            if step % args.save_every == 0 or done >= 1:
                save(model, args.out / "model")
        if done >= 1:
            break
    if rank == 0:
        took = (time.monotonic() - progress.begun) / 60
        print(f"\n{step:,} steps, {progress.tokens:,} ids in {took:.1f} minutes; {args.out / 'model'} written", file=sys.stderr)
    if workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "trained", help="where tokenizer.model and model/ go")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after this time, if before the last step")
    parser.add_argument("--resume", action="store_true", help="go on with the weights that are there, and their tokenizer")
    parser.add_argument("--peak", type=float, default=PEAK, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=SEED, help="of the text")
    parser.add_argument("--save_every", type=int, default=250, help="steps between checkpoints on the way")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        train_tokenizer(args.out / "tokenizer.model")
    if torch.cuda.is_available():
        work(0, 1, "", args)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (WORKERS, f"{folder}/meeting", args), nprocs=WORKERS)


if __name__ == "__main__":
    main()
