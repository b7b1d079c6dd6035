"""Figures of the report: accuracy against cost, and what changes with class frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.cifar.methods import METHODS

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
_WINDOW = 9
# Okabe and Ito's colours, which people who see fewer colours can tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
_EXITS = {"router": "-", "max_probability": "--", "margin": ":"}


def _color(runs: Runs, name: str) -> str:
    """One colour for a method in all figures."""
    return _COLOURS[list(runs).index(name) % len(_COLOURS)]


def _words(name: str) -> str:
    """A method, with or without an exit behind it, as a reader knows it."""
    method, comma, exit_by = name.partition(", ")
    words = METHODS[method].words if method in METHODS else method
    return words + comma + exit_by.replace("_", " ")


def cost(runs: Runs, file: Path) -> None:
    """Accuracy against FLOPs: a point for each method, a curve for each way to exit early."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, results in runs.items():
        color = _color(runs, name)
        x = results[0]["flops"] / 1e6
        y = 100 * mean(r["accuracy"]["overall"] for r in results)
        axes.plot(x, y, "o", color=color, label=_words(name))
        for kind, curve in results[0].get("curves", {}).items():
            order = np.argsort(curve["flops"])
            axes.plot(
                np.asarray(curve["flops"])[order] / 1e6,
                100 * np.asarray(curve["accuracy"])[order],
                _EXITS[kind],
                color=color,
                linewidth=1.2,
            )
    for kind, style in _EXITS.items():
        axes.plot([], [], style, color="gray", label=f"exit by {kind.replace('_', ' ')}")
    _finish(
        axes,
        "MFLOPs per image",
        "top-1 accuracy, %",
        "Lines: all thresholds, first seed; points: all experts, mean over seeds",
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def head_and_tail(runs: Runs, file: Path) -> None:
    """Few-shot against many-shot accuracy while the logits are adjusted after training."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, results in runs.items():
        curves = [r["by_tau"] for r in results if r.get("by_tau")]
        if not curves or None in (curves[0][0]["many"], curves[0][0]["few"]):
            continue
        x, y = (
            100 * np.mean([[row[split] for row in curve] for curve in curves], axis=0)
            for split in ("many", "few")
        )
        untouched = [row["tau"] for row in curves[0]].index(0)
        axes.plot(x, y, ".-", color=_color(runs, name), linewidth=1.2, label=_words(name))
        axes.plot(x[untouched], y[untouched], "o", color=_color(runs, name))
    if axes.lines:
        title = "Logits adjusted after training, mean over seeds; large points: as trained"
        _finish(axes, "many-shot accuracy, %", "few-shot accuracy, %", title)
        figure.savefig(file, dpi=130)
    plt.close(figure)


def accuracy_by_class(runs: Runs, file: Path) -> None:
    """Accuracy of the classes in order of their frequency."""
    curves = {
        name: 100 * np.mean([r["per_class"] for r in results], axis=0)
        for name, results in runs.items()
    }
    _by_class(curves, runs, file, "top-1 accuracy, %", "Accuracy by class frequency")


def experts_by_class(runs: Runs, file: Path) -> None:
    """Mean number of experts used, by class frequency, at the budget that was calibrated."""
    curves = {}
    for name, results in runs.items():
        for kind in sorted(results[0].get("routed", {})):
            found = [r["routed"][kind].get("experts_by_class") for r in results]
            if kind != "router at 0.5" and all(found):
                curves[f"{name}, {kind}"] = np.mean(found, axis=0)
    _by_class(curves, runs, file, "experts used", "Experts used by class frequency")


def disagreement_by_class(runs: Runs, file: Path) -> None:
    """Share of pairs of experts that predict different classes, by class frequency."""
    curves = {
        name: 100 * np.mean([r["disagreement_by_class"] for r in results], axis=0)
        for name, results in runs.items()
        if all("disagreement_by_class" in r for r in results)
    }
    title = "Disagreement of the experts by class frequency"
    _by_class(curves, runs, file, "pairs of experts that disagree, %", title)


def _by_class(curves: Mapping[str, Any], runs: Runs, file: Path, ylabel: str, title: str) -> None:
    if not curves:
        return
    counts = np.asarray(next(iter(runs.values()))[0]["class_counts"])
    order = np.argsort(-counts, kind="stable")
    window = min(_WINDOW, len(counts))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, values in curves.items():
        padded = np.pad(np.asarray(values)[order], (window // 2, (window - 1) // 2), mode="edge")
        method, _, exit_by = name.partition(", ")
        axes.plot(
            np.convolve(padded, np.ones(window) / window, mode="valid"),
            _EXITS.get(exit_by.partition(" at ")[0], "-"),
            color=_color(runs, method),
            label=_words(name),
        )
    for limit, label in ((100, "many | medium"), (20, "medium | few")):
        edge = int((counts[order] > limit).sum() if limit == 100 else (counts >= limit).sum())
        if 0 < edge < len(counts):
            axes.axvline(edge - 0.5, color="gray", linewidth=0.8)
            axes.annotate(
                label,
                (edge - 0.5, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7,
                color="gray",
            )
    xlabel = f"class, from most to least training images (mean of {window} neighbours)"
    _finish(axes, xlabel, ylabel, title)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _finish(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, pad=16, fontsize=10)
    axes.legend(fontsize=7, ncol=2)
    axes.grid(alpha=0.3)
