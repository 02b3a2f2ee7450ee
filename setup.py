"""Packaging; the pinned environment is requirements.txt, the ranges here say what is supported."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    name="mm15_megatron",
    version="0.1.0",
    description="A trainer for the MM1 / MM1.5 family of multimodal language models on torch and megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mm15_megatron", "mm15_megatron.*"]),
    include_package_data=True,
    package_data={"": ["py.typed", "*.json", "*.yaml", "*.txt"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.*",
        "numpy",
        "nvidia-dali-cuda130==2.4.*",
        "pillow",
        "psutil",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "zarr>=3",
    ],
    extras_require={
        "data": ["av", "mpi4py", "pyarrow", "pypdfium2"],
        "quickstart": ["scikit-learn"],
        "gpu": ["transformer-engine[pytorch]>=2.11,<2.12"],
        "dev": ["transformers", "pytest", "hypothesis", "ruff", "mypy", "import-linter", "types-PyYAML"],
    },
)
