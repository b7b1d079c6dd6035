"""Checks of what is computed: the wrapped model against the backbone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.compare import (
    Failed,
    NotApplicable,
    require_close,
    require_equal,
    require_gradients,
)
from benchmarks.coverage.inputs import Inputs, other_sizes, rows_of
from benchmarks.coverage.subject import Subject, run, run_wrapped, unfused
from ride_plugin import RIDEWrapper, expert_logits
from ride_plugin._tree import map_tensors


def wraps(subject: Subject) -> None:
    """Nothing but `num_experts` is passed; the backbone and the random state stay untouched."""
    before = copy.deepcopy(subject.backbone.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    subject.one  # noqa: B018
    if not torch.equal(state, torch.get_rng_state()):
        raise Failed("building with one expert consumed random numbers")
    for name, tensor in subject.backbone.state_dict().items():
        if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
            raise Failed(f"building changed the backbone's `{name}`")
    subject.two  # noqa: B018


def evaluation(subject: Subject) -> None:
    """One expert is the backbone to the bit in evaluation; so is each of two with its weights."""
    inputs = subject.inputs
    with torch.no_grad():
        got = run(subject.one.eval(), inputs)
        require_close(got, run(subject.plain(), inputs), "one expert")
        require_equal(got, run(unfused(subject.plain()), inputs), "one expert")
        each = expert_logits(run_wrapped(subject.two.eval(), inputs))
        for index in range(2):
            expected = run(subject.expert_as_backbone(index), inputs)
            require_close(each[:, index], expected, f"expert {index}")


def training(subject: Subject) -> None:
    """One expert is the backbone to the bit in training: outputs, buffers, random state."""
    plain = subject.plain(training=True)
    model = copy.deepcopy(subject.one).train()
    with torch.no_grad():
        for step in range(2):
            try:
                expected = run(plain, subject.inputs, step)
            except Exception as error:
                raise NotApplicable(f"the backbone does not train on its input: {error}") from error
            state = torch.get_rng_state()
            require_equal(run(model, subject.inputs, step), expected, f"step {step}")
            if not torch.equal(state, torch.get_rng_state()):
                raise Failed("random state after the forward")
    theirs = dict(plain.named_buffers(remove_duplicate=False))
    ours: dict[str, Tensor] = {}
    for part in (model.trunk, model.experts[0]):
        ours.update(part.named_buffers(remove_duplicate=False))
    for name, buffer in theirs.items():
        require_equal(ours[name], buffer, f"buffer {name}")


def trunk_once(subject: Subject) -> None:
    """Every layer of the trunk is called as often as in the backbone, whatever the experts."""
    expected = _calls(subject.plain(), lambda module: run(module, subject.inputs))
    model = subject.two.eval()
    args, kwargs = subject.inputs
    before_fork = _calls(model, lambda module: module.run_trunk(*args, **kwargs))
    got = _calls(model, lambda module: run_wrapped(module, subject.inputs))
    for prefix in ("trunk.", "experts.0.", "experts.1."):
        owner = model.get_submodule(prefix[:-1])
        for name, module in owner.named_modules():
            owns = any(True for _ in module.parameters(recurse=False))
            leaf = not any(True for _ in module.children())
            if not (leaf and owns):
                continue
            times = expected[name]
            if prefix == "trunk.":  # a layer that is called again after the fork runs per expert
                times += times - before_fork[prefix + name]
            if got[prefix + name] != times:
                raise Failed(f"{prefix}{name}: {got[prefix + name]} calls for {times}")


def gradients_one(subject: Subject) -> None:
    """With one expert, the gradients in training are the backbone's own."""
    plain = subject.plain(training=True)
    model = copy.deepcopy(subject.one).train()
    try:
        expected = _gradients(plain, lambda: run(plain, subject.inputs))
    except Exception as error:
        raise NotApplicable(f"the backbone does not train on its input: {error}") from error
    got = _gradients(model, lambda: run(model, subject.inputs))
    require_gradients(_merged(got), expected)


def gradients_two(subject: Subject) -> None:
    """With two experts, the trunk's gradient is the sum over two backbones with their weights."""
    model = copy.deepcopy(subject.two).eval()
    got = _gradients(model, lambda: expert_logits(run_wrapped(model, subject.inputs)))
    plains = [subject.expert_as_backbone(index) for index in range(2)]
    each = [_gradients(p, partial(run, p, subject.inputs)) for p in plains]
    for index, expected in enumerate(each):
        ours = {k: v for k, v in got.items() if k.startswith(f"experts.{index}.")}
        require_gradients(_merged(ours), expected, subset=True)
    ours = {k: v for k, v in got.items() if k.startswith("trunk.")}
    total: dict[str, Tensor | None] = {}
    for name in each[0]:
        parts = [gradient for g in each if (gradient := g[name]) is not None]
        total[name] = torch.stack(parts).sum(0) if parts else None
    require_gradients(_merged(ours), total, subset=True)


def rows(subject: Subject) -> None:
    """An expert on some rows gives those rows of the whole, which are the backbone's."""
    check_rows(subject, subject.inputs)


def check_rows(subject: Subject, inputs: Inputs) -> None:
    """The same on any inputs."""
    model, plain = subject.two.eval(), subject.expert_as_backbone(1)
    with torch.no_grad():
        run(plain, subject.inputs)  # some backbones adapt themselves to the sizes they see
        try:
            _same_rows(model, plain, inputs, tolerance=1e-4)
        except Failed as failure:
            # A deep network may amplify rounding, which depends on the number of rows, without
            # bound; what is wrong stays wrong in double precision.
            doubled = map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
            try:
                _same_rows(copy.deepcopy(model).double(), plain.double(), doubled, tolerance=1e-7)
            except Exception:
                raise failure from None


def _same_rows(model: RIDEWrapper, plain: nn.Module, inputs: Inputs, tolerance: float) -> None:
    chosen = torch.tensor([2, 0])
    state = model.run_trunk(*inputs[0], **inputs[1])
    whole = model.run_expert(1, state)[0]
    some = model.run_expert(1, state.select(chosen))[0]
    require_close(some, whole[chosen], "rows", tolerance)
    require_close(some, run(plain, rows_of(inputs, chosen)), "rows against the backbone", tolerance)


def sizes(subject: Subject) -> None:
    """Inputs of other sizes than the example's, where the backbone takes them; rows as well."""
    accepted = 0
    for inputs in other_sizes(subject.inputs):
        with torch.no_grad():
            plain = subject.plain()
            run(plain, subject.inputs)  # some backbones adapt themselves to the sizes they see
            try:
                expected = run(unfused(plain), inputs)
            except Exception:
                continue
            accepted += 1
            require_equal(run(subject.one.eval(), inputs), expected, "another size")
            check_rows(subject, inputs)
    if not accepted:
        raise NotApplicable("the backbone takes one size only")


def _gradients(module: nn.Module, compute: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    module.zero_grad(set_to_none=True)
    logits = compute()
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(logits.shape[0], logits.shape[-1], generator=generator)
    if logits.dim() == 3:  # the same direction for each expert
        direction = direction.unsqueeze(1)
    (logits * direction).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _merged(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """By the backbone's names."""
    return {
        name.removeprefix("trunk.")
        if name.startswith("trunk.")
        else ".".join(name.split(".")[2:]): gradient
        for name, gradient in gradients.items()
    }


def _calls(module: nn.Module, forward: Callable[[Any], Any]) -> Counter[str]:
    count: Counter[str] = Counter()
    handles = [
        part.register_forward_hook(lambda *_, name=name: count.update([name]))
        for name, part in module.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
    ]
    try:
        with torch.no_grad():
            forward(module)
    finally:
        for handle in handles:
            handle.remove()
    return count
