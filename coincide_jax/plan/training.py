"""Memory of the training stage before it starts: counted from the config alone, for devices that need not be here.

Per device, with D devices on the mesh axis 'data' and P on 'model' (`device.model_parallel`), n = rows · T tokens of
one micro-batch on a device (rows = micro_batch / D, T = dataset.max_length), c bytes of the compute type. Leaves are
counted one by one as the rule table of `core/axes.py` shares them.

    parameters   'full': 4 B each, twice: the start is kept beside the trained copy.
                 'lora': the frozen base c B each; projector c B + 4 B (start and trained copy), adapters 4 B.
    gradients    4 B per trained parameter, twice: the sum over micro-batches, and the micro-batch being added.
    optimizer    8 B per trained parameter: AdamW's two moments, float32.
    activations  kept for the backward pass, and the largest working set beside it (block, head or vision):
                 kept    remat: c · n · w for every decoder layer (the residual stream at its entry); else all that a
                         block saves, saved + 4 B · (n · w · 4 + scores). In mode 'full' the vision tower's, too.
                 saved   c · n · (6 w + 2 a + 2 kv + 4 m): w model width, a heads · head_dim, kv kv_heads · head_dim,
                         m MLP columns (3 m without a gate), all but w divided by P.
                 scores  rows · heads / P · T · t of the attention, t = T or, in long sequences, QUERY_BLOCK, whose
                         scores are not saved but made again; cuDNN's attention holds fewer.
                 block   one decoder block recomputed and differentiated: saved + 4 B · n · w · 3 + the larger of
                         c · n · (4 m + 4 w + 2 a) and 4 B · scores · 2, which do not live together; with LoRA
                         dropout (3 c + 1) · n for the columns of every target's input (random bits, mask, result);
                         the layer's weights, gathered and cast, c B each (twice in mode 'full').
                 head    closing norm and loss: n · w · (2 · 4 + 4 c); the head's weights, c B each (and twice 4 B in
                         mode 'full'); 3 · 4 B · CHUNK_POSITIONS · vocab / P of logits.
                 vision  pixels, and one block of the tower forward.
    batch        (steps in flight + 1) · batch / D rows: T · 6 B, and 3 B a pixel.
    ending       instead of the last two, when the steps are over: LoRA is merged into a second copy of the decoder's
                 blocks, c B each, one projection of all layers at a time, 4 · 4 B of the largest; then the merged model
                 lies in float32 beside itself, (c + 4) B each, until it is written.

Not counted: the runtime's own few hundred MB, and what XLA keeps beyond these sets by its choice of order.
"""

import math
import pathlib
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.core.precision import Precision, choose
from coincide_jax.models import hf, lora, loss, vlm
from coincide_jax.models.layers import QUERY_BLOCK, WHOLE_UP_TO, Leaf, is_leaf
from coincide_jax.models.vlm import VLMConfig
from coincide_jax.plan.devices import Devices

STEPS_IN_FLIGHT = 3  # of which batches lie on the device


class Memory(NamedTuple):
    """Bytes on each device, by part (see the module's docstring)."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    batch: float
    ending: float

    @property
    def steps(self) -> float:
        """Bytes while steps run."""
        return sum(self[:-1])

    @property
    def total(self) -> float:
        """The most that is held at any time."""
        return max(self.steps, self.ending)


def model_config(config, precision: Precision) -> VLMConfig:
    """The target's sizes: from its folder when that exists, else from `config.model`.

    Raises:
      UserError: a folder of another kind of model.
    """
    folder = pathlib.Path(config.target.path)
    if config.target.path and folder.exists():
        cfg, _ = hf.describe(folder, precision.compute)
        if not isinstance(cfg, VLMConfig):
            raise UserError(f"target.path: {folder} holds no vision-language model")
        return cfg
    return VLMConfig.tiny(config.model, config.dataset.image_size, config.dataset.vocab, precision)


def memory(config, devices: Devices | str) -> Memory:
    """Counts the training stage of a config on `devices`; formulas in the module's docstring.

    Raises:
      UserError: devices that do not divide as the config wants, or are not understood.
    """
    devices = Devices.parse(devices) if isinstance(devices, str) else devices
    named = config.device.precision
    precision = choose(devices.speed.compute if named == "auto" else named)
    return of_recipe(config, model_config(config, precision), config.train, "train", devices)


def of_recipe(config, cfg: VLMConfig, recipe, key: str, devices: Devices) -> Memory:
    """`memory` of any of the trainings: base, reference.train, train (`key`)."""
    precision = cfg.precision
    wide, share = config.device.model_parallel, precision.dtype.itemsize
    if devices.count % wide:
        raise UserError(f"device.model_parallel is {wide}; expected a divisor of the {devices.count} devices")
    data = devices.count // wide
    if recipe.micro_batch % data:
        raise UserError(
            f"{key}.micro_batch is {recipe.micro_batch}; expected a multiple of the {data} devices that share its rows"
        )
    mesh = AbstractMesh((data, wide), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    parts = {top: elements(tree, mesh) for top, tree in vlm.abstract(cfg).items()}
    if recipe.mode == "full":
        trained, parameters = sum(parts.values()), 2 * 4 * sum(parts.values())
    else:
        trained = parts["projector"]
        if recipe.mode == "lora":
            trained += elements(lora.abstract(cfg, recipe.lora.rank, recipe.lora.targets), mesh)
        parameters = share * sum(parts.values()) + 4 * trained
    length, size = config.dataset.max_length, cfg.vision.image_size
    return Memory(
        parameters=parameters,
        gradients=2 * 4 * trained,
        optimizer=8 * trained,
        activations=activations(cfg, recipe, rows=recipe.micro_batch // data, length=length, wide=wide),
        batch=STEPS_IN_FLIGHT * recipe.batch / data * (6 * length + 3 * size**2),
        ending=ending(cfg, recipe, parts, parameters + 16 * trained, mesh),
    )


def ending(cfg: VLMConfig, recipe, parts: dict[str, int], held: float, mesh) -> float:
    """Bytes when the steps are over: `held` of them stay while LoRA is merged; then float32 beside the result."""
    share = 4 if recipe.mode == "full" else cfg.precision.dtype.itemsize
    whole = sum(parts.values())
    written = share * whole + 4 * whole if share < 4 else 4 * whole
    if recipe.mode != "lora":
        return written
    blocks = vlm.abstract(cfg)["decoder"]["blocks"]
    sizes = [elements(leaf, mesh) for leaf in jax.tree.leaves(blocks, is_leaf=is_leaf)]
    return max(held + share * sum(sizes) + 4 * 4 * max(sizes), written)


def elements(abstract: dict, mesh) -> int:
    """Elements of a tree that one device holds."""

    def held(leaf: Leaf) -> int:
        return math.prod(axes.sharding(mesh, leaf.axes, leaf.shape).shard_shape(leaf.shape))

    return sum(held(leaf) for leaf in jax.tree.leaves(abstract, is_leaf=is_leaf))


def activations(cfg: VLMConfig, recipe, *, rows: int, length: int, wide: int) -> float:
    """Bytes of the forward pass that a device keeps, and the largest working set beside them."""
    text, eye, c = cfg.decoder, cfg.vision, cfg.precision.dtype.itemsize
    tokens, full, width = rows * length, recipe.mode == "full", text.width
    columns, queries = text.mlp / wide, text.heads * text.head_dim / wide
    saved, scores, layer = block_sets(cfg, rows, length, wide)
    block = saved + 3 * 4 * tokens * width + (2 if full else 1) * layer
    block += max(c * tokens * (4 * columns + 4 * width + 2 * queries), 2 * scores)
    if recipe.mode == "lora" and recipe.lora.dropout:
        inputs = {"wo": queries, "down": columns}
        targets = lora.choose_targets(text, recipe.lora.targets)
        block += (3 * c + 1) * tokens * sum(inputs.get(name, width) for name in targets)
    head = tokens * width * (2 * 4 + 4 * c) + text.vocab / wide * width * (c + (8 if full else 0))
    head += 3 * 4 * loss.CHUNK_POSITIONS * text.vocab / wide
    one, vision = tower_sets(cfg, rows, wide)
    kept_scores = scores if length <= WHOLE_UP_TO else 0
    kept = text.depth * (c * tokens * width if recipe.remat else saved + 4 * 4 * tokens * width + kept_scores)
    if full:
        kept += eye.depth * (c * rows * (eye.tokens + eye.class_token) * eye.width if recipe.remat else one)
    return kept + max(block, head, vision)


def block_sets(cfg: VLMConfig, rows: int, length: int, wide: int) -> tuple[float, float, float]:
    """Bytes of a decoder block: what it saves for the backward pass, its attention scores, its gathered weights."""
    text, c = cfg.decoder, cfg.precision.dtype.itemsize
    queries, keys = text.heads * text.head_dim / wide, text.kv_heads * text.head_dim / wide
    columns, products = text.mlp / wide, 3 if text.gated else 2
    saved = c * rows * length * (6 * text.width + 2 * queries + 2 * keys + (1 + products) * columns)
    scores = 4 * rows * text.heads / wide * length * queries_at_once(length)
    return saved, scores, c * text.width * (2 * queries + 2 * keys + products * columns)


def tower_sets(cfg: VLMConfig, rows: int, wide: int) -> tuple[float, float]:
    """Bytes of one block of the vision tower forward, and of that with the pixels."""
    eye, c = cfg.vision, cfg.precision.dtype.itemsize
    seen = eye.tokens + eye.class_token
    one = c * rows * seen * (8 * eye.width + 2 * eye.mlp / wide)
    one += 3 * 4 * rows * eye.heads / wide * seen * queries_at_once(seen)
    return one, one + rows * 3 * eye.image_size**2 * (4 + 2 * c)


def queries_at_once(length: int) -> int:
    """Query positions whose scores the attention holds together."""
    return length if length <= WHOLE_UP_TO else QUERY_BLOCK
