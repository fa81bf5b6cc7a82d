"""The arrow of DESIGN §2, held with `ast`: main → pipeline → stages → models → kernels; all may use core."""

import ast
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "coincide_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = {"extract", "cluster", "selection", "curriculum", "training", "evaluation", "report"}
MAY = {
    "kernels": {"kernels"},
    "core": {"core"},
    "models": {"models", "kernels", "core"},
    "dataset": {"dataset", "core"},
    **{stage: {stage, "dataset", "models", "kernels", "core"} for stage in STAGES},
    "pipeline": STAGES | {"pipeline", "dataset", "models", "kernels", "core"},
    "main": {"main", "pipeline", "core"},
}


def imported(path: pathlib.Path) -> set[str]:
    """Full dotted names that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrow(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in imported(path):
        if name.startswith("coincide_jax."):
            assert name.split(".")[1] in MAY[room], f"{room} imports {name}"


def test_only_checkpoint_imports_orbax():
    users = {str(p.relative_to(PACKAGE)) for p in FILES if any(name.startswith("orbax") for name in imported(p))}
    assert users == {"core/checkpoint.py"}


def test_kernels_import_only_jax_and_numpy():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in {"jax", "numpy", "coincide_jax"} | set(sys.stdlib_module_names), (path, name)


def test_no_file_is_long():
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_requirements_are_exactly_what_is_imported():
    modules = {name.split(".")[0] for path in FILES for name in imported(path)}
    modules -= set(sys.stdlib_module_names) | {"coincide_jax"}
    distributions = importlib.metadata.packages_distributions()
    used = {re.sub(r"[-_.]+", "-", distributions[module][0]).lower() for module in modules}
    text = (ROOT / "setup.py").read_text().split("install_requires")[1].split("extras_require")[0]
    declared = set(re.findall(r'f?"([a-z-]+)', text)) | {"jax"}
    assert used == declared
