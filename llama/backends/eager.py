"""TODO."""

from ..engine.backend import Backend


class EagerBackend(Backend):
    name = "eager"
