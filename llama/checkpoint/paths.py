"""The bundled demo model: where it lies, in a clone or in an installed package."""

import sys
from pathlib import Path

from ..distributed.groups import global_rank
from ..errors import CheckpointError, InputError

DEMO_FOLDERS = (Path(__file__).parents[1] / "_demo", Path(__file__).parents[2] / "demo")  # installed; a clone


def resolve_model_paths(ckpt_dir: str | None = None, tokenizer_path: str | None = None) -> tuple[str, str]:
    """Both paths as given, the tokenizer's by default in ckpt_dir or beside it; if neither is given, those of the demo model,
    with one line on stderr that says so."""
    if ckpt_dir is not None:
        beside = (folder / "tokenizer.model" for folder in (Path(ckpt_dir), Path(ckpt_dir).absolute().parent))
        found = tokenizer_path or next((str(file) for file in beside if file.is_file()), None)
        if found is None:
            raise InputError(f"ckpt_dir={ckpt_dir!r}: no tokenizer.model in it or beside it; give tokenizer_path")
        return ckpt_dir, found
    if tokenizer_path is not None:
        raise InputError(f"tokenizer_path={tokenizer_path!r} without ckpt_dir; give both, or neither for the demo model")
    for place in DEMO_FOLDERS:
        if (place / "model" / "params.json").is_file():
            if global_rank() == 0:
                print("no ckpt_dir given: using the tiny bundled demo model (see demo/README.md)", file=sys.stderr)
            return str(place / "model"), str(place / "tokenizer.model")
    raise CheckpointError("the demo model is not installed here; give ckpt_dir and tokenizer_path of Meta's weights")
