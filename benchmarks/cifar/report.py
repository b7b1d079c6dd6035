"""Turn the JSON of every run into one Markdown table and two plots."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_COLUMNS = ("overall", "many", "medium", "few")


def write(folder: Path) -> str:
    """Read ``folder/*.json``, write ``report.md`` and the plots there, return the table."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(folder.glob("*-seed*.json")):
        result = json.loads(file.read_text())
        runs[result["method"]].append(result)
    if not runs:
        raise SystemExit(f"No finished run in {folder}.")
    rows = [row for name, results in runs.items() for row in _rows(name, results)]
    header = ["method", "seeds", *_COLUMNS, "MFLOPs", "mean experts", "minutes"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    table = "\n".join(f"| {line} |" for line in lines + [" | ".join(row) for row in rows])
    first = next(iter(runs.values()))[0]
    recipe = ", ".join(f"{key} {value}" for key, value in first["recipe"].items())
    text = (
        f"Recipe: {recipe}. torch {first['torch']}, {first['device']}. Top-1 accuracy in percent "
        "on the whole balanced test set, last epoch; mean +- deviation over seeds.\n\n" + table
    )
    (folder / "report.md").write_text(text + "\n")
    _plot_cost(runs, folder / "accuracy-and-flops.png")
    _plot_classes(runs, folder / "accuracy-by-class.png")
    return text


def _rows(name: str, results: list[dict[str, Any]]) -> list[list[str]]:
    """One row for all experts, then one for each way of exiting early."""
    minutes = f"{mean(r['train_seconds'] for r in results) / 60:.1f}"
    rows = [_cells(name, results, minutes)]
    for kind in sorted(results[0].get("routed", {})):
        rows.append(_cells(f"{name}, {kind}", [r["routed"][kind] for r in results], ""))
    return rows


def _cells(name: str, results: list[dict[str, Any]], minutes: str) -> list[str]:
    accuracy = [_spread([r["accuracy"][column] for r in results]) for column in _COLUMNS]
    flops = f"{mean(r['flops'] for r in results) / 1e6:.0f}"
    experts = f"{mean(r.get('mean_experts', 1.0) for r in results):.2f}"
    return [name, str(len(results)), *accuracy, flops, experts, minutes]


def _spread(values: list[float | None]) -> str:
    present = [100 * v for v in values if v is not None]
    if not present:
        return "absent"
    if len(present) == 1:
        return f"{present[0]:.1f}"
    return f"{mean(present):.1f} +- {stdev(present):.1f}"


def _plot_cost(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, results in runs.items():
        x, y = results[0]["flops"] / 1e6, 100 * mean(r["accuracy"]["overall"] for r in results)
        axes.plot(x, y, "o")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        curves = results[0].get("curves", {})
        for kind, curve in curves.items():
            axes.plot(
                [c / 1e6 for c in curve["flops"]],
                [100 * a for a in curve["accuracy"]],
                "-" if kind == "router" else ":",
                label=f"{name}: exit by {kind}",
            )
    axes.set(xlabel="MFLOPs per image", ylabel="top-1 accuracy, %", title="Accuracy and cost")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _plot_classes(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, results in runs.items():
        accuracy = 100 * np.mean([r["per_class"] for r in results], axis=0)
        order = np.argsort(results[0]["class_counts"])[::-1]
        window = np.ones(9) / 9
        smooth = np.convolve(np.pad(accuracy[order], 4, mode="edge"), window, mode="valid")
        axes.plot(smooth, label=name)
    axes.set(
        xlabel="class, from most to least training images (mean of 9 neighbours)",
        ylabel="top-1 accuracy, %",
        title="Accuracy by class frequency",
    )
    axes.legend(fontsize=7, ncol=2)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)
