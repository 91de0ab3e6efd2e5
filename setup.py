"""Packaging. ``kernels/`` is installed as ``misa_engine.kernels``.

A top-level package named ``kernels`` would shadow the Hub's ``kernels``, which transformers imports when present.
"""

from setuptools import setup

PLOTS = ["matplotlib>=3.9"]
# Liger's kernels are Triton's: pure Python on top of torch and triton, nothing to compile, unused without a GPU.
LIGER = "liger-kernel>=0.8; platform_system == 'Linux'"
TRAIN = ["trl>=1.10", "pyyaml>=6", LIGER, *PLOTS]
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
    *PLOTS,
]

setup(
    name="misa_engine",
    version="0.1.0",
    description="Train all weights of a language model on one consumer GPU by module-wise importance sampling (MISA)",
    python_requires=">=3.10",
    packages=["misa_engine", "misa_engine.kernels", "misa_engine.bench"],
    package_dir={"misa_engine": "misa_engine", "misa_engine.kernels": "kernels", "misa_engine.bench": "bench"},
    package_data={"misa_engine": ["py.typed", "recipes/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2",
        "transformers>=5.17",
        "datasets>=4",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "rich>=13",
    ],
    extras_require={
        "train": TRAIN,
        "bench": BENCH,
        "test": [
            *TRAIN,
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["misa = misa_engine.cli:main"]},
)
