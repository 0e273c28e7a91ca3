"""One family of errors.

Every error a user can cause is a `LlamaError`: a `ValueError`, because the value is at fault, and an `AssertionError`,
because those who wrote against Meta's reference catch its bare assertions. Unlike those they survive `python -O`.
Each message names the value, the limit and the way out.
"""


class LlamaError(ValueError, AssertionError):
    """Base of every error this library raises for bad input."""


class InputError(LlamaError):
    """An argument of a call: prompts, dialogs, sampling parameters, sizes."""


class CheckpointError(LlamaError):
    """The files of a model: shards, `params.json`, `tokenizer.model`."""


class DeviceError(LlamaError):
    """Where it runs: devices, ranks, process groups, memory."""


def what_is_it(head: bytes) -> str:
    """What a file's first bytes say it is, for those who got another file than they think."""
    text = head.lstrip().lower()
    for start, name in (
        (b"version https://git-lfs", "it is a git-lfs pointer: run `git lfs pull`"),
        (b"<", "it is an HTML page or XML: the download failed"),
        (b"{", "it is JSON"),
        (b"", "it is empty" if not head else "it is cut off or damaged, or of another format"),
    ):
        if text.startswith(start):
            return name
    raise AssertionError("every text starts with nothing")
