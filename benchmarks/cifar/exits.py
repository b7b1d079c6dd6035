"""What decides who leaves early: routers beside exits by confidence, whole curves on test images.

    python -m benchmarks.cifar.exits --data cifar100_lt.npz --official official_ride_ea.pth
    python -m benchmarks.cifar.exits --data cifar100_lt.npz --runs runs --methods ride4_distilled

Routers learn on augmented training images. Every curve is read at the same costs; between two
thresholds it is interpolated. No threshold is chosen here, so nothing is tuned on test images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, pstdev

import numpy as np
import torch
from torch import Tensor

from benchmarks.cifar.data import Split, load
from benchmarks.cifar.evaluate import router_inputs
from benchmarks.cifar.methods import METHODS
from benchmarks.cifar.routing import stored_inputs, train_router
from benchmarks.cifar.train import Recipe, Run
from benchmarks.resnets import CifarResNet
from ride_plugin import (
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    RoutingLoss,
    cost_report,
    load_official_checkpoint,
)
from ride_plugin.functional import running_means
from ride_plugin.routing import RouterInputs

COSTS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # in plain backbones
Data = tuple[Split, Split, Tensor]
Curve = list[float | None]


def main() -> None:
    """Measure every model named on the command line and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as for benchmarks.cifar")
    parser.add_argument("--official", type=Path, help="a checkpoint of the authors' code")
    parser.add_argument("--runs", type=Path, help="the folder of finished runs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the router")
    parser.add_argument("--imbalance", type=float, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/exits"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load(options.data, options.imbalance, torch.device("cpu"))
    for name, model, authors in _models(options, data):
        stored = _stored(name, model, data, options.out)
        curves = measure(model, authors, stored, options.seeds)
        (options.out / f"{name}.json").write_text(json.dumps(curves, indent=1))
        accuracy, cost = oracle(model, stored)
        print(f"\n### {name}\n\n{table(curves)}", flush=True)
        print(f"\nA gate that knew the labels would have {accuracy:.2f} at {cost:.2f}.", flush=True)


def _models(
    options: argparse.Namespace, data: Data
) -> Iterator[tuple[str, RIDEWrapper, ExpertRouter | None]]:
    if options.official is not None:
        model = RIDEWrapper(CifarResNet(len(data[2])), 3, expert_width=0.75, classifier="cosine")
        router = ExpertRouter.for_model(model, inputs="paper")
        load_official_checkpoint(model, router, options.official)
        yield options.official.stem, model.eval(), router.eval()
    for name in options.methods:
        trained = Run(name, 0, Recipe(), data, options.runs).load_model()
        assert isinstance(trained, RIDEWrapper)
        yield name, trained.eval(), None


def _stored(name: str, model: RIDEWrapper, data: Data, folder: Path) -> dict[str, Tensor]:
    """Router inputs of augmented training images and of test images, computed once."""
    file = folder / f"{name}-inputs.pt"
    if not file.exists():
        train, test, class_counts = data
        served = model.optimize_for_inference()
        inputs, labels = stored_inputs(served, train, torch.Generator().manual_seed(0), 0.0)
        tested = router_inputs(served, test, 128)
        torch.save(
            {
                "logits": inputs.expert_logits,
                "features": inputs.expert_features,
                "labels": labels,
                "test_logits": tested.expert_logits,
                "test_features": tested.expert_features,
                "test_labels": test.labels,
                "class_counts": class_counts,
            },
            file,
        )
    stored: dict[str, Tensor] = torch.load(file, weights_only=True)
    return stored


def measure(
    model: RIDEWrapper,
    authors: ExpertRouter | None,
    stored: dict[str, Tensor],
    seeds: list[int],
) -> dict[str, list[Curve]]:
    """Accuracy at each cost, one curve for each seed; None where a curve does not reach."""
    train = RouterInputs(stored["logits"], stored["features"])
    test, labels = (
        RouterInputs(stored["test_logits"], stored["test_features"]),
        stored["test_labels"],
    )
    plain = CifarResNet(model.num_classes)
    means = running_means(test.expert_logits)
    right = means.argmax(2) == labels[:, None]

    def curve(gates: Tensor, router: ExpertRouter | None) -> Curve:
        report = cost_report(model, router=router, backbone=plain)
        assert report.backbone_flops is not None
        flops = torch.tensor(report.flops_by_experts).double() / report.backbone_flops
        return at_costs(gates, right, flops)

    curves: dict[str, list[Curve]] = {}
    for kind in ("max_probability", "margin"):
        confidence = ConfidenceRouter(kind)
        gates = range(model.num_experts - 1)
        columns = [confidence.gate(i, means[:, i], test.expert_features[:, i]) for i in gates]
        curves[kind.replace("_", " ")] = [curve(torch.stack(columns, 1), None)]
    if authors is not None:
        with torch.no_grad():
            curves["the authors' router"] = [curve(authors(test), authors)]
    counts = stored["class_counts"]
    for name, inputs, criterion in (
        ("the paper's gate, trained here", "paper", RoutingLoss()),
        ("default gate, samples weighted alike", "predictions", RoutingLoss()),
        ("default gate, weighted by class", "predictions", RoutingLoss(class_counts=counts)),
    ):
        for seed in seeds:
            torch.manual_seed(seed)
            router = ExpertRouter.for_model(model, inputs=inputs)
            train_router(router, criterion, train, stored["labels"], seed)
            with torch.no_grad():
                curves.setdefault(name, []).append(curve(router(test), router))
    return curves


def oracle(model: RIDEWrapper, stored: dict[str, Tensor]) -> tuple[float, float]:
    """Accuracy and cost of a gate that knows the labels: the fewest experts that are right."""
    means = running_means(stored["test_logits"])
    right = means.argmax(2) == stored["test_labels"][:, None]
    report = cost_report(model, backbone=CifarResNet(model.num_classes))
    flops = torch.tensor(report.flops_by_experts).double() / (report.backbone_flops or 1)
    soonest = right.int().argmax(1)  # one expert where none ever helps
    return 100 * float(right.any(1).double().mean()), float(flops[soonest].mean())


def at_costs(gates: Tensor, right: Tensor, flops: Tensor) -> Curve:
    """Accuracy in percent at each of `COSTS` as one threshold, common to all gates, is swept."""
    values = gates.double().flatten().sort().values
    steps = torch.linspace(0, len(values) - 1, 600).round().long()
    points = []
    for limit in torch.cat((values[:1] - 1, values[steps], values[-1:] + 1)).unique():
        used = (gates > limit).long().cumprod(1).sum(1)
        accuracy = right.gather(1, used[:, None]).double().mean()
        points.append((float(flops[used].mean()), 100 * float(accuracy)))
    costs, accuracies = zip(*sorted(points), strict=True)
    reached = [costs[0] <= c <= costs[-1] for c in COSTS]
    values_at = np.interp(COSTS, costs, accuracies)
    return [float(v) if ok else None for v, ok in zip(values_at, reached, strict=True)]


def table(curves: dict[str, list[Curve]]) -> str:
    """Markdown: mean over the seeds, and the deviation of the mean over costs."""
    lines = [
        f"| what decides | {' | '.join(f'{c:g}' for c in COSTS)} | mean |",
        "|---" * (len(COSTS) + 2) + "|",
    ]
    for name, runs in curves.items():
        columns = list(zip(*runs, strict=True))
        cells = [
            "" if None in column else f"{mean(v for v in column if v is not None):.2f}"
            for column in columns
        ]
        complete = [[v for v in run if v is not None] for run in runs]
        means = [mean(run) for run in complete if len(run) == len(COSTS)]
        last = f"{mean(means):.2f}" if means else ""
        if len(means) > 1:
            last += f" ± {pstdev(means):.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
