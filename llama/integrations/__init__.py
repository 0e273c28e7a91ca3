"""Adapters for other libraries. None of them is imported with `llama`."""
