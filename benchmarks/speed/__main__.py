"""Print the tables of docs/evidence/performance/: ratios, both sides in turn in one process.

python -m benchmarks.speed [--threads 1] [--only training loss router routing ...]

With `--authors PATH`, a checkout of the RIDE authors' code, only the comparisons with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.speed import accelerator, authors, build, memory, routing, training
from benchmarks.speed.networks import Case

CASES: dict[str, Callable[[], Case]] = {
    "training": training.training,
    "beside-plain": training.beside_plain,
    "floor": training.floor,
    "loss": training.loss,
    "router": training.router,
    "routing": routing.routing,
    "exported": routing.exported,
    "gates": routing.gates,
    "memory": memory.memory,
    "scaling": memory.scaling,
    "build": build.build,
    "accelerator": accelerator.accelerator,
}


def main() -> None:
    """Run the chosen cases and print each as a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--authors", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine())
    cases = [CASES[name] for name in options.only]
    if options.authors is not None:
        theirs = authors.Authors(options.authors)
        cases = [partial(case, theirs) for case in (authors.training, authors.routing)]
    for case in cases:
        title, header, rows = case()
        print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
        for row in rows:
            print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


if __name__ == "__main__":
    main()
