"""Clusters as a person sees them: words, main task, and samples picked and left with their images."""

import base64
import collections
import functools
import io
import math
import pathlib
import re

import numpy as np
from PIL import Image, UnidentifiedImageError

from coincide_jax.kernels import kmeans
from coincide_jax.report.sources import Artefacts, MissingError

DRAWN = 5  # clusters shown beside the worst one
DRAW_SEED = 0
MIN_MEMBERS = 10
SAMPLES = 8  # picked, and as many left, of each cluster
SIDE = 112  # pixels of a thumbnail's longer side
QUALITY = 78
TEXT = 140  # characters of a question or answer
SUFFIX = re.compile(r"\n+Answer [^\n]*$")  # how to answer: the same in thousands of records
WORD = re.compile(r"[^\W\d_]{3,}")
PLAIN_WORDS = frozenset(
    re.findall(r"\w+", "the and this that these with what which for are was were has have does you from")
)


def thumbnail(path: pathlib.Path | None) -> str | None:
    """The image as a data URI (JPEG, longer side `SIDE`), None for text only or an unreadable file."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def top_words(artefacts: Artefacts, groups: list[np.ndarray], count: int = 4) -> list[list[str]]:
    """The words that mark each cluster's questions: frequent there and rarer elsewhere (count · log lift)."""
    per_group = []
    for group in groups:
        counts: collections.Counter = collections.Counter()
        for index in group:
            line = artefacts.question(int(index))[0].split("\n")[0].lower()
            counts.update(set(WORD.findall(line)) - PLAIN_WORDS)
        per_group.append(counts)
    overall: collections.Counter = collections.Counter()
    for counts in per_group:
        overall.update(counts)
    total = max(sum(len(group) for group in groups), 1)
    words = []
    for group, counts in zip(groups, per_group, strict=True):
        lift = {word: n * math.log((n / len(group)) / (overall[word] / total) + 0.1) for word, n in counts.items()}
        words.append(sorted(lift, key=lambda word: (-lift[word], word))[:count])
    return words


@functools.lru_cache(maxsize=1)
def describe(artefacts: Artefacts) -> list[dict]:
    """One row a cluster: sizes and scores, main task with its share, words, within-cluster cosine."""
    columns = artefacts.clusters
    clusters = [int(number) for number in columns["cluster"]]
    groups = kmeans.members(artefacts.assignment, max(clusters) + 1)
    groups = [groups[number] for number in clusters]
    try:
        cosines = artefacts.cosines
    except MissingError:
        cosines = np.full(max(clusters) + 1, np.nan)
    rows = []
    for row, (cluster, group, words) in enumerate(zip(clusters, groups, top_words(artefacts, groups), strict=True)):
        names, counts = np.unique(artefacts.tasks[group].astype(str), return_counts=True)
        main = int(counts.argmax()) if len(group) else -1
        rows.append(
            {
                "cluster": cluster,
                **{
                    name: columns[name][row].item() if name in columns else float("nan")
                    for name in ("size", "transferability", "density", "probability", "quota", "picked")
                },
                "cosine": float(cosines[cluster]) if cluster < len(cosines) else float("nan"),
                "task": str(names[main]) if main >= 0 else "",
                "purity": float(counts[main] / len(group)) if main >= 0 else float("nan"),
                "words": words,
            }
        )
    return rows


def choose(described: list[dict]) -> list[tuple[dict, str]]:
    """Clusters to show, each with the reason: some drawn by seed among the large ones, then the worst by cosine."""
    large = [row for row in described if row["size"] >= MIN_MEMBERS] or [row for row in described if row["size"]]
    rng = np.random.default_rng(DRAW_SEED)
    drawn = sorted(rng.permutation(len(large))[:DRAWN].tolist())
    chosen = [(large[position], f"drawn by seed {DRAW_SEED}") for position in drawn]
    scored = [row for row in large if not math.isnan(row["cosine"])]
    if scored:
        worst = min(scored, key=lambda row: (row["cosine"], row["cluster"]))
        chosen = [(row, why) for row, why in chosen if row is not worst]
        chosen.append((worst, f"the lowest within-cluster cosine of those with {MIN_MEMBERS} records or more"))
    return chosen


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= TEXT else text[: TEXT - 1].rstrip() + "…"


def samples(artefacts: Artefacts, indices: np.ndarray) -> list[dict]:
    """Thumbnail, question, answer, task and id of records."""
    shown = []
    for index in map(int, indices):
        question, answer = artefacts.question(index)
        shown.append(
            {
                "id": str(artefacts.record(index).get("id", index)),
                "task": str(artefacts.tasks[index]),
                "question": _cut(SUFFIX.sub("", question)),
                "answer": _cut(answer),
                "image": thumbnail(artefacts.image(index)),
                "text_only": artefacts.image(index) is None,
            }
        )
    return shown


def galleries(artefacts: Artefacts, described: list[dict]) -> list[dict]:
    """The chosen clusters with `SAMPLES` picked records (in the order of picking) and as many left ones (drawn)."""
    picked_order = artefacts.coreset
    groups = kmeans.members(artefacts.assignment, max(row["cluster"] for row in described) + 1)
    shown = []
    for row, why in choose(described):
        group = groups[row["cluster"]]
        picked = picked_order[np.isin(picked_order, group)]
        left = np.setdiff1d(group, picked)
        rng = np.random.default_rng([DRAW_SEED, row["cluster"]])
        left_shown = np.sort(rng.permutation(left)[:SAMPLES])
        shown.append(
            row
            | {
                "why": why,
                "picked_samples": samples(artefacts, picked[:SAMPLES]),
                "left_samples": samples(artefacts, left_shown),
                "picked_total": len(picked),
                "left_total": len(left),
            }
        )
    return shown
