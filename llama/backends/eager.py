"""The eager backend: run `Transformer.forward`, module by module, on weights that are not packed."""

from ..engine.backend import Backend


class EagerBackend(Backend):
    """Leave the weights unpacked. The engine then runs the model's own `forward` and calls no method of this backend."""

    name = "eager"
