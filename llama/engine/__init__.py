"""The engine: run requests in batches, with a KV cache, and turn their tokens into results."""
