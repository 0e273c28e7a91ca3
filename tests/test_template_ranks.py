"""On several ranks, rank 0 renders chat templates, which may give each rank another text, and all ranks get its result."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from .hf_text import write
from .hugging_face import write_hugging_face
from .support import torchrun

pytest.importorskip("jinja2", minversion="3.1.6")

WORKER = Path(__file__).with_name("template_rank_worker.py")
TEMPLATE = """\
{% if messages[-1].content == 'refuse' %}{{ raise_exception('not that') }}{% endif %}
{% if messages[-1].content == 'escape' %}{{ messages.append(1) }}{% endif %}
{{ range(99999) | random }} {{ 'x ' * (range(12) | random) }}
{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}"""


@pytest.fixture(scope="module")
def folder(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_hugging_face(tmp_path_factory.mktemp("hf"), small.params, small.weights)
    shutil.copy(small.tokenizer_path, folder / "tokenizer.model")
    return write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE})


@pytest.mark.parametrize("model_parallel_size", [1, 2], ids=["two replicas", "one model"])
def test_all_ranks_take_what_rank_0_renders(folder: Path, tmp_path: Path, model_parallel_size: int) -> None:
    done = torchrun(2, WORKER, tmp_path / "out", folder, model_parallel_size)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(2)]
    errors = [result.pop("errors") for result in results]
    assert results[0] == results[1]
    assert results[0]["lengths"].startswith("InputError: ") and results[0]["conversation"][-1] == [["refused", "the question"]]
    assert len(results[0]["conversation"][-2]) < 8  # so some were forgotten

    refused, escaped, *differ, too_long, other_template, no_file = zip(*errors, strict=True)
    assert refused == ("InputError: dialog 1: the model's chat template refuses the dialog: not that",) * 2
    assert escaped[0].startswith("CheckpointError: ") and "SecurityError" in escaped[0] and escaped[1] == escaped[0]
    assert too_long[0].startswith("InputError: dialog 0 has ") and too_long[1] == too_long[0]
    wrong_dialog, wrong_option = differ.pop(2), differ.pop(2)
    for each, error in ((wrong_dialog, "InputError: dialog 0 is 5 (int)"), (wrong_option, "InputError: temperature is -1")):
        assert each[1].startswith(error) and each[0] == f"LlamaError: rank 1 failed, so every rank stops: {each[1]}"
    for each in (*differ, other_template):
        assert each[0].startswith("InputError: rank(s) 1 were given other input than rank 0") and each[1] == each[0]
    assert no_file[0] == "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"
    assert no_file[1] == f"LlamaError: rank 0 failed, so every rank stops: {no_file[0]}"
