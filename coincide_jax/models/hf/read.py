"""Tensors of a checkpoint's files, straight into sharded and stacked parameters.

A parameter is made with `jax.make_array_from_callback`: the callback is asked for one device's part, and copies that
part of each layer's tensor, cast on the way, out of a memory map that is closed at once. So the host holds the result,
one parameter's parts, and no whole tensor; each process reads only what its devices hold.

The header of a safetensors file is read here and not by `safe_open`, which refuses a truncated file whole, where the
message is to name the tensors that are cut.
"""

import concurrent.futures
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from coincide_jax.core import artifacts, axes
from coincide_jax.core.errors import UserError
from coincide_jax.models.hf.layouts import PROJECTORS, Layout
from coincide_jax.models.layers import Leaf, is_leaf

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
THREADS = 8  # copies of layers at a time


class Tensor(NamedTuple):
    """One tensor of a file. kind: its type as safetensors names it; open: gives the array, mapped, not read; cut: the
    file ends before it does."""

    shape: tuple[int, ...]
    kind: str
    open: Callable[[], np.ndarray]
    cut: bool


def safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
      UserError: the file is missing or its header is cut or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist, although the folder's index names it")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if 8 + length <= size else "")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} has no whole safetensors header; it is cut or of another format") from error
    header.pop("__metadata__", None)

    def tensor(entry: dict) -> Tensor:
        shape, kind, (start, stop) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]

        def mapped() -> np.ndarray:
            # a map of this tensor alone: its pages leave memory with the array, when a part has been copied
            return np.memmap(path, TYPES[kind], "r", 8 + length + start, shape)

        return Tensor(shape, kind, mapped, 8 + length + stop > size)

    return {name: tensor(entry) for name, entry in header.items()}


def pickled(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch .bin file, through PyTorch's safe loader, which runs nothing that the file says.

    Raises:
      UserError: PyTorch is not installed; the file cannot be read.
    """
    try:
        import torch  # an extra: only pickles need it
    except ImportError as error:
        raise UserError(
            f"{path} is a pickle, which only PyTorch reads; install torch, or convert it where torch is: "
            f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), "
            f"'{path.with_suffix('.safetensors').name}')"
        ) from error
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error

    def tensor(value) -> Tensor:
        kind = kinds.get(value.dtype, str(value.dtype).removeprefix("torch."))

        def array() -> np.ndarray:
            whole = value.detach()
            return whole.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if kind == "BF16" else whole.numpy()

        return Tensor(tuple(value.shape), kind, array, False)

    return {name: tensor(value) for name, value in found.items()}


def folder_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of a folder: one file or shards with an index, safetensors before pickles, and a projector beside.

    Raises:
      UserError: no weights, an index that names a missing file, what `safetensors` and `pickled` raise.
    """
    files: list[pathlib.Path] = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            files = [folder / part for part in sorted(set(artifacts.read_json(index)["weight_map"].values()))]
        if files:
            break
    else:
        raise UserError(f"{folder} has no model.safetensors, no pytorch_model.bin and no index of either")
    beside = [folder / name for name in PROJECTORS if (folder / name).is_file()]
    found = {}
    for path in files + beside[:1]:
        found |= (safetensors if path.suffix == ".safetensors" else pickled)(path)
    return found


def match(layout: Layout) -> dict[str, Tensor]:
    """The tensors that the layout's tree asks for, by our names, everything checked.

    Raises:
      UserError: one message with every tensor that is missing, unknown, there twice, misshapen, cut, or of a type that
        is not read.
    """
    wanted = expected(layout.abstract)
    found: dict[str, Tensor] = {}
    wrong: dict[str, list[str]] = {}
    for number, folder in enumerate(layout.folders):
        if number and not any(name not in found for name in wanted if name.startswith("vision_tower.")):
            break  # the tower is in the checkpoint itself
        for name, tensor in folder_tensors(folder).items():
            ours = layout.rename(name)
            if ours in wanted:
                if ours not in found:
                    found[ours] = tensor
                elif not number:
                    wrong.setdefault("there twice", []).append(f"{name} as {ours}")
            elif not layout.harmless(name) and not (ours and layout.harmless(ours)):
                wrong.setdefault("unknown", []).append(name)
    for name, shape in wanted.items():
        if name not in found:
            wrong.setdefault("missing", []).append(name)
            continue
        tensor = found[name]
        if tensor.shape != shape:
            wrong.setdefault("misshapen", []).append(f"{name} {tensor.shape} instead of {shape}")
        if tensor.kind not in TYPES:
            wrong.setdefault("of a type that is not read", []).append(f"{name} {tensor.kind}")
        if tensor.cut:
            wrong.setdefault("cut off by the end of the file", []).append(name)
    if wrong:
        parts = "; ".join(f"{len(names)} {what}: {', '.join(sorted(names))}" for what, names in sorted(wrong.items()))
        raise UserError(f"the tensors of {layout.folders[0]} are not those of its config.json: {parts}")
    return found


def expected(abstract) -> dict[str, tuple[int, ...]]:
    """Shape of every file tensor that a tree is made from, by name; parts of one tensor add up."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in jax.tree.leaves(abstract, is_leaf=is_leaf):
        rows = leaf.part[1] if leaf.part else leaf.source_shape[0]
        for name in leaf.names():
            rows_so_far = shapes[name][0] if name in shapes else 0
            shapes[name] = (max(rows, rows_so_far), *leaf.source_shape[1:])
    return shapes


def place(abstract, tensors: dict[str, Tensor], mesh: Mesh, dtype):
    """The tree's parameters of type `dtype`, each part read where it will lie."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

        def one(leaf: Leaf) -> jax.Array:
            where = axes.sharding(mesh, leaf.axes, leaf.shape)
            return jax.make_array_from_callback(leaf.shape, where, lambda index: cut(leaf, index, tensors, dtype, pool))

        return jax.tree.map(one, abstract, is_leaf=is_leaf)


def cut(leaf: Leaf, index: tuple[slice, ...], tensors: dict[str, Tensor], dtype, pool) -> np.ndarray:
    """One device's part of a parameter: `index` of the stacked array, in our order of dimensions."""
    stacked = leaf.axes[0] == "layer"
    spans = [slice(*span.indices(size)[:2]) for span, size in zip(index, leaf.shape, strict=True)]
    shape, inner = leaf.shape[stacked:], spans[stacked:]
    # a file has outputs before inputs
    order = (*range(leaf.inputs, len(shape)), *range(leaf.inputs))
    back = tuple(int(place) for place in np.argsort(order))
    result = np.empty([span.stop - span.start for span in spans], dtype)
    rows = result if stacked else result[None]
    names = leaf.names()[spans[0]] if stacked else leaf.names()

    def copy(row: int) -> None:
        whole = tensors[names[row]].open()
        if leaf.part:
            whole = whole[slice(*leaf.part)]
        piece = whole.reshape([shape[place] for place in order])[tuple(inner[place] for place in order)]
        rows[row] = piece.transpose(back)

    list(pool.map(copy, range(len(names))))
    return result
