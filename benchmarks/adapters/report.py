"""Turn the JSON of every run into one Markdown table for each imbalance."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SHOTS = ("overall", "many", "medium", "few")


def write(folder: Path, methods: Iterable[str]) -> str:
    """Read ``folder/*.json``, write ``report.md`` there, methods in this order; return its text."""
    runs: dict[float, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(folder.glob("*-seed*.json")):
        result = json.loads(file.read_text())
        runs[result["imbalance"]][result["method"]].append(result)
    if not runs:
        raise SystemExit(f"No finished run in {folder}.")
    parts = []
    for imbalance in sorted(runs, reverse=True):
        of_method = runs[imbalance]
        header = ["method", "seeds", *SHOTS, "trained parameters", "MFLOPs", "CPU s per step"]
        lines = [header, ["---"] * len(header)]
        for name in (name for name in methods if name in of_method):
            lines += _rows(name, of_method[name])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"Imbalance {imbalance:g}\n\n{table}")
    text = "\n\n".join(parts)
    (folder / "report.md").write_text(text + "\n")
    return text


def _rows(name: str, results: list[dict[str, Any]]) -> list[list[str]]:
    first = results[0]
    flops = first["flops"]["trunk"] + sum(first["flops"]["experts"])
    step = f"{mean(r['cpu_seconds_per_step'] for r in results):.3f}"
    rows = [_cells(name, results, f"{first['trainable_parameters']:,}", flops, step)]
    for kind in first.get("exits", {}):
        exits = [r["exits"][kind] for r in results]
        experts = mean(e["mean_experts"] for e in exits)
        shown = f"{name}, exit by {kind} ({experts:.2f} experts)"
        rows.append(_cells(shown, exits, "", mean(e["flops"] for e in exits), ""))
    return rows


def _cells(
    name: str, results: list[dict[str, Any]], parameters: str, flops: float, step: str
) -> list[str]:
    spread = [_spread([r["accuracy"][column] for r in results]) for column in SHOTS]
    return [name, str(len(results)), *spread, parameters, f"{flops / 1e6:.0f}", step]


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    return f"{100 * mean(values):.2f} +- {100 * stdev(values):.2f}"
