"""Tensor-parallel layers: linear and embedding."""
