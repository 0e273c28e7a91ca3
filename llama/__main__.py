"""`python -m llama`: see cli/main.py."""

from .cli.main import run

if __name__ == "__main__":
    run()
