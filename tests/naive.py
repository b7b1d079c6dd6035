"""A copy of the backbone for each expert, run by hand: what a wrapped model has to equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import RIDEWrapper, expert_logits
from ride_plugin._tree import buffers_of, parameters_of, tensors_in


def copies_of(backbone: nn.Module, model: RIDEWrapper) -> list[nn.Module]:
    """Independent copies of the backbone with the tensors of the trunk and of each expert."""
    copies = [copy.deepcopy(backbone) for _ in range(model.num_experts)]
    for index, each in enumerate(copies):
        state = _state_of(model, index)
        for path, part in each.named_modules():
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    name = f"{path}.{key}" if path else key
                    if tensor is not None and name in state:
                        tensor.data = state[name].detach().clone()
    return copies


def train_both(
    backbone: nn.Module,
    model: RIDEWrapper,
    batches: Sequence[Any],
    *,
    lr: float = 0.1,
    tolerance: float = 1e-5,
    before_each: Callable[[], object] = lambda: None,
) -> list[nn.Module]:
    """Train the wrapped model and the copies; logits at each step and every tensor must agree.

    The gradient of what experts share is the sum of the copies' gradients.

    Args:
        backbone: the one that was wrapped.
        model: the wrapped model.
        batches: tensors, or tuples ``(args, kwargs)``.
        lr: of plain gradient descent.
        tolerance: relative and absolute.
        before_each: called before the model and before each copy: puts a random state back.
    """
    model.train()
    copies = copies_of(backbone, model)
    for each in copies:
        each.train()  # which may return None
    shared = {name.removeprefix("trunk.") for name, _ in model.trunk.named_parameters()}
    for step, batch in enumerate(batches):
        args, kwargs = batch if isinstance(batch, tuple) else ((batch,), {})
        rows = next(tensors_in((args, kwargs))).shape[0]
        target = torch.arange(rows) % model.num_classes
        for module in (model, *copies):
            module.zero_grad()
        before_each()
        own = copy.deepcopy((args, kwargs))  # a forward may change what it is given
        got = expert_logits(model(*own[0], **own[1]))
        F.cross_entropy(got.flatten(0, 1), target.repeat_interleave(got.shape[1])).backward()
        for index, each in enumerate(copies):
            before_each()
            own = copy.deepcopy((args, kwargs))
            expected = _logits(each(*own[0], **own[1]))
            _close(got[:, index], expected, tolerance, f"step {step}, expert {index}")
            (F.cross_entropy(expected, target) / len(copies)).backward()
        with torch.no_grad():
            named = [dict(each.named_parameters(remove_duplicate=False)) for each in copies]
            for name in shared:
                gradients = [p[name].grad for p in named if p[name].grad is not None]
                for parameters in named:
                    parameters[name].grad = torch.stack(gradients).sum(0) if gradients else None
            for module in (model, *copies):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= lr * parameter.grad
    agree(model, copies, tolerance)
    return copies


def agree(model: RIDEWrapper, copies: Sequence[nn.Module], tolerance: float = 1e-5) -> None:
    """Every parameter and buffer of trunk and experts is that of each copy."""
    for index, each in enumerate(copies):
        state = _state_of(model, index)
        values = {n: v for n, v in _tensors(each) if v is not None}
        assert {name for name, _ in (*each.named_parameters(), *each.named_buffers())} <= {*state}
        assert {*state} <= {*values}
        for name, value in state.items():
            _close(value, values[name], tolerance, f"{name} of expert {index}")


def _state_of(model: RIDEWrapper, index: int) -> dict[str, Tensor]:
    """Tensors of the trunk and of one expert, under the backbone's names."""
    return dict((*_tensors(model.trunk), *_tensors(model.experts[index])))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*parameters_of(module), *buffers_of(module)]


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, dict) else output.logits


def _close(a: Tensor, b: Tensor, tolerance: float, where: str) -> None:
    torch.testing.assert_close(
        a.detach(),
        b.detach(),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda message: f"{where}: {message}",
    )
