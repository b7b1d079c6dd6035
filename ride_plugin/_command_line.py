"""The command line: what a split would cost, how it was made, and how a model fares by shot."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from ride_plugin._advised import GIVEN, GUESSED, naming, with_options
from ride_plugin._budget import plan
from ride_plugin._checks import as_labels, check_floating
from ride_plugin._cost import cost_report
from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._parameters import parameters_by_child
from ride_plugin._split import reason_of_fork
from ride_plugin._wrapper import RIDEWrapper
from ride_plugin.longtail import analyze, shot_report
from ride_plugin.routing import routing_report

_BACKBONE = """\
MODULE:FACTORY names what makes the backbone, for example torchvision.models:resnet50 or
mymodels.resnet:resnet32. It is imported from the current directory or the environment, and
called without arguments."""
_PREDICTIONS = """\
The file holds arrays as numpy.savez writes them: `target` [N], `class_counts` [C], and one of
`expert_logits` [N, E, C], `logits` [N, C] or `predictions` [N]; beside it `num_experts_used` [N]
if the model was routed."""
_OF_ANY_MODEL = 3  # lines of an analysis: head, accuracy and calibration error; experts follow
_KINDS = ("expert_logits", "logits", "predictions")
_TOLD_OF_GUESS = ", which are guessed: `--input` gives others"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, 2 after a message on standard error if not."""
    options = _parser().parse_args(arguments)
    try:
        text, values = options.run(options)
    except (RIDEError, OSError) as error:
        message = with_options(str(error), options.command)
        if "--input" in message:
            message += f" ({GIVEN if options.input else GUESSED})"
        print(f"python -m ride_plugin {options.command}: {message}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(values, indent=2) if options.json else text, flush=True)
    except BrokenPipeError:  # whoever reads, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ride_plugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plain = argparse.RawDescriptionHelpFormatter
    for name, run, text in (
        ("plan", _plan, "compare numbers and widths of experts by cost, before training"),
        ("inspect", _inspect, "show where a backbone is forked and why, what is shared, the cost"),
    ):
        command = commands.add_parser(
            name,
            # Behind several values of an option argparse takes the name for one more.
            usage=f"python -m ride_plugin {name} MODULE:FACTORY [options]",
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{_BACKBONE}",
            formatter_class=plain,
        )
        command.set_defaults(run=run)
        several = "+" if name == "plan" else None
        command.add_argument("backbone", metavar="MODULE:FACTORY")
        numbers, widths = ("2 3 4", "1 0.75 0.5") if several else ("3", "1")
        command.add_argument(
            "--num-experts", type=int, nargs=several, metavar="E", help=f"default: {numbers}"
        )
        command.add_argument(
            "--expert-width",
            type=float,
            nargs=several,
            metavar="W",
            help=f"share of the backbone's channels, from 0 to 1; default: {widths}",
        )
        command.add_argument(
            "--fork-at", metavar="NAME", help="first forked submodule; chosen if left out"
        )
        command.add_argument(
            "--input", metavar="SIZES", help="of one sample, such as 3,224,224; guessed if left out"
        )
        command.add_argument(
            "--logits",
            type=_place,
            metavar="PLACE",
            help="index or name of the logits in what the backbone returns; found if left out",
        )
        command.add_argument(
            "--num-classes",
            type=int,
            metavar="C",
            help="the backbone's own number confirms it, another makes other classifiers",
        )
        if name == "plan":
            command.add_argument(
                "--budget",
                type=float,
                default=1.1,
                help="largest cost, as a multiple of the plain backbone's FLOPs; default: 1.1",
            )
    command = commands.add_parser(
        "report",
        help="accuracy by shot, calibration and experts, from stored predictions",
        description=_PREDICTIONS,
        formatter_class=plain,
    )
    command.set_defaults(run=_report)
    command.add_argument("predictions", type=Path, metavar="FILE.npz")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each class")
    command.add_argument(
        "--many", type=int, default=100, help="many-shot: more images than this; default: 100"
    )
    command.add_argument(
        "--few", type=int, default=20, help="few-shot: fewer images than this; default: 20"
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print values instead of a table")
    return parser


def _plan(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    backbone, example = _backbone(options.backbone), _example(options.input)
    found = plan(
        backbone,
        num_experts=options.num_experts or (2, 3, 4),
        expert_widths=options.expert_width or (1.0, 0.75, 0.5),
        max_flops_ratio=options.budget,
        fork_at=options.fork_at,
        example_input=example,
        logits=options.logits,
        num_classes=options.num_classes,
    )
    failed = tuple((width, with_options(why, options.command)) for width, why in found.failed)
    found = replace(found, failed=failed)
    fork, reason = _fork(backbone, options, example)
    rows: list[dict[str, Any]] = [
        {
            "num_experts": row.num_experts,
            "expert_width": row.expert_width,
            "parameters": row.report.parameters,
            "flops": row.report.flops,
            "flops_ratio": row.ratio,
            "trunk_share": row.report.trunk_flops / max(1, row.report.flops),
            "affordable_experts": row.affordable_experts,
        }
        for row in found.rows
    ]
    lines = [f"forked at {fork} ({reason})"]
    if found.rows:
        report = found.rows[0].report
        lines.append(
            f"the trunk holds {report.trunk_flops / max(1, report.backbone_flops or 0):.0%} of the "
            f"plain backbone's {(report.backbone_flops or 0) / 1e6:,.1f} MFLOPs"
        )
    text = "\n".join([*lines, str(found)])
    if found.rows and not options.input:
        text += _TOLD_OF_GUESS
    sizes = found.rows[0].report.input_sizes if found.rows else None
    values = {"fork_at": fork, "reason": reason, "input_sizes": sizes, "rows": rows}
    return text, {**values, "failed": dict(found.failed)}


def _inspect(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    backbone, example = _backbone(options.backbone), _example(options.input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights, which do not matter here
        model = RIDEWrapper(
            backbone,
            3 if options.num_experts is None else options.num_experts,
            expert_width=1.0 if options.expert_width is None else options.expert_width,
            fork_at=options.fork_at,
            example_input=example,
            logits=options.logits,
            num_classes=options.num_classes,
        )
    fork, reason = _fork(backbone, options, example)
    report = cost_report(model, backbone=backbone)
    plain = parameters_by_child(backbone)
    sides = [
        ("shared", parameters_by_child(model.trunk)),
        ("forked", parameters_by_child(model.experts[0])),
    ]
    rows: list[dict[str, Any]] = [
        {"module": name, "side": side, "parameters": size, "backbone_parameters": plain.get(name)}
        for side, sizes in sides
        for name, size in sizes.items()
    ]
    width = max(len(row["module"]) for row in rows)
    lines = [
        f"forked at {fork} ({reason})",
        f"{model.num_experts} experts of width {model.expert_width}, {model.num_classes} classes",
        "",
        f"{'module':{width}}  side    {'parameters':>12}  {'in the backbone':>15}",
        *(
            f"{row['module']:{width}}  {row['side']}  {row['parameters']:>12,}  "
            f"{row['backbone_parameters'] or 0:>15,}"
            for row in rows
        ),
        "",
        str(report) + ("" if options.input else _TOLD_OF_GUESS),
    ]
    values = {
        "fork_at": fork,
        "reason": reason,
        "num_experts": model.num_experts,
        "expert_width": model.expert_width,
        "num_classes": model.num_classes,
        "modules": rows,
        "parameters": report.parameters,
        "flops": report.flops,
        "backbone_parameters": report.backbone_parameters,
        "backbone_flops": report.backbone_flops,
        "input_sizes": report.input_sizes,
    }
    return "\n".join(lines), values


def _report(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    arrays = _arrays(options.predictions)
    cuts = {"many": options.many, "few": options.few}
    target, class_counts = arrays["target"], arrays["class_counts"]
    used, logits = arrays.get("num_experts_used"), arrays.get("expert_logits")
    values: dict[str, Any] = {}
    if "predictions" in arrays:
        with naming("output", "predictions"):
            report = shot_report(arrays["predictions"], target, class_counts, **cuts)
        text = str(report)
    else:
        if logits is None:  # as those of one expert, whatever number of experts they came from
            of_one = check_floating(arrays["logits"], "logits", "N", "C")[:, None]
            with naming("expert_logits", "logits"):
                if of_one.shape[::2] != (len(target), len(class_counts)):
                    raise ArgumentError(
                        f"Expected argument `logits` to be [{len(target)}, {len(class_counts)}], "
                        "as `target` and `class_counts` have it, but got "
                        f"{list(arrays['logits'].shape)}."
                    )
                found = analyze(of_one, target, class_counts, **cuts)
            text = "\n".join(str(found).splitlines()[:_OF_ANY_MODEL])
        else:
            found = analyze(logits, target, class_counts, num_experts_used=used, **cuts)
            text = str(found)
        report = found.report
        values["calibration_error"] = vars(found.calibration_error)
    if used is not None:
        largest = int(as_labels(used, "num_experts_used").max())
        num_experts = max(1, largest) if logits is None else logits.shape[1]
        routing = routing_report(used, target, class_counts, num_experts=num_experts, **cuts)
        text += f"\n\n{routing}"
        values["experts_used"] = vars(routing)
    accuracy = {name: getattr(report, name) for name in ("overall", "many", "medium", "few")}
    if options.csv is not None:
        report.per_class_csv(options.csv)
    return text, {"accuracy": accuracy, **values, "per_class": list(report.per_class)}


def _fork(
    backbone: nn.Module, options: argparse.Namespace, example: Tensor | None
) -> tuple[str, str]:
    return reason_of_fork(backbone, options.fork_at, example, options.logits, options.num_classes)


def _place(text: str) -> int | str:
    """An index, or else a key or an attribute."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _backbone(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or "/" in module_name or module_name.endswith(".py"):
        raise ArgumentError(
            "Expected MODULE:FACTORY, a module as `import` names it and what makes the backbone, "
            f"such as torchvision.models:resnet50, but got {name!r}."
        )
    sys.path.insert(0, "")  # as for `python -c`: the current directory
    try:
        made = attrgetter(attribute)(importlib.import_module(module_name))
        made = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # whatever the user's own code raises
        raise ArgumentError(
            f"Could not make a backbone from {name!r}: {type(error).__name__}: {error}. Expected a "
            "module that can be imported from here, and a function or class in it that takes no "
            "arguments."
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(made, nn.Module):
        raise ArgumentError(
            f"Expected {name!r} to return a torch.nn.Module, but got {type(made).__name__}."
        )
    return made


def _example(sizes: str | None) -> Tensor | None:
    if sizes is None:
        return None
    try:
        shape = [int(size) for size in sizes.split(",")]
        if min(shape) < 1:
            raise ValueError
    except ValueError:
        raise ArgumentError(
            f"Expected --input to be sizes of one sample, such as 3,224,224, but got {sizes!r}."
        ) from None
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.exists() and not is_zipfile(path):  # numpy would advise to unpickle it
            raise ValueError("it is not an archive")
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise ArgumentError(f"Cannot read {path} as an .npz file of numbers ({error}).") from error
    missing = {"target", "class_counts"} - arrays.keys()
    if missing or sum(kind in arrays for kind in _KINDS) != 1:
        raise ArgumentError(f"{_PREDICTIONS}\n{path} holds {sorted(arrays) or 'nothing'}.")
    return arrays
