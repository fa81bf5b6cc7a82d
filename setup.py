"""Package and extras. `pip install -e .` is enough for a CPU; add an extra for an accelerator."""

from setuptools import find_packages, setup

JAX = ">=0.10.2,<0.13"

setup(
    name="coincide-jax",
    version="0.1.0",
    description="Which data should a vision-language model learn from, and in what order?",
    packages=find_packages(include=["coincide_jax", "coincide_jax.*"]),
    package_data={"coincide_jax.report": ["*.html"]},
    python_requires=">=3.11",
    install_requires=[
        f"jax{JAX}",
        "absl-py",
        "flax",
        "grain>=0.2.18",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "ml-collections>=1.1",
        "ml-dtypes",
        "numpy",
        "optax",
        "orbax-checkpoint>=0.12.8,<1",
        "pillow>=10.1",
        "pyarrow",
        "safetensors",
        "scikit-learn",
        "tensorstore>=0.1.84",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "cuda13": [f"jax[cuda13]{JAX}"],  # Turing and newer, driver >= 580
        "cuda12": [f"jax[cuda12]{JAX}"],  # Ampere and Hopper with older drivers
        "v100": [f"jax[cuda12]{JAX}", "nvidia-cudnn-cu12>=9.10.2.21,<9.11"],  # cuDNN 9.11 dropped sm_70
        "tpu": [f"jax[tpu]{JAX}"],
        # checkpoints as some are published: tokenizers without a tokenizer.json, weights as pickles
        "convert": ["protobuf", "sentencepiece", "torch", "transformers>=5.6"],
        "tensorboard": ["tensorboardX"],
        "test": [
            "faiss-cpu",
            "hypothesis",
            "peft",
            "protobuf",
            "pytest",
            "pytest-xdist",
            "regex",
            "ruff",
            "sentencepiece",
            "tensorboardX",
            "torch==2.13.0",
            "transformers>=5.6",
        ],
    },
    entry_points={"console_scripts": ["coincide=coincide_jax.main:cli"]},
)
