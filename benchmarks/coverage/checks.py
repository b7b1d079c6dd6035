"""The checks of the coverage table: each compares a wrapped model with the backbone itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.coverage import agreement, upkeep
from benchmarks.coverage.subject import Subject
from ride_plugin import cost_report

CHECKS: dict[str, Callable[[Subject], None]] = {
    "wraps": agreement.wraps,
    "eval": agreement.evaluation,
    "train": agreement.training,
    "once": agreement.trunk_once,
    "grad": agreement.gradients_one,
    "grad2": agreement.gradients_two,
    "rows": agreement.rows,
    "copy": upkeep.deep_copy,
    "pickle": upkeep.pickled,
    "names": upkeep.state_dict,
    "half": upkeep.half,
    "bf16": upkeep.bfloat16,
    "sizes": agreement.sizes,
    "threads": upkeep.threads,
    "compile": upkeep.compiled,
}
"""Every check by its column in the table, in the order in which they run."""


def measure(subject: Subject) -> dict[str, Any]:
    """Fork point, and what share of parameters and multiply-adds lies in the trunk."""
    model = subject.one
    report = cost_report(model, example_input=model.example_input(1))
    return {
        "fork": model.fork_at,
        "parameters": report.trunk_parameters / max(1, report.parameters),
        "multiply_adds": report.trunk_flops / max(1, report.flops),
        "size": report.parameters,
    }
