"""Compute the hidden states of sequences, without the KV cache.

State 0 is the token embeddings, state i the output of layer i, counted from 1, and the last state that of the last layer after
the final norm. transformers numbers its `hidden_states` in the same way.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..distributed.progress import progress
from ..distributed.threads import pool_released_if_long
from ..errors import InputError, describe, is_integer
from .checks import device_of, nonfinite_states_error
from .engine import Engine
from .leading import check_led
from .prefill import side_by_side, states_of_layers
from .reference_loop import move_buffers
from .request_builder import to_list
from .shared_state import CacheOwner

OWN_HOOKS = "take the hidden states with forward hooks of your own"


def check_layers(layers: int | Iterable[int] | None, n_layers: int) -> list[int]:
    """Return the numbers of the states that are asked for, 0 to n_layers. A negative number counts from the end.

    layers: None for the last, one number, or several. Raise InputError for anything else.
    """
    expected = f"None for the last, a whole number from {-n_layers - 1} to {n_layers}, or a list of them"
    is_one = layers is None or not isinstance(layers, Iterable)
    chosen: list[Any] = [n_layers if layers is None else layers] if is_one else to_list(layers, "layers", expected)  # type: ignore[arg-type]
    if not chosen:
        raise InputError(f"layers is empty; it must be {expected}")
    for layer in chosen:
        if not (is_integer(layer) and -n_layers - 1 <= int(layer) <= n_layers):
            raise InputError(f"layers has {describe(layer)}; it must be {expected}: 0 is the embeddings")
    return [int(layer) % (n_layers + 1) for layer in chosen]


def number_of_layers(model: Any) -> int:
    """Return the number of layers of a model, which a caller may have replaced. Raise InputError if it lacks a module."""
    modules = getattr(model, "tok_embeddings", None), getattr(model, "norm", None), *getattr(model, "layers", [None])
    if not all(isinstance(module, torch.nn.Module) for module in modules):
        raise InputError(
            f"the model is a {type(model).__name__} without Transformer's modules tok_embeddings, layers and norm, which have "
            f"the hidden states; {OWN_HOOKS}"
        )
    return len(modules) - 2


@torch.inference_mode()
@pool_released_if_long()
def hidden_states(
    engine: Engine,
    sequences: list[list[int]],
    labels: list[str],
    layers: list[int],
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Return `reduce` of the states (len(layers), tokens, dim) of each sequence, in float32 on the CPU.

    Sequences are computed side by side, up to PREFILL_CHUNK tokens at a time; a longer sequence is computed alone. A modified
    model computes one sequence at a time. labels: name each sequence in errors.
    """
    engine.check_sizes()
    check_led(engine)
    why = engine.why_reference_loop()
    if why:
        with engine.whole_calls_ended():
            engine.announce(why)
            move_buffers(engine.model)
            engine.shared.owner = CacheOwner("hidden_states")  # open streams cannot continue: the cache is overwritten
    results = []
    batches = [[i] for i in range(len(sequences))] if why else side_by_side([len(sequence) for sequence in sequences])
    for members in progress(batches, lambda members: sum(len(sequences[i]) for i in members), "hidden states", "tokens"):
        some = [sequences[i] for i in members]
        with engine.computing():
            if leader := engine.shared.leader:
                leader.announce_states(some)
            if why:
                states = states_of_modules(engine.model, some[0], layers)
            else:
                states = torch.stack(states_of_layers(engine.forward(), some, layers))
        for i, each in zip(members, states.split([len(sequence) for sequence in some], dim=1), strict=True):
            if not each.isfinite().all():
                layer = next(layer for layer, state in zip(layers, each, strict=True) if not state.isfinite().all())
                raise nonfinite_states_error(engine.model, labels[i], layer)
            results.append(_normal_tensor(reduce(each.float())))
    return results


def _normal_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor of inference mode to one on the CPU that a caller may use in training."""
    with torch.inference_mode(False):
        copy = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    return copy.copy_(tensor)


def states_of_modules(model: Any, sequence: list[int], layers: list[int]) -> torch.Tensor:
    """Return the states (len(layers), N, dim) of a sequence of N tokens, from the modules of a modified model.

    The model's own `forward` runs. What a module's hooks return counts as its output. Raise InputError if `forward` does not
    run each module once, on all tokens.
    """
    outputs: dict[int, list[Any]] = {layer: [] for layer in layers}
    modules = dict(enumerate([model.tok_embeddings, *model.layers]))
    modules[len(model.layers)] = model.norm
    with _hooks({modules[layer]: outputs[layer] for layer in outputs}):
        model.forward(torch.tensor([sequence], device=device_of(model)), 0)
    for layer, found in outputs.items():
        name = {0: "tok_embeddings", len(model.layers): "norm"}.get(layer, f"layers.{layer - 1}")
        shape = 1, len(sequence), model.params.dim
        if len(found) != 1 or not isinstance(found[0], torch.Tensor) or found[0].shape != shape:
            what = f"ran {name} {len(found)} times" if len(found) != 1 else f"got {describe(found[0])} from {name}"
            raise InputError(f"the model's own forward {what}, and one output {shape} is needed; {OWN_HOOKS}")
    return torch.stack([outputs[layer][0][0] for layer in layers])


@contextlib.contextmanager
def _hooks(outputs: dict[torch.nn.Module, list[Any]]) -> Iterator[None]:
    """Append what each module returns to its list."""
    handles = []
    for module, found in outputs.items():
        handles.append(module.register_forward_hook(lambda module, args, output, found=found: found.append(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
