"""Config keys by their dotted names, and the part of a config that a stage declares."""

from collections.abc import Sequence

from ml_collections import ConfigDict


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """`{dotted key: value}` of a config, tuples as lists."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def subset(config: ConfigDict, keys: Sequence[str]) -> ConfigDict:
    """The config with only the keys that a stage declares; reading another one fails."""
    view = ConfigDict()
    for key in keys:
        *parents, last = key.split(".")
        source, target = config, view
        for parent in parents:
            source = source[parent]
            if parent not in target:
                target[parent] = ConfigDict()
            target = target[parent]
        value = source[last]
        target[last] = value.copy_and_resolve_references() if isinstance(value, ConfigDict) else value
    return view.lock()
