"""Accuracy where the test data have another class distribution than was trained for.

    python -m benchmarks.cifar.priors --data cifar-100-python --runs runs/cifar100_lt \
        --methods ce balanced_softmax_cosine ride3_official

Test sets as in SADE (Zhang et al., NeurIPS 2022): ``forward r``, the classes as frequent as a long
tail of imbalance r makes them in training; ``backward r``, the same with the order of the classes
turned round. Half of the test images (the first of each class after a seeded shuffle) are held out
to calibrate, the test sets are drawn from the other half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cifar.data import load
from benchmarks.cifar.evaluate import predict
from benchmarks.cifar.methods import METHODS
from benchmarks.cifar.train import Recipe, Run
from benchmarks.resnets import CifarResNet
from ride_plugin import RIDEWrapper, load_official_checkpoint
from ride_plugin.longtail import PriorCalibration, calibrate_prior

DRAWS = 5
SHIFTS = [("forward", 50), ("forward", 25), ("forward", 10), ("forward", 5), ("forward", 2)]
SHIFTS += [("uniform", 1)] + [("backward", r) for _, r in reversed(SHIFTS)]


def halves(labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Held-out rows, and for each class the rows that test sets are drawn from."""
    generator = torch.Generator().manual_seed(0)
    held_out, rest = [], []
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out.append(rows[: len(rows) // 2])
        rest.append(rows[len(rows) // 2 :])
    return torch.cat(held_out), rest


def draw(rows: list[Tensor], direction: str, ratio: int, seed: int) -> tuple[Tensor, float]:
    """Rows of one test set, and the exponent of its prior as a power of training counts of 100."""
    generator = torch.Generator().manual_seed(seed)
    classes = len(rows)
    share = ratio ** (-torch.arange(classes) / (classes - 1))
    if direction == "backward":
        share = share.flip(0)
    chosen = [
        part[torch.randperm(len(part), generator=generator)[: max(1, round(len(part) * s))]]
        for part, s in zip(rows, share.tolist(), strict=True)
    ]
    return torch.cat(chosen), -1.0 if direction == "backward" else 1.0


def table(experts: Tensor, labels: Tensor, counts: Tensor) -> list[str]:
    """A row for each test set: as it is, for the known prior, for the estimated one."""
    logits = experts.mean(dim=1)
    held_out, rest = halves(labels)
    calibration = calibrate_prior(logits[held_out], labels[held_out], counts.tolist())
    lines = [f"scale {calibration.scale:.2f}, offset {calibration.offset:.2f}", ""]
    lines += ["| test set | as it is | known prior | estimated | tau | justified |"]
    lines += ["|---|---|---|---|---|---|"]
    imbalance = float(counts.max() / counts.min())
    for direction, ratio in SHIFTS:
        figures = torch.tensor(
            [
                _one(calibration, logits, labels, rest, direction, ratio, imbalance, seed)
                for seed in range(DRAWS)
            ]
        )
        mean, spread = figures.mean(0).tolist(), figures.std(0).tolist()
        name = "uniform" if ratio == 1 else f"{direction} {ratio}"
        cells = [f"{100 * m:.1f} +- {100 * s:.1f}" for m, s in zip(mean, spread, strict=True)][:3]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean[3]:.2f} | {mean[4]:.0%} |")
    return lines


def _one(
    calibration: PriorCalibration,
    logits: Tensor,
    labels: Tensor,
    rest: list[Tensor],
    direction: str,
    ratio: int,
    imbalance: float,
    seed: int,
) -> list[float]:
    rows, sign = draw(rest, direction, ratio, seed)
    z, y = logits[rows], labels[rows]
    exponent = sign * torch.tensor(float(ratio)).log() / torch.tensor(imbalance).log()
    found = calibration.estimate(z)
    known, estimated = calibration.adjust(z, float(exponent)), found.adjust(z)
    hits = [float((each.argmax(1) == y).double().mean()) for each in (z, known, estimated)]
    return [*hits, found.tau if found.justified else 0.0, float(found.justified)]


def main() -> None:
    """Print a table for each trained model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--imbalance", type=float, default=100)
    parser.add_argument("--runs", type=Path, help="folder of the runs of benchmarks.cifar")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--official", type=Path, help="a checkpoint of the authors' code")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data, options.imbalance, torch.device("cpu"))
    _, test, counts = data
    if options.official is not None:
        official = RIDEWrapper(
            CifarResNet(len(counts)),
            3,
            expert_width=0.75,
            classifier="cosine",
            example_input=torch.zeros(2, 3, 32, 32),
        )
        load_official_checkpoint(official, None, options.official)
        print(f"\n### {options.official.name}\n")
        print("\n".join(table(predict(official, test), test.labels, counts)))
    for name in options.methods:
        model = Run(name, options.seed, Recipe(), data, options.runs).load_model()
        print(f"\n### {name}\n")
        print("\n".join(table(predict(model, test), test.labels, counts)))


if __name__ == "__main__":
    main()
