"""Turn the JSON of every run into one Markdown table and five plots."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.cifar import plots
from benchmarks.cifar.evaluate import SHOTS


def write(folder: Path) -> str:
    """Read ``folder/*.json``, write ``report.md`` and the plots there, return the table."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(folder.glob("*-seed*.json")):
        result = json.loads(file.read_text())
        runs[result["method"]].append(result)
    if not runs:
        raise SystemExit(f"No finished run in {folder}.")
    rows = [row for name, results in runs.items() for row in _rows(name, results)]
    header = ["method", "seeds", *SHOTS, "MFLOPs", "mean experts", "minutes"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    table = "\n".join(f"| {line} |" for line in lines + [" | ".join(row) for row in rows])
    first = next(iter(runs.values()))[0]
    recipe = ", ".join(f"{key} {value}" for key, value in first["recipe"].items())
    text = (
        f"Recipe: {recipe}. torch {first['torch']}, {first['device']}. Top-1 accuracy in percent "
        "on the whole balanced test set, last epoch; mean +- deviation over seeds.\n\n" + table
    )
    (folder / "report.md").write_text(text + "\n")
    plots.cost(runs, folder / "accuracy-and-flops.png")
    plots.head_and_tail(runs, folder / "head-and-tail.png")
    plots.accuracy_by_class(runs, folder / "accuracy-by-class.png")
    plots.experts_by_class(runs, folder / "experts-by-class.png")
    plots.disagreement_by_class(runs, folder / "disagreement-by-class.png")
    return text


def _rows(name: str, results: list[dict[str, Any]]) -> list[list[str]]:
    """One row for all experts, then one for each way of exiting early."""
    minutes = f"{mean(r['train_seconds'] for r in results) / 60:.1f}"
    rows = [_cells(name, results, minutes)]
    for kind in sorted(results[0].get("routed", {})):
        rows.append(_cells(f"{name}, {kind}", [r["routed"][kind] for r in results], ""))
    return rows


def _cells(name: str, results: list[dict[str, Any]], minutes: str) -> list[str]:
    accuracy = [_spread([r["accuracy"][column] for r in results]) for column in SHOTS]
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
