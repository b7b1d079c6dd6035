"""One classifier of all experts' features together, trained after them, beside the mean of theirs.

    python -m benchmarks.cifar.joined --data cifar100_lt.npz --runs runs --methods ride4_distilled

Features of augmented training images are computed once; the classifier, a cosine one like those of
the experts, learns on them with balanced softmax while everything else stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, pstdev

import torch
from torch import Tensor

from benchmarks.cifar.data import load
from benchmarks.cifar.evaluate import SHOTS, router_inputs
from benchmarks.cifar.methods import METHODS
from benchmarks.cifar.routing import stored_inputs
from benchmarks.cifar.train import Recipe, Run
from ride_plugin import RIDEWrapper
from ride_plugin.longtail import BalancedSoftmaxLoss, CosineClassifier, shot_report

EPOCHS = 20  # over what three augmented passes stored


def main() -> None:
    """Print one table for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as for benchmarks.cifar")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of finished runs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the classifier")
    parser.add_argument("--imbalance", type=float, default=100)
    parser.add_argument("--degrees", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test, class_counts = load(options.data, options.imbalance, torch.device("cpu"))
    for name in options.methods:
        model = Run(name, 0, Recipe(), (train, test, class_counts), options.runs).load_model()
        assert isinstance(model, RIDEWrapper)
        served = model.eval().optimize_for_inference()
        generator = torch.Generator().manual_seed(0)
        inputs, labels = stored_inputs(served, train, generator, options.degrees)
        tested = router_inputs(served, test)
        experts = tested.expert_logits.mean(1)
        rows = {"mean of the experts": [experts]}
        for seed in options.seeds:
            # What training classifiers anew does by itself: each on its own expert's features.
            alone = [
                fit(own, labels, class_counts, seed)(its.detach())
                for own, its in zip(
                    inputs.expert_features.split(1, dim=1),
                    tested.expert_features.unbind(1),
                    strict=True,
                )
            ]
            anew = torch.stack(alone).mean(0).detach()
            rows.setdefault("mean of the experts, classifiers trained anew", []).append(anew)
            classifier = fit(inputs.expert_features, labels, class_counts, seed)
            logits = classifier(tested.expert_features.flatten(1)).detach()
            rows.setdefault("joined classifier", []).append(logits)
        print(f"\n### {name}\n\n{table(rows, test.labels, class_counts)}", flush=True)


def fit(features: Tensor, labels: Tensor, class_counts: Tensor, seed: int) -> CosineClassifier:
    """Train a classifier on features ``[N, E, D]``, side by side as ``[N, E * D]``."""
    torch.manual_seed(seed)
    together = features.flatten(1)
    classifier = CosineClassifier(together.shape[1], len(class_counts))
    criterion = BalancedSoftmaxLoss(class_counts)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(256):
            loss = criterion(classifier(together[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return classifier.eval()


def table(rows: dict[str, list[Tensor]], labels: Tensor, class_counts: Tensor) -> str:
    """Accuracy in percent, mean and deviation over seeds, as Markdown."""
    order = ("few", "medium", "many", "overall")
    assert set(order) == set(SHOTS)
    lines = ["| what decides | " + " | ".join(order) + " |", "|---" * (len(order) + 1) + "|"]
    for name, logits in rows.items():
        reports = [shot_report(each, labels, class_counts.tolist()) for each in logits]
        cells = []
        for shot in order:
            found = [getattr(report, shot) for report in reports]
            if found[0] is None:
                cells.append("absent")
                continue
            values = [100 * value for value in found]
            spread = f" ± {pstdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
