"""The eager backend: `Transformer.forward`, module by module, on plain tensors."""

from ..engine.backend import Backend


class EagerBackend(Backend):
    """Keep plain tensors. The engine then runs the model's own `forward`, and calls no method of this backend."""

    name = "eager"
