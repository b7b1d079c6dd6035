"""Regenerate docs/evidence/narrowing.md: which architectures can be narrowed, and to what.

python -m benchmarks.width_coverage [--only NAME ...] [--cache FILE] [--jobs 1] [--width 0.75]

Each architecture runs in a process of its own, in the environment of docs/evidence/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
import warnings
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.inputs import redrawn
from benchmarks.coverage.zoo import zoo
from ride_plugin import RIDEWrapper, WidthError, expert_logits

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "narrowing.md"
_STEPS = 12
_ROWS = 4


def check_narrowed(backbone: nn.Module, width: float, **options: Any) -> dict[str, float]:
    """Check a narrowed model: it runs, learns one batch, and costs what its shapes imply.

    Returns:
        Shares of the full-width expert's parameters and FLOPs, and the losses before and after.

    Raises:
        AssertionError: something does not hold; the message says what.
        WidthError: the backbone cannot be narrowed.
    """
    torch.manual_seed(0)
    full = RIDEWrapper(backbone, num_experts=1, **options)
    model = RIDEWrapper(backbone, num_experts=2, expert_width=width, **options)
    parameters, flops, layers = _cost(full)
    new_parameters, new_flops, new_layers = _cost(model)
    for name, (weight, layer_flops) in layers.items():
        if name in new_layers and layer_flops:
            new_weight, new_layer_flops = new_layers[name]
            assert new_weight <= weight, f"{name} grew"
            implied = layer_flops * new_weight / weight
            # Fewer where a layer mixes positions, so that its batch holds the narrowed channels.
            at_least = implied if new_weight < weight else width * implied * 0.95
            assert at_least * (1 - 1e-6) <= new_layer_flops, f"FLOPs of {name}"
            assert new_layer_flops <= implied * (1 + 1e-6), f"FLOPs of {name}"
    share = new_parameters / parameters
    assert width**2 - 0.1 <= share <= (1 + width) / 2, f"{share:.2f} of the parameters"
    assert new_flops < flops, "no FLOPs saved"

    first, last = _train(deepcopy(model), lr=1e-3)
    if last >= first:  # too fast for some transformers without a warm-up
        first, last = _train(model, lr=1e-4)
    assert last < first, f"the loss rose from {first:.3f} to {last:.3f}"
    return {
        "parameters": share,
        "flops": new_flops / flops,
        "first_loss": first,
        "last_loss": last,
        "whole": float(share < (1 + width) * width / 2),
    }


def _cost(model: RIDEWrapper) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """Parameters and FLOPs of expert 0, and weights and FLOPs of each of its layers."""
    args, kwargs = model.example_input(2)
    expert = model.experts[0]
    layers = {
        name: module
        for name, module in expert.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear, nn.Conv1d, nn.Conv3d)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # the counter cannot hook a parameter that enters a module
        parameter.requires_grad_(False)
    with model.evaluating(), torch.no_grad():
        state = model.run_trunk(*args, **kwargs)
        with FlopCounterMode(expert, display=False) as counter:
            model.run_expert(0, state)
    for parameter in trained:
        parameter.requires_grad_(True)
    by_module = counter.get_flop_counts()
    prefix = type(expert).__name__
    found = {
        name: (layer.weight.numel(), sum(by_module.get(f"{prefix}.{name}", {}).values()))
        for name, layer in layers.items()
    }
    own = {n: p for n, p in model.named_parameters() if n.startswith("experts.0.")}
    return sum(p.numel() for p in own.values()), counter.get_total_flops(), found


def _train(model: RIDEWrapper, lr: float) -> tuple[float, float]:
    args, kwargs = redrawn(model.example_input(_ROWS))
    target = torch.arange(_ROWS) % model.num_classes
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    model.train()
    for _ in range(_STEPS):
        optimizer.zero_grad()
        experts = expert_logits(model(*args, **kwargs))
        loss = nn.functional.cross_entropy(experts.flatten(0, 1), target.repeat_interleave(2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert loss.isfinite(), "the loss is not finite"
    return losses[0], min(losses[-3:])


def run(architecture: Architecture, width: float) -> dict[str, Any]:
    """Result for one architecture."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, unknown to the counter
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        backbone = architecture.build()
        result: dict[str, Any] = check_narrowed(backbone, width)
    except WidthError as error:
        result = {"refused": str(error)}
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _work(architecture: Architecture, width: float, sender: Connection) -> None:
    sender.send(run(architecture, width))


def _in_process(architecture: Architecture, width: float, limit: float) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(architecture, width, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            result: dict[str, Any] = receiver.recv()
            return result
        return {"failed": f"took more than {limit:.0f} s"}
    except EOFError:
        return {"failed": "the process died"}
    finally:
        process.kill()
        process.join()


def table(results: dict[str, dict[str, Any]], width: float) -> str:
    """The table as Markdown."""
    good = [r for r in results.values() if "parameters" in r]
    lines = [
        f"{len(good)} of {len(results)} architectures ({len(good) / len(results):.0%}) at "
        f"`expert_width={width}`. Shares are of the full-width expert; the losses are those of "
        f"the first and the best of the last three of {_STEPS} steps on one batch.",
        "",
        "| architecture | parameters | FLOPs | loss |",
        "|---|---|---|---|",
    ]
    refused = ["", "## Not narrowed", "", "| architecture | why |", "|---|---|"]
    for key, result in sorted(results.items()):
        if "parameters" in result:
            losses = f"{result['first_loss']:.2f} → {result['last_loss']:.2f}"
            shares = f"{result['parameters']:.2f} | {result['flops']:.2f} | {losses}"
            lines.append(f"| {key} | {shares} |")
        else:
            refused.append(f"| {key} | {_reason(result).replace('|', '/')} |")
    return "\n".join(lines + refused)


def _reason(result: dict[str, Any]) -> str:
    """What the message says before it says what to pass instead."""
    reason: str = result.get("refused") or result["failed"]
    return re.sub(
        r"^Cannot narrow the experts to expert_width=[^:]*: ", "", reason.split(". Pass ")[0]
    )


def main() -> None:
    """Run what the cache does not hold, then write the table if nothing is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="run keys that contain one of these, anew")
    parser.add_argument("--failed", action="store_true", help="run what did not pass, anew")
    parser.add_argument("--cache", type=Path, default=Path("width-zoo.json"))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one architecture")
    parser.add_argument("--width", type=float, default=0.75)
    options = parser.parse_args()
    results = json.loads(options.cache.read_text()) if options.cache.exists() else {}
    architectures = zoo()
    for a in architectures:
        asked = any(part in a.key for part in options.only or ())
        again = options.failed and "parameters" not in results.get(a.key, {})
        if asked or again or (a.key not in results and not options.only):
            results[a.key] = result = _in_process(a, options.width, options.limit)
            print(a.key, result, flush=True)
            options.cache.write_text(json.dumps(results, indent=1))
    results = {a.key: results[a.key] for a in architectures if a.key in results}
    if len(results) == len(architectures):
        begin, end = "<!-- table -->", "<!-- end of table -->"
        before, _, rest = _PAGE.read_text().partition(begin)
        after = rest.partition(end)[2]
        _PAGE.write_text(f"{before}{begin}\n{table(results, options.width)}\n{end}{after}")


if __name__ == "__main__":
    main()
