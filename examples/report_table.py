"""How the figures of an evaluation are shown: as tables and as plots."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from metrics import srcc


Rows = list[dict[str, Any]]
CAPTIONS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
SCORES = (("SRCC", "score"), ("PLCC", "score"), ("accuracy at 5", "score"))
WIDE = (*((name, "") for name in CAPTIONS), ("length ratio", "words"), *SCORES)  # figures and their protocols
PANELS = {"CIDEr": "CIDEr of each topic", "coverage": "topic coverage"}


def show(value: float | None, ends: list[float] | None = None) -> str:
    if value is None or np.isnan(value):
        return "-"
    known = ends and not any(end is None or np.isnan(end) for end in ends)
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if known else "")


def as_markdown(table: Rows, facts: dict[str, Any]) -> str:
    """The table, and below it what its words mean."""
    systems = facts["systems"]
    heads = ["measure", "protocol", *(head for name in systems for head in (name, f"{name}, wrong photo")), "baseline"]
    others = [name for name in systems if facts["against"] not in (None, name)]
    heads += [head for name in others for head in (f"{name} less {facts['against']}", "p")]
    warning = [] if facts["warning"] is None else [facts["warning"], ""]
    lines = [*warning, "| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in table:
        cells = [row["measure"], row["protocol"]]
        for cell in row["systems"].values():
            cells.append(show(cell.get("value"), cell.get("interval")))
            cells.append(show(cell.get("wrong_photo_value"), cell.get("wrong_photo_interval")))
        cells.append(show(row["baseline"]))
        for name in others:
            difference = row.get("comparisons", {}).get(name, {})
            cells += [show(difference.get("difference"), difference.get("interval")), show(difference.get("p"))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- **{name}** not computed: {reason}." for name, reason in facts["not_computed"].items())]
    lines += [f"- {name}: {meaning}." for name, meaning in facts["protocols"].items()]
    lines += [f"- {note}." for note in (*facts["notes"], *facts["statistics"])]
    return "\n".join(lines) + "\n"


def as_wide(report: dict[str, Any], protocol: str = "all") -> str:
    """
    The figures of the field with a row for each system, for what is left with a wrong photograph, for the scores' baselines,
    and for each difference.

    Args:
        report: The report.json of an evaluation.
        protocol: By which captions are measured; see `PROTOCOLS` of evaluate_captions.py.
    """
    found = {(row["measure"], row["protocol"]): row for row in report["table"]}
    columns = [found.get((name, kind or protocol), {}) for name, kind in WIDE]
    lines = [] if report["warning"] is None else [report["warning"], ""]
    lines += ["| system | " + " | ".join(name for name, _ in WIDE) + " |", "|---|" + "---:|" * len(WIDE)]

    def add(name: str, cells: list[str]):
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    def cells_of(name: str, prefix: str) -> list[str]:
        cells = [column.get("systems", {}).get(name, {}) for column in columns]
        return [show(cell.get(f"{prefix}value"), cell.get(f"{prefix}interval")) for cell in cells]

    for name in report["systems"]:
        add(name, cells_of(name, ""))
        add(f"{name}, wrong photo", cells_of(name, "wrong_photo_"))
    if any(column.get("baseline") is not None for column in columns):
        add("baseline", [show(column.get("baseline")) for column in columns])
    for name in report["systems"]:
        tests = [column.get("comparisons", {}).get(name, {}) for column in columns]
        if any(tests):
            shown = [show(one.get("difference"), one.get("interval")) for one in tests]
            shown = [f"{cell}, p {show(one.get('p'))}" if one else "-" for cell, one in zip(shown, tests)]
            add(f"{name} less {report['against']}", shown)
    missing = [f"- **{name}** is missing: {reason}." for name, reason in report["not_computed"].items()]
    meaning = [
        f"- {name}: {report['protocols'][name]}." for name in (protocol, "score") if name in report["protocols"]
    ]
    return "\n".join([*lines, "", *missing, *meaning, *(f"- {one}." for one in report["statistics"])]) + "\n"


def plot_topics(table: Rows, path: Path):
    """Bars with 95 % intervals and wrong-photo marks: CIDEr of each topic of the references, and topic coverage."""
    groups = {title: [row for row in table if row["measure"].startswith(f"{title} of ")] for title in PANELS}
    groups = {title: rows for title, rows in groups.items() if rows}
    if not groups:  # no topics are given, and none of those that are read from words is spoken of
        return
    figure = Figure(figsize=(5.5 * len(groups), 3.8), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        names = list(rows[0]["systems"])
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            cells = [row["systems"][name] for row in rows]
            values = np.array([cell.get("value", np.nan) for cell in cells])
            ends = np.array([cell.get("interval", [np.nan] * 2) for cell in cells])
            places = np.arange(len(rows)) + (number - (len(names) - 1) / 2) * width
            # rounding may put a value a hair outside its own interval
            errors = np.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
            axes.bar(places, values, width * 0.94, yerr=errors, capsize=3, label=name)
            marks = [cell.get("wrong_photo_value", np.nan) for cell in cells]
            axes.plot(places, marks, "wD", markeredgecolor="k", label="wrong photo" if name == names[-1] else None)
        labels = [row["measure"].removeprefix(f"{title} of ").replace("_", " ") for row in rows]
        axes.set_xticks(range(len(rows)), labels, rotation=30 if len(rows) > 4 else 0)
        axes.set_title(PANELS[title])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names) + 1)
    figure.savefig(path, dpi=150)


def plot_scores(scores: dict[str, np.ndarray | None], path: Path):
    """Score over the references' score, one panel a system that has pairs `(photographs, 2)` of them."""
    scored = {name: pairs for name, pairs in scores.items() if pairs is not None}
    figure = Figure(figsize=(4 * len(scored), 4.2), layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False, sharex=True, sharey=True)[0]
    values = np.concatenate(list(scored.values()))
    ends = [min(values.min(), 1), max(values.max(), 10)]
    for axes, (name, pairs) in zip(panels, scored.items()):
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.scatter(pairs[:, 1], pairs[:, 0], s=9, alpha=0.5)
        axes.set(title=f"{name}\nSRCC {show(float(srcc(pairs)))}", xlabel="reference score", aspect="equal")
    panels[0].set_ylabel("score")
    figure.savefig(path, dpi=150)
