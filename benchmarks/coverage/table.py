"""Writes docs/evidence/coverage.md."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.checks import CHECKS

_HEAD = """# Coverage

What `RIDEWrapper(backbone, num_experts=...)` does with {total} architectures, with no other
argument. The page is generated; each number below was measured by the command.

```bash
pip install torch==2.13.0 torchvision==0.28.0 timm transformers  # in an environment of its own
pip install -e .
OMP_NUM_THREADS=1 python -m benchmarks.coverage  # about an hour on one core
```

Environment of this page: Python {python}, {versions}; CPU, one thread; random weights, ten
classes. The library itself imports none of these model libraries. A dozen of the hand-written
architectures run in the ordinary tests (`tests/test_coverage.py`).

## Summary

**{green} of {total} architectures ({share:.1f} %) pass every check that applies to them.**

| source | architectures | all green |
| --- | --- | --- |
{sources}

| check | what it asks | passed | does not apply | failed |
| --- | --- | --- | --- | --- |
{checks}

A check does not apply where the backbone itself cannot do what is asked: it takes one input size
only, has no kernel for half precision on the CPU, cannot be pickled. `compile` is tried on some
architectures only, because it is slow. Each comparison is with a copy of the backbone that has the
weights of the trunk and of one expert. "To the bit" means with the same kernels: torch replaces
its own transformer layers by a fused kernel in evaluation where no hook is registered, and the
wrapper needs hooks, so there the comparison to the bit is with a backbone that has hooks too.

## What is not green

{failures}

## The table

*Fork* is the first submodule that each expert owns; the shares are those of the parameters and of
the multiply-adds of one expert's path that the trunk holds. Every check of the list above was tried
on every architecture; those that are not named in the last column passed. `compile` was tried on
fewer, and passed for {compiled}. A click on a heading sorts the table.
"""


def write_page(
    page: Path, architectures: Sequence[Architecture], results: Mapping[str, dict[str, Any]]
) -> None:
    """Write the page from the results of every architecture."""
    chosen = [(a, results[a.key]) for a in architectures]
    sources = Counter(a.source for a, _ in chosen)
    green = Counter(a.source for a, result in chosen if not result["failed"])
    lines = [f"| {s} | {n} | {green[s]} |" for s, n in sources.items()]
    page.write_text(
        _HEAD.format(
            total=len(chosen),
            green=green.total(),
            share=100 * green.total() / len(chosen),
            python=platform.python_version(),
            versions=_versions(),
            sources="\n".join(lines),
            checks="\n".join(_check_line(name, [r for _, r in chosen]) for name in CHECKS),
            failures=_failures(chosen),
            compiled=", ".join(f"`{a.name}`" for a, r in chosen if "compile" in r["passed"]),
        )
        + "".join(_table(source, chosen) for source in sources)
    )


def _versions() -> str:
    names = ("torch", "torchvision", "timm", "transformers")
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in names)


def _check_line(name: str, results: Sequence[dict[str, Any]]) -> str:
    meaning = (CHECKS[name].__doc__ or "").strip().splitlines()[0]
    passed = sum(name in r["passed"] for r in results)
    skipped = sum(name in r["not_applicable"] for r in results)
    return f"| {name} | {meaning} | {passed} | {skipped} | {len(results) - passed - skipped} |"


def _failures(chosen: Sequence[tuple[Architecture, dict[str, Any]]]) -> str:
    lines = [
        f"- `{a.key}`, {check}: {' '.join(why.split())[:300]}"
        for a, result in chosen
        for check, why in result["failed"].items()
    ]
    return "\n".join(lines) or "Nothing."


def _table(source: str, chosen: Sequence[tuple[Architecture, dict[str, Any]]]) -> str:
    head = ["architecture", "fork", "shared parameters", "shared multiply-adds", "not passed"]
    lines = [f"\n### {source}\n", '<div class="sortable" markdown>\n']
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    hard = [f"- `{a.name}`: {a.hard}" for a, _ in chosen if a.source == source and a.hard]
    for a, result in chosen:
        if a.source != source:
            continue
        cells = ["–", "–", "–"]
        if "fork" in result:
            shares = (result["parameters"], result["multiply_adds"])
            cells = [f"`{result['fork']}`", *(f"{100 * s:.0f} %" for s in shares)]
        lines.append(f"| `{a.name}` | {' | '.join([*cells, _not_passed(result)])} |")
    notes = ["", "What is special about them:", "", *hard] if hard else []
    return "\n".join([*lines, "\n</div>", *notes]) + "\n"


def _not_passed(result: dict[str, Any]) -> str:
    if "wraps" in result["failed"]:
        return "**✗** wraps, hence all"
    failed = [name for name in CHECKS if name in result["failed"]]
    elsewhere = [n for n in CHECKS if n in result["not_applicable"] and n != "compile"]
    parts = [f"**✗** {', '.join(failed)}"] if failed else []
    parts += [f"does not apply: {', '.join(elsewhere)}"] if elsewhere else []
    return "; ".join(parts)
