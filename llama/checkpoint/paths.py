"""Find the model and tokenizer to load: the paths that a caller gives, or the bundled demo model."""

import os
import sys
from pathlib import Path

from ..distributed.groups import global_rank
from ..errors import CheckpointError, InputError
from .layouts import read_params

# The folder of the demo model in an installed package, and in a clone of the repository.
DEMO_FOLDERS = (Path(__file__).parents[1] / "_demo", Path(__file__).parents[2] / "demo")


def resolve_model_paths(
    ckpt_dir: str | os.PathLike[str] | None = None, tokenizer_path: str | os.PathLike[str] | None = None
) -> tuple[str, str]:
    """Return (ckpt_dir, tokenizer_path) as text, with defaults for paths that are not given.

    By default, tokenizer_path is that of `find_tokenizer`. If neither path is given, return the paths of the bundled demo
    model, and print a line about it on stderr.
    Raises InputError if only tokenizer_path is given. Raises CheckpointError if ckpt_dir is not a folder with a valid
    params.json, if there is no tokenizer, and if the demo model is not installed.
    """
    if ckpt_dir is not None:
        if tokenizer_path is None:
            read_params(ckpt_dir)  # first, so that a wrong folder is not reported as a missing tokenizer
            tokenizer_path = find_tokenizer(ckpt_dir)
        return str(ckpt_dir), str(tokenizer_path)
    if tokenizer_path is not None:
        raise InputError(f"tokenizer_path={tokenizer_path!r} without ckpt_dir; give both, or neither for the demo model")
    for folder in DEMO_FOLDERS:
        if (folder / "model" / "params.json").is_file():
            if global_rank() == 0:
                print("no ckpt_dir given: using the tiny bundled demo model (see demo/README.md)", file=sys.stderr)
            return str(folder / "model"), str(folder / "tokenizer.model")
    raise CheckpointError("the demo model is not installed here; give ckpt_dir and tokenizer_path of Meta's weights")


def find_tokenizer(ckpt_dir: str | os.PathLike[str]) -> Path:
    """Return the path of a model's tokenizer: tokenizer.model or tokenizer.json in its folder, or tokenizer.model above it.

    Raises CheckpointError if there is none.
    """
    folder = Path(ckpt_dir).expanduser()
    for place in (folder, folder.absolute().parent, folder.resolve().parent):  # ckpt_dir may be a link to the folder
        for name in ("tokenizer.model", *["tokenizer.json"] * (place == folder)):
            if (place / name).is_file():
                return place / name
    raise CheckpointError(
        f"ckpt_dir is {str(ckpt_dir)!r}: no tokenizer.model in it or in its parent folder; give its path as tokenizer_path, "
        "or put the model's tokenizer.json into the folder"
    )
