"""When a stage is complete, when it goes on, when it must not: the `manifest.json` of a stage's folder.

A stage's folder holds `started.json` from its first moment and `manifest.json` from its last; both name the stage, its
version, the config keys it reads and the identity of what it is made from. Whatever differs is told, never deleted:
only `force` deletes, and only folders that hold one of the two files.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

import jax

from coincide_jax.core import artifacts, processes
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import say

# keys of speed and disk, never of a result
NEUTRAL = ("threads", "cache_mib", "checkpoint_every", "keep", "chunk", "memory_mib", "product", "tensorboard")
MANIFEST, STARTED = "manifest.json", "started.json"
RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorstore", "tokenizers")


def difference(found: dict, wanted: dict) -> str:
    """Says which version, config key or input differs; empty if none does."""
    if found["version"] != wanted["version"]:
        return f"stage version {found['version']}, now {wanted['version']}"
    for kind in ("config", "inputs"):
        for name in sorted(found[kind].keys() | wanted[kind].keys()):
            old, new = found[kind].get(name, "nothing"), wanted[kind].get(name, "nothing")
            if old != new and name.rsplit(".", 1)[-1] not in NEUTRAL:
                return f"{name} = {old}, now {new}" if kind == "config" else f"another state of its input '{name}'"
    return ""


def identity(folder: pathlib.Path) -> str:
    """What later stages compare of a complete stage."""
    return artifacts.read_json(folder / MANIFEST)["identity"]


def complete(folder: pathlib.Path) -> bool:
    """Whether a stage ended in this folder."""
    return (folder / MANIFEST).is_file()


def verify(folder: pathlib.Path, wanted: dict) -> None:
    """Checks a complete stage.

    Raises:
      UserError: it was made with another config or from other inputs, or a file of it is missing or has another size.
    """
    name, found = wanted["stage"], artifacts.read_json(folder / MANIFEST)
    remedy = f"take another --workdir, or --force={name} to make it and all after it again"
    if differs := difference(found, wanted):
        raise UserError(f"{folder} was made with {differs}; {remedy}")
    for file, (size, _) in found["outputs"].items():
        if not (folder / file).is_file() or (folder / file).stat().st_size != size:
            raise UserError(f"{folder / file} is missing or was changed; {remedy}")


def run(
    folder: pathlib.Path,
    wanted: dict,
    action: Callable[[], dict],
    *,
    force: bool,
    command: Sequence[str],
    alone: bool = False,
) -> None:
    """Runs `action`, which fills the folder and returns summary numbers, unless the stage is complete.

    Args:
      wanted: stage, version, config, inputs: what is compared.
      force: delete what is there and run again.
      command: recorded.
      alone: of several processes the one that leads runs it, while the others wait.

    Raises:
      UserError: the folder is not one of ours; it is complete or begun with another config or from other inputs.
    """
    attempts = processes.led(lambda: _begin(folder, wanted, force))
    if not attempts:
        return
    recorded, begin = provenance(command), time.time()
    summary = (processes.led(action) if alone else action()) or {}
    recorded |= {"seconds": round(time.time() - begin, 2), "began": begin, "attempts": attempts}
    processes.together()  # all have written what they write
    processes.led(lambda: _end(folder, wanted, summary, recorded))


def _begin(folder: pathlib.Path, wanted: dict, force: bool) -> int:
    """Looks at what is there, and notes that the stage has begun, for which time; 0 if it is complete."""
    name = wanted["stage"]
    ours = complete(folder) or (folder / STARTED).is_file()
    # names with a dot are ours: half-written files of a run killed before `started.json` had its name
    strange = folder.is_file() or (folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()))
    if strange and not ours:
        raise UserError(f"{folder} holds files that no stage made; take another --workdir")
    if force and folder.exists():
        shutil.rmtree(folder)
    if complete(folder):
        verify(folder, wanted)
        (folder / STARTED).unlink(missing_ok=True)  # left by a kill in the very last moment
        say(name, f"complete · {folder}")
        return 0
    attempts, going_on = 1, ""
    if (folder / STARTED).is_file():
        started = artifacts.read_json(folder / STARTED)
        if differs := difference(started, wanted):
            raise UserError(
                f"{folder} was begun with {differs}; take another --workdir, or --force={name} to begin it again"
            )
        attempts = started["attempts"] + 1
        going_on = f" · attempt {attempts}, going on from what is there"
    artifacts.write_json(folder / STARTED, wanted | {"attempts": attempts})
    say(name, f"begins · {folder}{going_on}")
    return attempts


def _end(folder: pathlib.Path, wanted: dict, summary: dict, recorded: dict) -> None:
    """Writes the manifest of a stage that has run."""
    outputs = contents(folder)
    made = hashlib.sha256(json.dumps([wanted, outputs], sort_keys=True).encode()).hexdigest()
    ended = wanted | {"identity": made, "summary": summary, "outputs": outputs, "recorded": recorded}
    artifacts.write_json(folder / MANIFEST, ended)
    (folder / STARTED).unlink()
    say(wanted["stage"], f"done in {recorded['seconds']:.1f} s")


def contents(folder: pathlib.Path) -> dict[str, list]:
    """`{file: [size, SHA-256]}`; sizes only above `HASHED_BYTES` in all: large stores carry checksums of their own."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, STARTED)]
    hashed = sum(path.stat().st_size for path in files) <= artifacts.HASHED_BYTES
    return {
        str(path.relative_to(folder)): [path.stat().st_size, artifacts.digest(path) if hashed else ""] for path in files
    }


def provenance(command: Sequence[str]) -> dict:
    """Versions, revision, device, command: recorded, never compared."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, check=False
        ).stdout.strip()
    except OSError:  # a machine without git
        revision = ""
    return {
        "versions": {name: importlib.metadata.version(name) for name in RECORDED},
        "revision": revision or "unknown",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": list(command),
    }
