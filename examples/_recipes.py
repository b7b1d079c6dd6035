"""What the recipes share: an ordinary loop for the plain backbone, accuracy, one table."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import mean, stdev

import torch
from _data import FEW, MANY, Digits, Loader, long_tailed_digits
from quickstart import augment
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from ride_plugin.longtail import ClassBalancedSampler, ShotReport, shot_report

GROUPS = ("few", "medium", "many", "overall")
Run = Callable[[Digits, argparse.Namespace], dict[str, ShotReport]]


def train_plain(
    model: nn.Module,
    loader: Loader,
    criterion: nn.Module,
    epochs: int,
    parameters: Iterable[Tensor] | None = None,
) -> nn.Module:
    """The loop that one has before RIDE; the caller has set the model's mode."""
    optimizer = sgd(model.parameters() if parameters is None else parameters)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            loss = criterion(model(augment(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model.eval()


def sgd(parameters: Iterable[Tensor], lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )


def loaders(digits: Digits) -> tuple[Loader, Loader]:
    """Batches as the images come, and batches in which every class is as frequent as any other."""
    sampler = ClassBalancedSampler(digits.train.labels)
    return (
        DataLoader(digits.train, batch_size=32, shuffle=True),
        DataLoader(digits.train, batch_size=32, sampler=sampler),
    )


@torch.no_grad()
def test(model: nn.Module, digits: Digits) -> ShotReport:
    """Accuracy on the test images of a model in evaluation mode, plain or wrapped."""
    x, y = digits.test.tensors
    return shot_report(model(x), y, digits.train.class_counts, many=MANY, few=FEW)


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="draws of data and weights")
    parser.add_argument("--epochs", type=int, default=40, help="of the first stage")
    return parser.parse_args()


def compare(run: Run, arguments: argparse.Namespace) -> None:
    """Run every seed and print the table: accuracy in percent, mean and deviation over seeds."""
    torch.set_num_threads(1)  # the images are small: a second thread would only wait
    reports: dict[str, list[ShotReport]] = defaultdict(list)
    for seed in tqdm(range(arguments.seeds), unit="seed"):
        torch.manual_seed(seed)
        for name, report in run(long_tailed_digits(seed), arguments).items():
            reports[name].append(report)
    rows = [["", *GROUPS]]
    for name, of_seeds in reports.items():
        rows.append([name, *(_spread([getattr(r, group) for r in of_seeds]) for group in GROUPS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")


def _spread(shares: list[float]) -> str:
    percent = [100 * share for share in shares]
    return f"{mean(percent):.1f} +- {stdev(percent) if len(percent) > 1 else 0.0:.1f}"
