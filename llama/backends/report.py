"""Report how this machine would run a model: versions, device, compiled code and backends."""

import os
import platform

import torch

from ..checkpoint.layouts import read_params, stored_embedding
from ..distributed import cgroups, groups, threads
from ..distributed.setup import choose_device
from ..kernels import avx2, avx512, pack
from ..model import ModelArgs
from . import cpu, registry


def info(ckpt_dir: str | os.PathLike[str] | None = None, device: str | torch.device | None = None) -> str:
    """Return a report of versions, device, threads, compiled code and backends.

    For compiled code and backends that cannot be used, the report contains the reason. ckpt_dir: also report how decode steps
    of this checkpoint would run. Raises CheckpointError if ckpt_dir is not a checkpoint, and DeviceError for a device that does
    not exist.
    """
    chosen_device = choose_device(device)
    gpu = f", {torch.cuda.get_device_name(chosen_device)}" if chosen_device.type == "cuda" else ""
    lines = [
        ("llama", f"{_version()}, Python {platform.python_version()}, torch {torch.__version__}"),
        ("device", f"{chosen_device}{gpu}, {threads.allowed_threads()[0]} threads, {groups.world_size()} process(es)"),
    ]
    if quota := cgroups.cpu_quota():
        lines.append(("cpu quota", f"{quota.value:g} core(s), by {quota.file}"))
    amx = " and AMX" if avx512.uses_amx() else ""
    for name, status, use in (
        ("avx512", avx512.status(), "products, attention and decode steps with AVX-512" + amx),
        ("avx2", avx2.status(), "products with AVX2"),
        ("pack", pack.status(), "packing and quantizing weights"),
    ):
        lines.append((f"compiled: _{name}", f"found: {use}" if status.extension else f"not used: {status.reason}"))
    chosen = registry.choose_backend("auto", chosen_device)
    for name, backend in registry.BACKENDS.items():
        why = backend.unsupported(chosen_device)
        default = " (chosen by default)" if backend is chosen else ""
        lines.append((f"backend: {name}", f"not available: {why}" if why else f"available{default}"))
    if ckpt_dir is not None:
        params = read_params(
            ckpt_dir, "give the folder of the model that was adapted; python -m llama info, with the folder alone, describes it"
        )
        args = ModelArgs(**{**params, "vocab_size": max(params.get("vocab_size", 1), 1)})
        embedding = stored_embedding(ckpt_dir)
        stored = torch.bfloat16 if embedding is None else embedding.dtype
        lines.append(("checkpoint", f"dim {args.dim}, {args.n_layers} layers, feed-forward width {args.ffn_width}, {stored}"))
        if chosen.name == "cpu":
            why = cpu.why_shape_unsupported(args, stored, groups.world_size())
            lines.append(("decode steps", f"layer by layer: {why}" if why else "one call of compiled code for all layers"))
    return "\n".join(f"{label:<24}{text}" for label, text in lines)


def _version() -> str:
    from .. import __version__

    return __version__
