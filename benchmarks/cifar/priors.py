"""Accuracy where the test data have another class distribution than was trained for.

    python -m benchmarks.cifar.priors --data cifar-100-python --runs runs/cifar100_lt \
        --methods ce balanced_softmax_cosine ride3_official

Test sets as in SADE (Zhang et al., NeurIPS 2022): ``forward r``, the classes as frequent as a long
tail of imbalance r makes them in training; ``backward r``, the same with the order of the classes
turned round. Half of the test images (the first of each class after a seeded shuffle) are held out
to calibrate, the test sets are drawn from the other half. Beside the estimated prior stands what
SADE does instead: weights of the experts under which two augmented views of a test image agree.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cifar.data import Split, augment, load
from benchmarks.cifar.evaluate import predict
from benchmarks.cifar.methods import METHODS
from benchmarks.cifar.train import Recipe, Run
from benchmarks.resnets import CifarResNet
from ride_plugin import RIDEWrapper, load_official_checkpoint
from ride_plugin.longtail import calibrate_prior

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


def expert_weights(first: Tensor, second: Tensor) -> Tensor:
    """SADE's test-time aggregation: weights ``[E]`` under which two views ``[N, E, C]`` agree.

    Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
    Recognition", NeurIPS 2022, section 4.2: the mean cosine of both views' class probabilities is
    maximised. Theirs takes steps of SGD over five epochs and stops below a weight of 0.05; this
    runs to the maximum.
    """
    numbers = torch.zeros(first.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        weights = numbers.softmax(0)[:, None]
        one, other = ((weights * view).sum(1).softmax(1) for view in (first, second))
        value = -F.cosine_similarity(one, other).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return numbers.detach().softmax(0)


def views(model: torch.nn.Module, split: Split) -> list[Tensor]:
    """Every expert's logits ``[N, E, C]`` for two augmented views of each image."""
    generator = torch.Generator().manual_seed(0)
    return [
        predict(model, Split(augment(split.images, generator, degrees=0.0), split.labels))
        for _ in range(2)
    ]


def table(model: torch.nn.Module, test: Split, counts: Tensor) -> list[str]:
    """A row for each test set: as it is, known prior, estimated prior, expert weights."""
    experts, labels = predict(model, test), test.labels
    seen_twice = views(model, test) if experts.shape[1] > 1 else None
    logits = experts.mean(dim=1)
    held_out, rest = halves(labels)
    calibration = calibrate_prior(logits[held_out], labels[held_out], counts.tolist())
    lines = [f"scale {calibration.scale:.2f}, offset {calibration.offset:.2f}", ""]
    names = ["test set", "as it is", "known prior", "estimated", "tau", "justified"]
    names += [] if seen_twice is None else ["by expert weights"]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    imbalance = float(counts.max() / counts.min())
    for direction, ratio in SHIFTS:
        hits, found = [], []
        for seed in range(DRAWS):
            rows, sign = draw(rest, direction, ratio, seed)
            z, y = logits[rows], labels[rows]
            exponent = sign * math.log(ratio) / math.log(imbalance)
            estimate = calibration.estimate(z)
            answers = [z, calibration.adjust(z, exponent), estimate.adjust(z)]
            if seen_twice is not None:
                weights = expert_weights(*(view[rows] for view in seen_twice))
                answers.append((weights[:, None] * experts[rows]).sum(1))
            hits.append([float((each.argmax(1) == y).double().mean()) for each in answers])
            found.append((estimate.tau if estimate.justified else 0.0, estimate.justified))
        columns = [f"{100 * mean(h):.1f} +- {100 * stdev(h):.1f}" for h in zip(*hits, strict=True)]
        taus, justified = zip(*found, strict=True)
        columns[3:3] = [f"{mean(taus):.2f}", f"{mean(justified):.0%}"]
        name = "uniform" if ratio == 1 else f"{direction} {ratio}"
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


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
        print("\n".join(table(official, test, counts)))
    for name in options.methods:
        model = Run(name, options.seed, Recipe(), data, options.runs).load_model()
        print(f"\n### {name}\n")
        print("\n".join(table(model, test, counts)))


if __name__ == "__main__":
    main()
