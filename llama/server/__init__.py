"""The HTTP server of `python -m llama serve`, with OpenAI's wire format. Only that command imports it."""
