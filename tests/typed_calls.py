"""What type checkers make of calls whose return type depends on a flag; mypy reads this file.

Nothing here runs: `mypy --strict` fails where a type is another one.
"""

from typing import Any

from torch import Tensor
from typing_extensions import assert_type

from ride_plugin import RIDEWrapper, RoutingInference, expert_logits, experts_loss
from ride_plugin.routing import RoutingOutput, StagedRunner


def routed(serve: RoutingInference, runner: StagedRunner, x: Tensor, flag: bool) -> None:
    assert_type(serve.forward(x), Tensor)
    assert_type(serve.forward(x, return_routing=True), RoutingOutput)
    assert_type(serve.forward(x, return_routing=flag), Tensor | RoutingOutput)
    assert_type(serve.dense(x), Tensor)
    assert_type(serve.dense(x, return_routing=True), RoutingOutput)
    assert_type(runner(x), Tensor)
    assert_type(runner(x, return_routing=True), RoutingOutput)
    assert_type(runner(x, return_routing=flag), Tensor | RoutingOutput)


def wrapped(model: RIDEWrapper, criterion: Any, x: Tensor, y: Tensor) -> None:
    out = model.forward(x)
    assert_type(expert_logits(out), Tensor)
    assert_type(experts_loss(criterion, out, y), Tensor)
    assert_type(model.optimize_for_inference(), RIDEWrapper)
