"""What the quickstart prints and draws: one table and one picture over all seeds."""

from dataclasses import dataclass
from statistics import mean, stdev

import matplotlib
import torch
from _data import FEW, MANY
from torch import Tensor

from ride_plugin.longtail import shot_groups, shot_report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUPS = ("few", "medium", "many", "overall")
# Okabe and Ito's colours, which people who see fewer colours can tell apart.
OKABE_ITO = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00")


@dataclass
class Result:
    """One method on one seed; shares are None where nothing is routed."""

    accuracy: dict[str, float]  # percent, by group
    flops: float  # for each image
    shares: dict[str, list[float]] | None  # of images that used 1, 2, ... experts, by group


def evaluate(
    logits: Tensor, target: Tensor, class_counts: list[int], flops: float, one_hot: Tensor | None
) -> Result:
    """Accuracy, and who used how many experts, overall and by the frequency of the class.

    ``one_hot`` has a row for each image, with a one in the column of the number that it used.
    """
    report = shot_report(logits, target, class_counts, many=MANY, few=FEW)
    accuracy = {group: 100 * getattr(report, group) for group in GROUPS}
    if one_hot is None:
        return Result(accuracy, flops, None)
    group_of = torch.from_numpy(shot_groups(class_counts, MANY, FEW))[target]
    shares = {
        group: one_hot[group_of == i].mean(dim=0)
        for i, group in enumerate(("many", "medium", "few"))
    }
    shares["overall"] = one_hot.mean(dim=0)
    return Result(accuracy, flops, {group: share.tolist() for group, share in shares.items()})


def table(results: dict[str, list[Result]]) -> str:
    """Every method in a row; a Markdown table, so that it can be pasted as printed."""
    plain_flops = mean(r.flops for r in next(iter(results.values())))
    plain = [r.accuracy["overall"] for r in next(iter(results.values()))]
    routed = [r.shares for runs in results.values() for r in runs if r.shares is not None]
    numbers = " / ".join(str(i + 1) for i in range(len(routed[0]["overall"])))
    header = ["", *GROUPS, "gain", "kFLOPs", "x plain", f"used {numbers} experts"]
    lines = [header]
    for name, runs in results.items():
        flops = mean(r.flops for r in runs)
        used = "-"
        if taken := [r.shares["overall"] for r in runs if r.shares is not None]:
            shares = [mean(share) for share in zip(*taken, strict=True)]
            used = " / ".join(f"{100 * share:.0f} %" for share in shares)
        accuracies = [_spread([r.accuracy[group] for r in runs]) for group in GROUPS]
        # Seed by seed: which images were drawn moves every method, and cancels here.
        gains = [r.accuracy["overall"] - p for r, p in zip(runs, plain, strict=True)]
        gain = _spread(gains) if name != next(iter(results)) else "-"
        lines.append(
            [name, *accuracies, gain, f"{flops / 1e3:.0f}", f"{flops / plain_flops:.2f}", used]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    shown = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {line} |" for line in shown)


def plot(results: dict[str, list[Result]], path: str) -> None:
    """Three panels: what accuracy costs, where it is gained, and who gets more experts."""
    colours = dict(zip(results, OKABE_ITO, strict=False))
    markers = dict(zip(results, "osD^v", strict=False))
    figure, (cost, shots, routing) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")

    plain_flops = mean(r.flops for r in next(iter(results.values())))
    costs = [mean(r.flops for r in runs) / plain_flops for runs in results.values()]
    for (name, runs), relative in zip(results.items(), costs, strict=True):
        values = [r.accuracy["overall"] for r in runs]
        cost.errorbar(  # of two that cost the same, the marker shows which is which
            relative,
            mean(values),
            _deviation(values),
            fmt=markers[name],
            ms=8,
            capsize=4,
            color=colours[name],
            markerfacecolor="none",
            markeredgewidth=2,
        )
    cost.set(
        title="Accuracy against computation",
        xlabel="FLOPs per image (plain backbone = 1)",
        ylabel="test accuracy (%)",
        xlim=(0, max(costs) + 0.2),
    )
    cost.grid(alpha=0.3)

    step = 0.8 / len(results)
    for i, (name, runs) in enumerate(results.items()):
        by_group = [[r.accuracy[group] for r in runs] for group in GROUPS]
        shots.bar(
            [x + (i - (len(results) - 1) / 2) * step for x in range(len(GROUPS))],
            [mean(v) for v in by_group],
            width=step,
            yerr=[_deviation(v) for v in by_group],
            error_kw={"elinewidth": 1},
            color=colours[name],
            label=name,
        )
    low = min(min(r.accuracy.values()) for runs in results.values() for r in runs)
    shots.set(
        title="Accuracy by number of training images",
        xticks=range(len(GROUPS)),
        xticklabels=[
            f"few\n(< {FEW})",
            f"medium\n({FEW} to {MANY})",
            f"many\n(> {MANY})",
            "overall",
        ],
        ylim=(max(0, low - 5), 101),
        ylabel="test accuracy (%)",
    )

    name = next(name for name, runs in results.items() if runs[0].shares is not None)
    routed = [r.shares for r in results[name] if r.shares is not None]
    left, num_experts = [0.0] * len(GROUPS), len(routed[0]["overall"])
    for i in range(num_experts):
        shares = [100 * mean(share[group][i] for share in routed) for group in GROUPS]
        label = f"{i + 1} expert{'s' if i else ''}"
        shade = 0.3 + 0.6 * i / max(1, num_experts - 1)
        blue = plt.get_cmap("Blues")(shade)
        bars = routing.barh(GROUPS, shares, left=left, color=blue, label=label)
        shown = [f"{share:.0f} %" if share >= 6 else "" for share in shares]
        routing.bar_label(
            bars, shown, label_type="center", color="white" if shade > 0.7 else "black"
        )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    routing.invert_yaxis()
    routing.set(title=f"{name}: who used how many experts", xlabel="share of test images (%)")
    routing.set_xlim(0, 100)
    routing.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    figure.legend(*shots.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    seeds = len(next(iter(results.values())))
    figure.suptitle(f"Long-tailed handwritten digits, mean and deviation over {seeds} seeds")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} +- {_deviation(values):.1f}"


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
