"""What a run takes before it starts, from the config alone, on the devices present or on others.

`stages` counts each stage, `training` the memory of the steps part by part, `sizes` records and models; `tell` prints
it, with what each row of a table adds, and `refuse` refuses what cannot fit.
"""

from collections.abc import Sequence
from typing import NamedTuple

from coincide_jax.core.errors import UserError
from coincide_jax.plan import stages
from coincide_jax.plan.devices import GB, LARGEST_SHARE, Devices
from coincide_jax.plan.sizes import find
from coincide_jax.plan.stages import Cost
from coincide_jax.plan.training import Memory, memory, model_config

UNCOUNTED = ("progress",)  # curricula with stages of their own

__all__ = ["Cost", "Devices", "Memory", "Row", "costs", "memory", "model_config", "refuse", "tell"]


class Row(NamedTuple):
    """A row of a table. `made`: stage → how often it is made for the row's seeds; what another row has made is not."""

    name: str
    config: object
    made: dict[str, int]


def costs(config, devices: Devices, *, arrays: bool = False) -> tuple[list[Cost], dict[str, Memory]]:
    """The stages of a run in order, and the memory of its trainings by part.

    Args:
      arrays: the run has features made elsewhere and no records, and so clusters and selects, no more.

    Raises:
      UserError: see `sizes.find`; rows that the devices cannot share.
    """
    if not arrays and config.curriculum.name in UNCOUNTED:
        raise UserError(
            f"the plan does not count curriculum.name '{config.curriculum.name}' (its own stages, probes and runs); "
            "that of coincide_plus comes nearest"
        )
    s = find(config, devices, arrays)
    if arrays:
        return [stages.cluster(config, s, devices), stages.select(config, s, devices)], {}
    found, parts = [], {}
    for stage, key in (("base", "base"), ("reference", "reference.train")):
        own = not config.target.path if stage == "base" else not (config.reference.path or config.extract.features)
        if own:
            cost, parts[stage] = stages.train(config, s, devices, key)
            found.append(cost)
    found += [stages.extract(config, s, devices), stages.cluster(config, s, devices), stages.select(config, s, devices)]
    cost, parts["train"] = stages.train(config, s, devices)
    return [*found, cost, stages.evaluate(config, s, devices)], parts


def tell(config, devices: list[Devices], *, arrays: bool = False, rows: Sequence[Row] = ()) -> str:
    """What `--plan` prints: a table of the stages for each kind of device, then a line for each row of a table.

    Args:
      rows: of the table, the first the headline, which `config` is then that of.

    Raises:
      UserError: see `costs`.
    """
    made = rows[0].made if rows else None
    tables = ((_table(config, one, arrays, made), _rows(rows, one, arrays) if rows else "") for one in devices)
    return "\n\n".join(text for pair in tables for text in pair if text)


HOST_KEYS = {  # what to change where the host's memory is too small
    "extract": "lower dataset.cache_mib",
    "cluster": "take cluster.init=random, or lower cluster.chunk or cluster.audit.cache_mib",
    "select": "lower select.cache_mib",
    "evaluate": "lower dataset.cache_mib",
}


def refuse(config, devices: list[Devices], *, arrays: bool = False, rows: Sequence[Row] = ()) -> None:
    """Raises `UserError` for the first devices that a stage does not fit, of the config or of what a row makes, with
    the key to change."""
    for one in devices:
        for cost in _own(rows[0], one, arrays) if rows else costs(config, one, arrays=arrays)[0]:
            _refuse(config.name, cost, one)
        for row in rows[1:]:
            for cost in _own(row, one, arrays):
                _refuse(f"{config.name}, row '{row.name}',", cost, one)


def _refuse(what: str, cost: Cost, devices: Devices) -> None:
    """Raises `UserError` if a stage does not fit the devices or their host."""
    needed = _held(cost, devices)
    if devices.bytes and needed > devices.largest * devices.bytes:
        raise UserError(
            f"{what} does not fit {devices}: stage '{cost.stage}' takes {needed / GB:.1f} GB of each device's "
            f"{devices.bytes / GB:.1f}; {cost.remedy}"
        )
    if devices.host and cost.host > devices.host:
        remedy = HOST_KEYS.get(cost.stage, "the model is written from there: take a larger host")
        raise UserError(
            f"{what} does not fit this host: stage '{cost.stage}' takes {cost.host / GB:.1f} GB of its "
            f"{devices.host / GB:.1f}; {remedy}"
        )


def _own(row: Row, devices: Devices, arrays: bool) -> list[Cost]:
    """What the stages made for a row take; nothing of a row that is not counted."""
    if _uncounted(row, arrays):
        return []
    return [cost for cost in costs(row.config, devices, arrays=arrays)[0] if cost.stage in row.made]


def _held(cost: Cost, devices: Devices) -> float:
    """Bytes of a device's memory; on CPUs what the host holds is there too."""
    return cost.device + (cost.host / devices.count if devices.cpu else 0.0)


def _hours(cost: Cost, devices: Devices, efficiency: float) -> float | None:
    """Hours at a share of the peak; None where there is no figure. float64 runs on one device."""
    speed = devices.speed.half * devices.count if cost.kind == "half" else devices.speed.double
    return None if not speed and cost.flop else cost.flop / max(speed * efficiency, 1.0) / 3600


def _table(config, devices: Devices, arrays: bool, made: dict[str, int] | None) -> str:
    """The stages on one kind of device; of them those in `made`."""
    found, parts = costs(config, devices, arrays=arrays)
    found = [cost for cost in found if made is None or cost.stage in made]
    parts = {stage: memory for stage, memory in parts.items() if made is None or stage in made}
    efficiency, speed = config.plan.efficiency, devices.speed
    peak = f"{speed.half / 1e12:.3g} TFLOP/s each in {speed.compute}" if speed.half else "no peak known"
    lines = [
        f"{config.name} on {devices}: {peak}, hours at {efficiency:.0%} of the peak",
        f"{'stage':<10}{'records':>10}{'FLOP':>10}{'hours':>11}{'disk GB':>9}{'host GB':>9}{'device GB':>11}  how",
    ]
    for cost in found:
        shown = _shown(_hours(cost, devices, efficiency))
        lines.append(
            f"{cost.stage:<10}{cost.records:>10}{cost.flop:>10.1e}{shown:>11}{cost.disk / GB:>9.2f}"
            f"{cost.host / GB:>9.2f}{cost.device / GB:>11.2f}  {cost.how}"
        )
    for stage, memory_parts in parts.items():
        listed = " · ".join(f"{name} {value / GB:.1f}" for name, value in memory_parts._asdict().items())
        lines.append(f"{stage}, GB a device: {listed}")
    worst = max(found, key=lambda cost: _held(cost, devices))
    held = _held(worst, devices)
    lines.append(f"{devices}: {worst.stage} takes the most, {held / GB:.1f} of {devices.bytes / GB:.1f} GB a device: "
                 f"{_verdict(worst, held, devices)}")  # fmt: skip
    return "\n".join(lines)


def _rows(rows: Sequence[Row], devices: Devices, arrays: bool) -> str:
    """What each row of a table takes for all its seeds, and the sum."""
    wide, efficiency = max(len(row.name) for row in rows), rows[0].config.plan.efficiency
    lines = [
        "the table: what several rows share is counted at the first of them",
        f"{'row':<{wide}}{'seeds':>7}{'FLOP':>10}{'hours':>11}{'disk GB':>9}  stages made for it",
    ]
    flop, hours, disk, left = 0.0, 0.0, 0.0, []
    for row in rows:
        name, seeds = f"{row.name:<{wide}}", max(row.made.values(), default=0)
        if _uncounted(row, arrays):
            left.append(row.name)
            why = f"not counted: '{row.config.curriculum.name}' has stages, probes and runs of its own"
            lines.append(f"{name}{seeds:>7}{'–':>10}{'–':>11}{'–':>9}  {why}")
            continue
        found = [(row.made[cost.stage], cost) for cost in _own(row, devices, arrays)]
        spent = [(count, _hours(cost, devices, efficiency)) for count, cost in found]
        own = None if any(each is None for _, each in spent) else sum(count * each for count, each in spent)
        own_flop, own_disk = (sum(n * getattr(cost, key) for n, cost in found) for key in ("flop", "disk"))
        flop, disk, hours = flop + own_flop, disk + own_disk, None if None in (hours, own) else hours + own
        how = " ".join(cost.stage if count == 1 else f"{count}×{cost.stage}" for count, cost in found)
        how += " (without its probes)" if row.config.curriculum.probe else ""
        lines.append(f"{name}{seeds:>7}{own_flop:>10.1e}{_shown(own):>11}{own_disk / GB:>9.2f}  {how}")
    without = f"  without {', '.join(left)}" if left else ""
    lines.append(f"{'total':<{wide}}{'':>7}{flop:>10.1e}{_shown(hours):>11}{disk / GB:>9.2f}{without}")
    return "\n".join(lines)


def _uncounted(row: Row, arrays: bool) -> bool:
    """Whether `costs` would refuse to count a row."""
    return not arrays and row.config.curriculum.name in UNCOUNTED


def _shown(hours: float | None) -> str:
    """Hours to two decimals; '–' where there is no figure."""
    return "–" if hours is None else "<0.01" if 0 < hours < 0.005 else f"{hours:.2f}"


def _verdict(cost: Cost, held: float, devices: Devices) -> str:
    """Whether it fits, and how."""
    if not devices.bytes:
        return "the device does not tell its memory"
    if held <= devices.usable * devices.bytes:
        return "fits"
    if held <= devices.largest * devices.bytes:
        return f"fits with XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_SHARE}"
    return f"does not fit: {cost.remedy}"
