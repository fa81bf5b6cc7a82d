"""What a run takes before it starts, from the config alone, on the devices present or on others.

`stages` counts each stage, `training` the memory of the steps part by part, `sizes` records and models; `tell` prints
it and refuses what cannot fit.
"""

from coincide_jax.core.errors import UserError
from coincide_jax.plan import stages
from coincide_jax.plan.devices import GB, LARGEST_SHARE, Devices
from coincide_jax.plan.sizes import find
from coincide_jax.plan.stages import Cost
from coincide_jax.plan.training import Memory, memory, model_config

UNCOUNTED = ("progress",)  # curricula with stages of their own

__all__ = ["Cost", "Devices", "Memory", "costs", "memory", "model_config", "refuse", "tell"]


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


def tell(config, devices: list[Devices], *, arrays: bool = False) -> str:
    """What `--plan` prints: a table of the stages for each kind of device.

    Raises:
      UserError: see `costs`.
    """
    return "\n\n".join(_table(config, one, arrays) for one in devices)


HOST_KEYS = {  # what to change where the host's memory is too small
    "extract": "lower dataset.cache_mib",
    "cluster": "take cluster.init=random, or lower cluster.chunk or cluster.audit.cache_mib",
    "select": "lower select.cache_mib",
    "evaluate": "lower dataset.cache_mib",
}


def refuse(config, devices: list[Devices], *, arrays: bool = False) -> None:
    """Raises `UserError` for the first devices that a stage does not fit, with the key to change."""
    for one in devices:
        for cost in costs(config, one, arrays=arrays)[0]:
            needed = _held(cost, one)
            if one.bytes and needed > one.largest * one.bytes:
                raise UserError(
                    f"{config.name} does not fit {one}: stage '{cost.stage}' takes {needed / GB:.1f} GB of each "
                    f"device's {one.bytes / GB:.1f}; {cost.remedy}"
                )
            if one.host and cost.host > one.host:
                remedy = HOST_KEYS.get(cost.stage, "the model is written from there: take a larger host")
                raise UserError(
                    f"{config.name} does not fit this host: stage '{cost.stage}' takes {cost.host / GB:.1f} GB of its "
                    f"{one.host / GB:.1f}; {remedy}"
                )


def _held(cost: Cost, devices: Devices) -> float:
    """Bytes of a device's memory; on CPUs what the host holds is there too."""
    return cost.device + (cost.host / devices.count if devices.cpu else 0.0)


def _hours(cost: Cost, devices: Devices, efficiency: float) -> float | None:
    """Hours at a share of the peak; None where there is no figure. float64 runs on one device."""
    speed = devices.speed.half * devices.count if cost.kind == "half" else devices.speed.double
    return None if not speed and cost.flop else cost.flop / max(speed * efficiency, 1.0) / 3600


def _table(config, devices: Devices, arrays: bool) -> str:
    """The stages on one kind of device."""
    found, parts = costs(config, devices, arrays=arrays)
    efficiency, speed = config.plan.efficiency, devices.speed
    peak = f"{speed.half / 1e12:.3g} TFLOP/s each in {speed.compute}" if speed.half else "no peak known"
    lines = [
        f"{config.name} on {devices}: {peak}, hours at {efficiency:.0%} of the peak; of a table its first row",
        f"{'stage':<10}{'records':>10}{'FLOP':>10}{'hours':>11}{'disk GB':>9}{'host GB':>9}{'device GB':>11}  how",
    ]
    for cost in found:
        hours = _hours(cost, devices, efficiency)
        shown = "–" if hours is None else f"{hours:.2f}"
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


def _verdict(cost: Cost, held: float, devices: Devices) -> str:
    """Whether it fits, and how."""
    if not devices.bytes:
        return "the device does not tell its memory"
    if held <= devices.usable * devices.bytes:
        return "fits"
    if held <= devices.largest * devices.bytes:
        return f"fits with XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_SHARE}"
    return f"does not fit: {cost.remedy}"
