"""The command: flags, mesh, then `pipeline.run`.

python -m coincide_jax.main --config=FILE [--workdir=DIR] [--config.KEY=VALUE …] [--stages=a,b] [--force=STAGE]
python -m coincide_jax.main --config=FILE --plan                                   what each stage takes, nothing is run
python -m coincide_jax.main --config=FILE --plan_devices=1xH100-80GB,4xV100-32GB    the same on other devices
python -m coincide_jax.main --config=FILE --coordinator=HOST:PORT --processes=4 --process=0    one of several processes
"""

import ctypes
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from coincide_jax import pipeline, plan
from coincide_jax.core import axes, processes
from coincide_jax.core.errors import UserError, nearest, unknown

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `configs/demo.py` or `configs/demo.py:table`.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config name>.")
STAGES = flags.DEFINE_list("stages", [], f"Run only these stages of {', '.join(pipeline.NAMES)}.")
FORCE = flags.DEFINE_string("force", None, "Run this stage and all after it again, in every row.")
TABLE = flags.DEFINE_bool("table", True, "Run every row of the config's table; --notable: the config as one run.")
PLAN = flags.DEFINE_bool("plan", False, "Print what each stage takes on the devices present; run nothing.")
PLAN_DEVICES = flags.DEFINE_list("plan_devices", [], "Print it for devices like 4xV100-32GB; run nothing.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "One of several processes: HOST:PORT of process 0, or auto (SLURM, Open MPI, TPU pods)."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are; not with --coordinator=auto.")
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0; not with --coordinator=auto.")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def config_path(argv: Sequence[str]) -> tuple[pathlib.Path, str]:
    """The file and the argument behind `:` of `--config=FILE:ARGUMENT`."""
    for position, word in enumerate(argv):
        if word.lstrip("-").startswith("config="):
            value = word.split("=", 1)[1]
        elif word.lstrip("-") == "config" and position + 1 < len(argv):
            value = argv[position + 1]
        else:
            continue
        file, _, argument = value.partition(":")
        return pathlib.Path(file), argument
    raise UserError("no config was given: add --config=configs/demo.py")


def load_module(file: pathlib.Path):
    """Imports a config file by path.

    The nearest folder above it that holds `configs/common.py` joins the search path, so that `configs.common` is found
    from wherever the command is started; for a file elsewhere, the folder of this package's checkout.
    """
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        valid = [str(path) for path in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        raise UserError(f"config {file}: {found}{nearest(str(file), valid) if valid else '.'}")
    above = (*file.resolve().parents, pathlib.Path(__file__).resolve().parent.parent)
    root = next((str(folder) for folder in above if (folder / "configs" / "common.py").is_file()), None)
    if root is not None and root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location("coincide_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def given_keys(argv: Sequence[str]) -> list[str]:
    """The config keys that a command line sets, dotted."""
    words = (word.lstrip("-").split("=", 1)[0] for word in argv[1:] if word.startswith("-"))
    return [word.removeprefix("config.") for word in words if word.startswith("config.")]


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong key or value becomes one sentence that names the nearest valid key."""
    if {"--help", "-h", "--helpfull", "--helpshort"} & set(argv):
        return flags.FLAGS(argv)
    file, argument = config_path(argv)
    module = load_module(file)
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"{file} takes no argument; found ':{argument}'")
    config = module.get_config(argument) if argument else module.get_config()
    keys = pipeline.flatten(config)
    for name in given_keys(argv):
        if name not in keys:
            raise unknown("config key", name, keys)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from error


def find_sweep(argv: Sequence[str]) -> tuple[Callable | None, str]:
    """The config file's `sweep(add)`, if it has one (an argument that chooses a curriculum means one run of it), and
    `LAST`, the stage at which its rows end."""
    file, argument = config_path(argv)
    module = load_module(file)
    sweep = None if "curriculum=" in argument else getattr(module, "sweep", None)
    return sweep, getattr(module, "LAST", pipeline.NAMES[-1])


def main(argv: Sequence[str]) -> None:
    """Runs the pipeline of the parsed flags, or says what it would take."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    if COORDINATOR.value:
        processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    elif PROCESSES.value is not None or PROCESS.value is not None:
        raise UserError("--processes and --process need --coordinator=HOST:PORT, the address of process 0")
    keep_memory()
    config = CONFIG.value
    if PLAN.value or PLAN_DEVICES.value:
        sweep, last = find_sweep(sys.argv) if TABLE.value else (None, pipeline.NAMES[-1])
        rows = [plan.Row(*row) for row in pipeline.planned(config, sweep, given_keys(sys.argv), last)]
        config, rows = rows[0].config, rows if sweep else []
        devices = [plan.Devices.parse(text) for text in PLAN_DEVICES.value] or [plan.Devices.present()]
        arrays = pipeline.arrays_only(config)
        if processes.leads():
            print(plan.tell(config, devices, arrays=arrays, rows=rows))
        plan.refuse(config, devices, arrays=arrays, rows=rows)
        return
    workdir = pathlib.Path(WORKDIR.value or pathlib.Path("runs") / config.name)
    mesh = axes.make_mesh(config.device.model_parallel)
    sweep, last = find_sweep(sys.argv) if TABLE.value else (None, pipeline.NAMES[-1])
    with jax.set_mesh(mesh):
        pipeline.run(
            config,
            workdir,
            mesh,
            sweep=sweep,
            last=last,
            given=given_keys(sys.argv),
            stages=STAGES.value,
            force=FORCE.value,
            command=sys.argv,
        )


def keep_compiled() -> None:
    """Compiled programs outlive the process, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "coincide_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_memory() -> None:
    """Lets glibc keep the memory it has.

    By default it hands every large buffer back to the system and takes it again in the next step; on a CPU the page
    faults of that took a third of the time of training a small model.
    """
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
                libc.mallopt(option, value)


def cli() -> None:
    """Entry point: a user's mistake ends in one sentence and exit status 2."""
    keep_compiled()

    def guarded(action: Callable):
        def call(argv):
            with processes.leaving():
                try:
                    return action(argv)
                except UserError as error:
                    print(f"coincide: {error}", file=sys.stderr)
                    sys.exit(2)

        return call

    app.run(guarded(main), flags_parser=guarded(parse))


if __name__ == "__main__":
    cli()
