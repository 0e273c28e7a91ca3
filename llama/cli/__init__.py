"""The command line: `python -m llama` and its commands."""
