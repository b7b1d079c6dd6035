"""Whose a wrapped model's parameters are, and what is shared and forked, in a few lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ride_plugin._split import SplitModule


def parameters_by_owner(
    named: Iterable[tuple[str, nn.Parameter]], num_experts: int
) -> tuple[int, int, tuple[int, ...]]:
    """Numbers of parameters: the trunk's, those that several experts share, each expert's own.

    Args:
        named: parameters under all their names; those of expert k start with ``experts.k.``.
        num_experts: ``E``.
    """
    owners: dict[int, set[int]] = {}
    sizes: dict[int, int] = {}
    for name, parameter in named:
        part, _, rest = name.partition(".")
        owner = int(rest.partition(".")[0]) if part == "experts" else -1
        owners.setdefault(id(parameter), set()).add(owner)
        sizes[id(parameter)] = parameter.numel()
    trunk = sum(sizes[key] for key, found in owners.items() if -1 in found)
    own = [0] * num_experts
    for key, found in owners.items():
        if len(found) == 1 and -1 not in found:
            own[min(found)] += sizes[key]
    return trunk, sum(sizes.values()) - trunk - sum(own), tuple(own)


def parameters_by_child(module: nn.Module) -> dict[str, int]:
    """Parameters below each child, or below each of its children where it is the only one."""
    prefix = ""
    while len(children := dict(module.named_children())) == 1:
        ((name, module),) = children.items()
        prefix += name + "."
    sizes: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        child = prefix + name.split(".")[0]
        sizes[child] = sizes.get(child, 0) + parameter.numel()
    return sizes


def summary(model: SplitModule, expert_width: float) -> str:
    """What is shared, forked and narrowed, and what that costs."""
    shared, forked = parameters_by_child(model.trunk), parameters_by_child(model.experts[0])
    named = model.named_parameters(remove_duplicate=False)
    trunk, common, own = parameters_by_owner(named, model.num_experts)
    total = trunk + common + sum(own)
    ratios = [total / max(1, trunk + common + of_one) for of_one in own]
    beside = f", and {common:,} that experts share" if common else ""
    lines = [
        f"{type(model).__name__}(num_experts={model.num_experts}, num_classes={model.num_classes},"
        f" fork_at={model.fork_at!r})",
        f"shared: {', '.join(shared) or 'nothing'}; {trunk:,} parameters",
        f"forked: {', '.join(forked)}; {_span(own, ',')} parameters for each expert{beside}",
        *([f"narrowed: expert_width={expert_width}"] if expert_width < 1 else []),
        f"cost: {total:,} parameters, {_span(ratios, '.2f')} x those with one expert; "
        "`cost_report` counts FLOPs",
    ]
    return "\n  ".join(lines)


def _span(values: Sequence[float], form: str) -> str:
    """One number, or the smallest and the largest where they differ."""
    low, high = (format(bound, form) for bound in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
