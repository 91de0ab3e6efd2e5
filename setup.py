"""Packaging. ``kernels/`` and ``bench/`` are installed as ``misa_engine.kernels`` and ``misa_engine.bench``.

A top-level package named ``kernels`` would shadow the Hub's ``kernels``, which transformers imports when present.
``misa_engine/kernels`` and ``misa_engine/bench`` are relative links to the folders, so that editors, type checkers,
editable installs, wheels and source distributions all see one package without a mapping.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
#: The one place for the version is ``misa_engine/__init__.py``.
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "misa_engine/__init__.py").read_text(encoding="utf-8"))[1]

PLOTS = ["matplotlib>=3.9"]
# Liger's kernels are Triton's: pure Python on top of torch and triton, nothing to compile, unused without a GPU.
LIGER = "liger-kernel>=0.8; platform_system == 'Linux'"
TRAIN = ["trl>=1.10", "pyyaml>=6", LIGER, *PLOTS]
# misa sweep: its study lies in a sqlite file, so Optuna's other storages are not needed (7 MB with SQLAlchemy).
SWEEP = ["optuna>=5"]
# The methods that bench/ measures beside ours; a row of its table says which one is missing.
# apollo-torch is left out on purpose: its licence is mostly CC-BY-NC.
BENCH = [
    "peft>=0.17",
    "bitsandbytes>=0.48",
    "badam>=1.4",
    "galore-torch>=1.0",
    "torch-optimi>=0.3",
    "lomo-optim>=0.1.1",
    "flashoptim>=0.1.4; platform_system == 'Linux'",
    "torchao>=0.18",
    "reasoning-gym>=0.1.20",  # problems of misa bench learning
    "gguf>=0.16",  # misa fetch
    *PLOTS,
]

# misa eval: lm-eval's tasks, which bring scikit-learn, scipy and nltk (about 330 MB), and problems that are made.
EVAL = ["lm_eval[hf,ifeval]>=0.4.13", "reasoning-gym>=0.1.20"]

setup(
    name="misa_engine",
    version=VERSION,
    description="Train all weights of a language model on one consumer GPU by module-wise importance sampling (MISA)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=["fine-tuning", "large language models", "optimizer", "memory-efficient training", "Triton", "MISA"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["misa_engine", "misa_engine.*"]),
    package_data={"misa_engine": ["py.typed", "recipes/*.yaml", "templates/*.jinja"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2",
        "transformers>=5.17",
        "datasets>=4",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "psutil>=6",
        "rich>=13",
    ],
    extras_require={
        "train": TRAIN,
        "bench": BENCH,
        "eval": EVAL,
        "sweep": [*TRAIN, *SWEEP],
        "test": [
            *TRAIN,
            *SWEEP,
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-psutil",
            "import-linter>=2.5",  # acyclic_siblings
            "setuptools>=77",  # tests/test_packaging.py builds without the network
        ],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1"],
    },
    entry_points={"console_scripts": ["misa = misa_engine.cli.main:main"]},
)
