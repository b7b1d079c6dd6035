"""Draw the figures of docs/evidence/results.md and README.md from the numbers that docs state.

python -m benchmarks.figures

The numbers stand in figures.json: CIFAR-100-LT at imbalance 100, ResNet-32, 200 epochs, one or two
seeds. The runs are not part of the repository; what a run of benchmarks/cifar draws is in its
plots.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DATA = Path(__file__).with_suffix(".json")
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "figures"
# Okabe and Ito's colours, which people who see fewer colours can tell apart; and a shape for each.
LOOKS: dict[str, dict[str, Any]] = {
    "plain, cross entropy": {"color": "#000000", "marker": "o"},
    "plain, long-tail recipe": {"color": "#56B4E9", "marker": "s"},
    "plain, AutoAugment": {"color": "#0072B2", "marker": "s"},
    "three experts, 3/4 width": {"color": "#E69F00", "marker": "^"},
    "three experts, full width": {"color": "#D55E00", "marker": "D"},
    "three experts, 3/4 width, AutoAugment": {"color": "#CC79A7", "marker": "D"},
}
STYLE: dict[Any, Any] = {"svg.hashsalt": "ride-plugin", "font.size": 11, "axes.titlesize": 11}


def three_experts(data: dict[str, Any]) -> Figure:
    """Draw accuracy as bars, with the cost beside each."""
    figure, axes = _axes()
    for row, (_, accuracy, cost, color) in enumerate(data["bars"]):
        axes.barh(-row, accuracy, 0.7, color=color)
        axes.text(accuracy + 0.8, -row, f"{accuracy} %\ncost {cost:.2f}", va="center")
    axes.set(xlim=(0, 68), xlabel="accuracy, %")
    axes.set_yticks(range(0, -len(data["bars"]), -1), [name for name, *_ in data["bars"]])
    axes.set_title("CIFAR-100-LT, 200 epochs, one or two seeds")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy_and_cost(data: dict[str, Any]) -> Figure:
    """Draw accuracy against cost: all experts as points, exits by margin as lines."""
    figure, axes = _axes()
    for name, found in data["cost"].items():
        axes.plot(*zip(*found["all"], strict=True), ms=9, ls="", label=name, **LOOKS[name])
        if "margin" in found:
            line = LOOKS[name] | {"marker": "."}
            axes.plot(*zip(*found["margin"], strict=True), ls=":", **line)
    axes.plot([], [], ":", marker=".", color="gray", label="early exit by margin")
    return _finish(figure, axes, "cost, 1 = plain backbone", "accuracy, %")


def head_and_tail(data: dict[str, Any]) -> Figure:
    """Draw few-shot against many-shot accuracy as the logits are adjusted after training."""
    figure, axes = _axes()
    for name, found in data["many and few"].items():
        axes.plot(*zip(*found.values(), strict=True), ls=":", **LOOKS[name] | {"marker": "."})
        axes.plot(*found["0"], ms=9, ls="", label=name, **LOOKS[name])
        for tau, at in found.items():
            if tau != "0":
                axes.annotate(f" {tau}", at, fontsize=9, va="bottom")
    axes.plot([], [], ":", marker=".", color="gray", label="logits adjusted by tau")
    axes.set(xlim=(60, 75), ylim=(8, 40))
    return _finish(figure, axes, "many-shot accuracy, %", "few-shot accuracy, %")


FIGURES = {
    "three-experts": three_experts,
    "full-length-accuracy-and-cost": accuracy_and_cost,
    "head-and-tail": head_and_tail,
}


def _axes() -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(5.2, 4.4), layout="constrained")  # legible 360 pixels wide


def _finish(figure: Figure, axes: Axes, xlabel: str, ylabel: str) -> Figure:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, ncols=2, loc="outside lower center")
    return figure


def main(folder: Path = FOLDER) -> None:
    """Draw every figure as SVG."""
    data = json.loads(DATA.read_text())
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(data)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
