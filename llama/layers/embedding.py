"""The tensor-parallel token embedding."""

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fs_layers
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from ..distributed.groups import model_parallel
from .linear import InitMethod, divide, make_weight, small_normal_


class ParallelEmbedding(fs_layers.ParallelEmbedding):
    """Look up embeddings: tokens (...) -> (..., dim). Each rank stores dim / ranks columns of the table."""

    def __init__(self, num_embeddings: int, embedding_dim: int, init_method: InitMethod = small_normal_) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.ranks = model_parallel()[1]
        self.embedding_dim_per_partition = divide(embedding_dim, self.ranks, "embedding width")
        self.weight = make_weight(num_embeddings, self.embedding_dim_per_partition, init_method)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed(tokens, self.weight)

    def embed(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Look up tokens in a weight, which is this module's or an alias of it."""
        y = F.embedding(tokens, weight)
        return y if self.ranks == 1 else gather_from_model_parallel_region(y)
