"""The bundled demo model: where it lies, in a clone or in an installed package."""

import sys
from pathlib import Path

from .errors import CheckpointError, InputError
from .ranks import global_rank

PLACES = (Path(__file__).with_name("_demo"), Path(__file__).parents[1] / "demo")  # installed; a clone


def given_or_demo(ckpt_dir: str | None = None, tokenizer_path: str | None = None) -> tuple[str, str]:
    """Both paths as given; if neither is, those of the demo model, with one line on stderr that says so."""
    if ckpt_dir is not None and tokenizer_path is not None:
        return ckpt_dir, tokenizer_path
    if ckpt_dir is not None or tokenizer_path is not None:
        raise InputError(f"ckpt_dir={ckpt_dir!r}, tokenizer_path={tokenizer_path!r}: give both, or neither for the demo model")
    for place in PLACES:
        if (place / "model" / "params.json").is_file():
            if global_rank() == 0:
                print("no ckpt_dir given: using the tiny bundled demo model (see demo/README.md)", file=sys.stderr)
            return str(place / "model"), str(place / "tokenizer.model")
    raise CheckpointError("the demo model is not installed here; give ckpt_dir and tokenizer_path of Meta's weights")
