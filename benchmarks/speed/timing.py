"""Interleaved timing: both sides in one process, in turn, as ratios of neighbours."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

ROUNDS = 9


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs: median of the rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float
    ours_ms: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], seconds: float = 0.25
) -> Ratio:
    """Time two functions in turn, A B, B A, A B, ...; each round gives one ratio.

    Processor time on a CPU, since the machine may be shared; on an accelerator, wall time between
    synchronisations.
    """
    repeats = [max(1, int(seconds / max(_once(f), 1e-6))) for f in (ours, theirs)]
    rounds: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    try:
        for i in range(ROUNDS):
            times = {}
            for key in ((0, 1), (1, 0))[i % 2]:
                function = (ours, theirs)[key]
                start = _now()
                for _ in range(repeats[key]):
                    function()
                times[key] = (_now() - start) / repeats[key]
            rounds.append((times[0] / times[1], times[0]))
    finally:
        gc.enable()
    ratios = [ratio for ratio, _ in rounds]
    return Ratio(median(ratios), min(ratios), max(ratios), 1e3 * median(t for _, t in rounds))


def _once(function: Callable[[], object]) -> float:
    function()
    start = _now()
    function()
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
