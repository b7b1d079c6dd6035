"""Bias and variance by frequency, on models trained on many draws of a long-tailed training set.

    python -m benchmarks.bias_variance [--models 20] [--epochs 40]

The paper's figure 1 needs 20 trainings a method; on handwritten digits that takes minutes. A test
image's main prediction is what most models say; bias is its error, variance the share of models
that depart from it. Plain backbone, experts without and with the diversity term, all trained with
the loops of examples/quickstart.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ride_plugin.longtail import bias_variance

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from _data import FEW, MANY, long_tailed_digits
from quickstart import train_experts, train_plain

GROUPS = ("few", "medium", "many", "overall")


def main() -> None:
    """Train every method on every draw, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=20, help="draws of the training set")
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    predictions: dict[str, list[Tensor]] = defaultdict(list)
    with tqdm(total=3 * options.models * options.epochs, unit="epoch") as bar:
        for draw in range(options.models):
            digits = long_tailed_digits(draw)
            x, y = digits.test.tensors
            counts = digits.train.class_counts
            for name, weight in (("plain backbone", None), ("RIDE, no diversity term", 0.0),
                                 ("RIDE", 0.2)):  # fmt: skip
                torch.manual_seed(draw)
                loader = DataLoader(digits.train, batch_size=32, shuffle=True)
                if weight is None:
                    model = train_plain(loader, options.epochs, bar, counts)
                else:
                    model = train_experts(loader, options.epochs, bar, counts, weight)
                with torch.no_grad():
                    predictions[name].append(model(x).argmax(dim=1))
    print(f"| {options.models} models each | {' | '.join(GROUPS)} |\n|{' --- |' * 5}")
    for name, drawn in predictions.items():
        result = bias_variance(torch.stack(drawn), y, counts, many=MANY, few=FEW)
        for kind in ("bias", "variance", "error"):
            shares = (f"{100 * getattr(getattr(result, kind), group):.1f}" for group in GROUPS)
            print(f"| {name}, {kind} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
