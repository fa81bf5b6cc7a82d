"""The cluster audits of a table's rows side by side: how tight, separate and pure the clusters of each are."""

import pathlib

from coincide_jax.core import artifacts

PLAIN = ("cohesion", "separation", "silhouette")


def tell(workdir: pathlib.Path, clusters: dict[str, pathlib.Path]) -> None:
    """Where rows have clusters of their own: prints and writes how good they are, audit.md, audit.json; rows with the
    same clusters share a line."""
    rows = {}
    for row, folder in clusters.items():
        rows.setdefault(folder, []).append(row)
    if len(rows) > 1:
        found = collect({", ".join(names): folder for folder, names in rows.items()})
        artifacts.write_json(workdir / "audit.json", found)
        artifacts.write_text(workdir / "audit.md", markdown(found))
        print(f"\n{markdown(found)}")


def collect(folders: dict[str, pathlib.Path]) -> list[dict]:
    """One entry a row, from the `quality.json` of its cluster folder.

    Each has row, records, clusters, cohesion (mean cosine to the own centroid), separation (to the next one),
    silhouette, centroids (mean cosine between centroids), labels {label: purity, nmi and the same of shuffled
    clusters}; None where a row's audit left it out.
    """
    found = []
    for row, folder in folders.items():
        quality = artifacts.read_json(folder / "quality.json")
        apart = quality.get("separation", {})
        found.append(
            {
                "row": row,
                "records": sum(quality["sizes"]),
                "clusters": len(quality["sizes"]),
                "cohesion": quality["within_cosine"]["overall"],
                "separation": apart.get("cosine_to_the_next"),
                "silhouette": apart.get("silhouette"),
                "centroids": quality["between_centroids"],
                "labels": quality["labels"],
            }
        )
    return found


def markdown(rows: list[dict]) -> str:
    """A Markdown table of `collect`; purity and NMI (normalised mutual information) with those of shuffled clusters of
    the same sizes behind them, since both rise with the number of clusters."""
    labels = list(dict.fromkeys(name for row in rows for name in row["labels"]))
    heads = [f"{label} {measure} (shuffled)" for label in labels for measure in ("purity", "NMI")]
    lines = [
        "| " + " | ".join(["row", "K", "cohesion", "separation", "silhouette", *heads]) + " |",
        "|---|" + "--:|" * (4 + len(heads)),
    ]
    for row in rows:
        cells = [row["row"], f"{row['clusters']:,}", *(_number(row[key]) for key in PLAIN)]
        for label in labels:
            found = row["labels"].get(label)
            for measure in ("purity", "nmi"):
                cells.append(f"{found[measure]:.3f} ({found[f'{measure}_random']:.3f})" if found else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
