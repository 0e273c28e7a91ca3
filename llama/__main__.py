"""Run the command line `python -m llama`, which cli/main.py defines."""

from .cli.main import run

if __name__ == "__main__":
    run()
