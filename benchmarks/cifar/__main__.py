"""Train and compare methods on long-tailed CIFAR.

    python -m benchmarks.cifar --data cifar-100-python --methods ce ldam_drw ride3_official

A finished run is not repeated; a killed one goes on from its last epoch.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.cifar import report
from benchmarks.cifar.data import load
from benchmarks.cifar.methods import METHODS
from benchmarks.cifar.train import Recipe, Run


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="cifar-100-python, cifar-10-batches-py or .npz"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["ce"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--imbalance", type=float, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar100_lt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for field in fields(Recipe):
        if field.name != "milestones":
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, type=type(field.default), default=field.default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        **{f.name: getattr(options, f.name) for f in fields(Recipe) if f.name != "milestones"}
    )
    data = load(options.data, options.imbalance, torch.device(options.device))
    for seed in options.seeds:
        for name in options.methods:
            Run(name, seed, recipe, data, options.out).execute()
    print(report.write(options.out))


if __name__ == "__main__":
    main()
