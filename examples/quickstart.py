"""RIDE on long-tailed handwritten digits: a plain backbone, three experts, and routing, on the CPU.

Run ``python examples/quickstart.py``; ``--seeds`` and ``--epochs`` change how long it takes. Lines
that use ride-plugin end in ``# RIDE``; everything else is the training code one has anyway.
"""

import argparse
from collections import defaultdict

import torch
import torch.nn.functional as F
from _data import Loader, long_tailed_digits
from _models import SmallResNet
from _report import Result, evaluate, plot, table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ride_plugin import (
    ConfidenceRouter,
    DiversityLoss,
    ExpertRouter,
    RIDELoss,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    cost_report,
)
from ride_plugin.longtail import BalancedSoftmaxLoss

SEEDS, EPOCHS = 5, 40  # fewer do not tell the methods apart


def train_plain(loader: Loader, epochs: int, bar: tqdm, class_counts: list[int]) -> nn.Module:
    """An ordinary loop: what RIDE is compared with."""
    model = SmallResNet()
    criterion = BalancedSoftmaxLoss(class_counts)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            loss = criterion(model(augment(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        bar.update()
    return model.eval()


def train_experts(
    loader: Loader, epochs: int, bar: tqdm, class_counts: list[int], weight: float
) -> RIDEWrapper:
    """Stage one: the same loop with RIDE's lines in it."""
    model = RIDEWrapper(SmallResNet(), num_experts=3, expert_width=0.75)  # RIDE
    criterion = RIDELoss(  # RIDE
        BalancedSoftmaxLoss(class_counts),
        DiversityLoss(class_counts, weight=weight, start_epoch=round(0.8 * epochs)),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            loss = criterion(model(augment(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        criterion.step()  # RIDE
        bar.update()
    return model.eval()


def train_router(model: RIDEWrapper, loader: Loader, epochs: int, bar: tqdm) -> ExpertRouter:
    """Stage two: the model stays as it is, the router learns who needs one more expert."""
    router = ExpertRouter.for_model(model)  # RIDE
    criterion = RoutingLoss()  # RIDE
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    for _ in range(epochs):
        for x, y in loader:
            inputs = model.router_inputs(augment(x))  # RIDE
            loss = criterion(router(inputs), inputs, y)  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bar.update()
    return router


def augment(x: Tensor) -> Tensor:
    """Rotate by up to 10 degrees, scale by up to 10 %, shift by up to half a pixel."""
    turn, scale, dx, dy = torch.empty(4, len(x)).uniform_(-1, 1)
    cos, sin = (1 + 0.1 * scale) * (0.17 * turn).cos(), (1 + 0.1 * scale) * (0.17 * turn).sin()
    rows = (torch.stack((cos, -sin, dx / 8), dim=1), torch.stack((sin, cos, dy / 8), dim=1))
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def run(seed: int, epochs: int, bar: tqdm) -> dict[str, Result]:
    """Train and evaluate every method on one draw of the data."""
    digits = long_tailed_digits(seed)
    loader = DataLoader(digits.train, batch_size=32, shuffle=True)
    calibration = DataLoader(digits.calibration, batch_size=100)
    x = digits.test.tensors[0]

    def test(logits: Tensor, flops: float | None, one_hot: Tensor | None = None) -> Result:
        assert flops is not None
        return evaluate(logits, digits.test.tensors[1], digits.train.class_counts, flops, one_hot)

    torch.manual_seed(seed)
    plain = train_plain(loader, epochs, bar, digits.train.class_counts)
    torch.manual_seed(seed)
    undiverse = train_experts(loader, epochs, bar, digits.train.class_counts, weight=0.0)
    torch.manual_seed(seed)
    model = train_experts(loader, epochs, bar, digits.train.class_counts, weight=0.2)
    router = train_router(model, loader, epochs // 2, bar)

    cost = cost_report(model, backbone=plain, example_input=x[:1])
    with torch.no_grad():
        results = {
            "plain backbone": test(plain(x), cost.backbone_flops),
            "RIDE, no diversity term": test(undiverse(x), cost.flops),
            "RIDE, all experts": test(model(x), cost.flops),
        }
    # The threshold: the most accurate on held-out images at no more than the backbone's FLOPs.
    budget = cost.backbone_flops
    routers = {
        "RIDE, routed": router,
        "RIDE, routed by confidence": ConfidenceRouter("max_probability"),
    }
    for name, gates in routers.items():
        serve = RoutingInference(model, gates)  # RIDE
        serve.calibrate(calibration, max_flops=budget)  # RIDE
        logits, used = serve(x, return_routing=True)  # RIDE
        one_hot = F.one_hot(used - 1, model.num_experts).double()
        shares = one_hot.mean(dim=0).tolist()
        cost = cost_report(model, router=gates, shares=shares, example_input=x[:1])
        results[name] = test(logits, cost.routed_flops, one_hot)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="draws of data and weights")
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="of stage one; half for the router"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the images are small: a second thread would only wait

    results: dict[str, list[Result]] = defaultdict(list)
    steps = 3 * arguments.epochs + arguments.epochs // 2
    with tqdm(total=arguments.seeds * steps, unit="epoch") as bar:
        for seed in range(arguments.seeds):
            bar.set_description(f"seed {seed + 1} of {arguments.seeds}")
            for name, result in run(seed, arguments.epochs, bar).items():
                results[name].append(result)
    print(table(results))
    if arguments.epochs < EPOCHS or arguments.seeds < SEEDS:
        print(
            f"Too short to judge: {arguments.epochs} epochs and {arguments.seeds} seeds show that "
            f"it runs, not what is better. The table of the README has {EPOCHS} and {SEEDS}."
        )
    plot(results, "quickstart.png")
    print("Plot: quickstart.png")


if __name__ == "__main__":
    main()
