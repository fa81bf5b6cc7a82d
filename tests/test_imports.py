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
    "plan": {"plan", "extract", "cluster", "dataset", "models", "kernels", "core"},
    "main": {"main", "pipeline", "plan", "core"},
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


def test_only_two_files_import_orbax():
    users = {str(p.relative_to(PACKAGE)) for p in FILES if any(name.startswith("orbax") for name in imported(p))}
    assert users == {"core/checkpoint.py", "core/processes.py"}


def test_kernels_import_only_jax_and_numpy():
    for path in (PACKAGE / "kernels").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in {"jax", "numpy", "coincide_jax"} | set(sys.stdlib_module_names), (path, name)


def test_no_file_is_long():
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def requirements(keyword: str, extra: str | None = None) -> set[str]:
    """Names of the distributions that setup.py lists under `install_requires`, or under an extra."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    listed = next(argument.value for argument in call.keywords if argument.arg == keyword)
    if extra is not None:
        listed = next(value for key, value in zip(listed.keys, listed.values, strict=True) if key.value == extra)
    # an f-string begins with the name, its version follows
    texts = [item.values[0].value if isinstance(item, ast.JoinedStr) else item.value for item in listed.elts]
    return {normal(re.match(r"[A-Za-z0-9._-]+", text).group()) for text in texts}


def normal(name: str) -> str:
    """A distribution's name in the one spelling that indices compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def providers(folders: list[str]) -> dict[str, set[str]]:
    """`{imported module that is neither ours nor Python's: distributions that provide it}`."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = {name.split(".")[0] for path in files for name in imported(path)}
    modules -= (
        set(sys.stdlib_module_names)
        | {"coincide_jax", "configs", "benchmarks"}
        | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    )
    distributions = importlib.metadata.packages_distributions()
    return {module: set(map(normal, distributions[module])) for module in modules}


def test_requirements_are_exactly_what_is_imported():
    declared, used = requirements("install_requires"), providers(["coincide_jax", "configs"])
    assert {"jax", "numpy", "jinja2", "ml-collections"} <= declared
    optional = requirements("extras_require", "convert") | requirements("extras_require", "tensorboard")
    assert not {module for module, names in used.items() if not names & (declared | optional)}
    assert not declared - set().union(*used.values())


def test_what_tests_import_is_declared():
    declared = requirements("install_requires") | requirements("extras_require", "test")
    assert not {module for module, names in providers(["tests"]).items() if not names & declared}
