"""Print the tables of docs/evidence/performance.md: ratios, both sides in turn in one process.

python -m benchmarks.speed [--threads 1] [--only training loss router routing ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.machine import machine
from benchmarks.speed import build, memory, routing, training
from benchmarks.speed.networks import Case

CASES: dict[str, Callable[[], Case]] = {
    "training": training.training,
    "floor": training.floor,
    "loss": training.loss,
    "router": training.router,
    "routing": routing.routing,
    "exported": routing.exported,
    "gates": routing.gates,
    "memory": memory.memory,
    "scaling": memory.scaling,
    "build": build.build,
}


def main() -> None:
    """Run the chosen cases and print each as a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine())
    for name in options.only:
        title, header, rows = CASES[name]()
        print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
        for row in rows:
            print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


if __name__ == "__main__":
    main()
