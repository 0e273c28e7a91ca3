"""Test what an installation provides: imports from any folder, compiled code, the demo model, and scripts that run."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llama.kernels import pack

from .support import ROOT, environment, run


def test_a_folder_named_llama_does_not_hide_the_installed_package(tmp_path: Path) -> None:
    """Import the package in a folder that contains a clone, which is a folder named llama without an __init__.py."""
    (tmp_path / "llama").mkdir()
    command = [sys.executable, "-m", "llama", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout.startswith("llama "), done.stderr


@pytest.mark.skipif(pack.status().extension is None, reason="the C extensions are not compiled here")
def test_uncompiled_sources_use_the_extensions_of_the_installed_package(tmp_path: Path) -> None:
    """Run the Python files of a clone in which nothing has been compiled, as after `pip install .`."""
    shutil.copytree(ROOT / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    script = tmp_path / "script.py"  # Python imports from a script's folder first
    script.write_text(
        "import llama; from llama.kernels import pack; print(llama.__file__, pack.status().extension is not None)"
    )
    done = run(script, PYTHONPATH=str(ROOT))
    assert done.stdout.split() == [str(tmp_path / "llama" / "__init__.py"), "True"], done.stderr
    source = tmp_path / "llama" / "kernels" / "csrc" / "pack.c"
    source.write_text(source.read_text() + "\n")
    done = run(script, PYTHONPATH=str(ROOT))
    assert done.stdout.split()[1] == "False" and "has changed since _pack was compiled" in done.stderr


def test_an_installed_wheel_contains_the_demo_model_and_the_servers_page(tmp_path: Path) -> None:
    """Build a wheel without a C compiler from a copy of the source, unpack it elsewhere, and generate with the package."""
    source = tmp_path / "source"
    for name in ("llama", "demo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = run("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source, CC="/bin/false")
    assert wheel.returncode == 0, wheel.stderr
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    code = (
        "from llama import Llama, resolve_model_paths\nprint(Llama.build(*resolve_model_paths()).text_completion(['The'])[0])"
    )
    done = run("-c", code, PYTHONPATH=str(tmp_path / "site"))
    assert "generation" in done.stdout, done.stderr
    assert (tmp_path / "site" / "llama" / "server" / "page.html").is_file()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is not a clone")
def test_a_clone_has_lf_line_ends_whatever_git_is_told() -> None:
    """Check the attributes that keep core.autocrlf=true from breaking the shell scripts."""
    done = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=True)
    wrong = [line for line in done.stdout.splitlines() if "eol=lf" not in line and "attr/-text" not in line]
    assert wrong == []
