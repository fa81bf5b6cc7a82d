"""Who trains what: pool, dev, held-out and base, split by image before anything is trained.

Records that share an image, by path or by equal bytes, form one group and stay on one side; a text-only record is a
group of its own. A keyed hash of the group decides, so the order of the file, its other records and the names of the
image files do not matter.
"""

import hashlib
from collections.abc import Iterable, Sequence

from coincide_jax.core.errors import UserError
from coincide_jax.dataset.source import Record

PARTS = ("pool", "dev", "heldout", "base")


def group_of(record: Record, digests: dict[str, str]) -> str:
    """The group of a valid record: the digest of its image's bytes (equal paths have equal bytes), or its id."""
    return digests[record.image] if record.image else f"id:{record.id}"


def position(group: str, seed: int) -> float:
    """A number in [0, 1) that depends on group and seed alone."""
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=7, key=key).digest(), "big") / 2**56


def split(
    records: Sequence[Record | None],
    digests: dict[str, str],
    *,
    heldout: float,
    dev: float,
    base: float,
    seed: int,
    asked: Iterable[str] = (),
) -> dict[str, list[int]]:
    """Rows of each part. `heldout`, `dev`, `base` are shares of the groups; `asked` are digests of question images.

    A record that shares an image with a question is held out whatever its hash says. Held-out and dev are taken from
    the low end of [0, 1), base from the high end: another base share moves no record into or out of held-out and dev.

    Raises:
      UserError: shares that are negative or leave nothing for the pool; an empty pool.
    """
    shares = {"share_heldout": heldout, "share_dev": dev, "base_share": base}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"dataset.{name} is {share}; expected a share from 0 to below 1")
    if sum(shares.values()) >= 1:
        named = " + ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"the shares of dataset leave nothing for the pool: {named} is {sum(shares.values()):g}")
    asked = set(asked)
    parts = {name: [] for name in PARTS}
    for record in records:
        if record is None:
            continue
        group = group_of(record, digests)
        at = position(group, seed)
        if group in asked or at < heldout:
            part = "heldout"
        elif at < heldout + dev:
            part = "dev"
        else:
            part = "base" if at >= 1 - base else "pool"
        parts[part].append(record.index)
    if not parts["pool"]:
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in parts.items() if name != "pool")
        raise UserError(f"the pool is empty: of {sum(map(len, parts.values()))} valid records {counts}")
    return parts


def unseen(
    candidates: Sequence[Record | None],
    candidate_digests: dict[str, str],
    records: Sequence[Record | None],
    digests: dict[str, str],
    asked: Iterable[str] = (),
) -> list[int]:
    """Rows of another file's records for the base: those that share no image with `records` or questions.

    Ids of two files may coincide by chance ("0", "1", …), so text-only records are compared by their turns.
    """
    images = set(asked) | {digests[record.image] for record in records if record and record.image}
    texts = {record.turns for record in records if record and not record.image}
    return [
        record.index
        for record in candidates
        if record and (candidate_digests[record.image] not in images if record.image else record.turns not in texts)
    ]
