"""Tools that put a hook or a buffer on every module there is: summaries, counters of operations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ride_plugin import ReplayError, RIDEWrapper, expert_logits

from ..backbones import CifarResNet

X = torch.randn(2, 3, 32, 32)


class Summary:
    """Asks for shapes with operations of torch, as summaries of layers do."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[tuple[str, int, list[int]]] = []
        self.begun = 0
        self.handles = []
        for module in model.modules():
            if module is not model:
                self.handles.append(module.register_forward_pre_hook(self.before))
                self.handles.append(module.register_forward_hook(self.after))

    def before(self, module: nn.Module, args: Any) -> None:
        self.begun += int(torch.ones(3).sum().item() == 3)

    def after(self, module: nn.Module, args: Any, result: Tensor) -> None:
        size = args[0].data.size()
        number = torch.prod(torch.LongTensor(list(size[1:])))
        assert args[0].detach().element_size() == 4
        self.rows.append((type(module).__name__, int(number), list(result.shape)))


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_every_module_change_nothing_and_see_every_layer(training: bool) -> None:
    model = RIDEWrapper(CifarResNet(), 3).train(training)
    seed = torch.get_rng_state()
    wanted = expert_logits(copy.deepcopy(model)(X))
    torch.set_rng_state(seed)
    summary = Summary(model)
    torch.testing.assert_close(expert_logits(model(X)), wanted)
    convolutions = [row for row in summary.rows if row[0] == "Conv2d"]
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert summary.begun >= len(summary.rows)  # the trunk unwinds at the fork
    shapes = [row[2] for row in summary.rows if row[0] == "Linear"]
    assert shapes == [[2, 100]] * 3
    for handle in summary.handles:
        handle.remove()
    if not training:  # where no statistics have moved on
        torch.testing.assert_close(expert_logits(model(X)), wanted)


def test_a_hook_for_all_modules_there_are_is_named_where_it_disturbs() -> None:
    model = RIDEWrapper(CifarResNet(), 2)

    def check(module: nn.Module, args: Any, result: Any) -> None:
        assert torch.isfinite(result).all()

    handle = nn.modules.module.register_module_forward_hook(check)
    try:
        with pytest.raises(ReplayError, match=r"hook for all modules .* computes `isfinite`"):
            model(X)
    finally:
        handle.remove()
    for module in model.modules():
        module.register_forward_hook(check)
    for training in (True, False):
        assert model.train(training)(X).shape == (2, 100)
    with torch.no_grad():
        model.experts[1].get_submodule("linear").weight.fill_(torch.nan)
    with pytest.raises(AssertionError):
        model(X)


def count(model: nn.Module) -> int:
    """Multiply-adds of convolutions, in buffers that every module is given."""

    def add(module: nn.Module, args: Any, result: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        module.total_ops += result.numel() * math.prod(module.weight.shape[1:])

    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(X)
    return int(sum(module.total_ops.item() for module in model.modules()))


def test_a_counter_with_a_buffer_on_every_module_counts_each_layer_once() -> None:
    backbone = CifarResNet()
    model = RIDEWrapper(backbone, 3).eval()
    trunk = {name for name, _ in model.trunk.named_parameters()}
    shared, whole = 0, count(backbone.eval())
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d) and f"{name}.weight" in trunk:
            shared += int(module.total_ops.item())
    assert 0 < shared < whole
    assert count(model) == shared + 3 * (whole - shared)


@pytest.mark.parametrize("by", ["named_parameters", "attribute"])
def test_hooks_that_count_weights_count_each_once(by: str) -> None:
    layers = [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 5))]
    model = RIDEWrapper(nn.Sequential(*layers), 3, fork_at="2", example_input=torch.randn(2, 8))
    counted: dict[int, int] = {}

    def count_here(module: nn.Module, *_: Any) -> None:
        own = [p for name, p in module.named_parameters() if "." not in name]
        if by == "attribute":
            own = [getattr(module, n) for n in ("weight", "bias") if hasattr(module, n)]
        counted[id(module)] = sum(p.numel() for p in own)

    for module in model.modules():
        module.register_forward_pre_hook(count_here)
    model(torch.randn(4, 8))
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())


def test_torchs_counter_divides_flops_among_trunk_and_experts() -> None:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)]
    model = RIDEWrapper(nn.Sequential(*layers), 3, fork_at="2").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 8))
    of = {name.partition(".")[2]: sum(v.values()) for name, v in counter.flop_counts.items()}
    assert of["trunk"] == of["trunk.0"] == 2 * 4 * 8 * 16
    assert [of[f"experts.{k}"] for k in range(3)] == [2 * 4 * 16 * (16 + 5)] * 3
    assert "trunk.2" not in of


@pytest.mark.parametrize("converts", [False, True])
def test_a_pass_on_fake_tensors_has_the_shapes_of_the_true_one(converts: bool) -> None:
    model = RIDEWrapper(CifarResNet(), 2)
    with FakeTensorMode(allow_non_fake_inputs=not converts) as mode:
        x = mode.from_tensor(X)
        if converts:
            named = (*model.named_parameters(), *model.named_buffers())
            fakes = {name: mode.from_tensor(tensor) for name, tensor in named}
            result = torch.func.functional_call(model, fakes, (x,))
        else:
            result = model(x)
    assert result.shape == (2, 100)


class Unasked(nn.Module):
    """Its late part may read the argument, if somebody sets a flag after wrapping."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.adds = ""

    def forward(self, x: Tensor) -> Tensor:
        late = self.late(self.early(x).relu())
        if self.adds:
            late = late + (x.detach() if self.adds == "detached" else x.data)
        return self.fc(late)


@pytest.mark.parametrize("how", ["detached", "data"])
def test_what_was_dropped_cannot_be_read_by_a_detour(how: str) -> None:
    model = RIDEWrapper(Unasked(), 2, fork_at="late", example_input=torch.randn(2, 8)).eval()
    model.adds = how
    with pytest.raises(ReplayError, match="reads an argument"):
        model(torch.randn(4, 8))


class Keeping(nn.Linear):
    """Keeps a loss in its forward, and computes another one on demand."""

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        self.kept = result.square().mean()
        return result

    def penalty(self) -> Tensor:
        return self.weight.square().mean()


LOOPS: dict[str, Callable[[nn.Module], Any]] = {
    "a tensor": lambda m: sum(part.kept for part in m.modules() if hasattr(part, "kept")),
    "a default": lambda m: sum(getattr(part, "kept", 0.0) for _, part in m.named_modules()),
    "a method": lambda m: sum(p.penalty() for p in m.modules() if hasattr(p, "penalty")),
    "a weight": lambda m: sum(p.weight.abs().sum() for p in m.modules() if hasattr(p, "weight")),
}


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_loop_over_all_modules_adds_up_holds_each_layer_once(
    loop: str, num_experts: int
) -> None:
    net = nn.Sequential(Keeping(8, 16), nn.ReLU(), Keeping(16, 16), nn.ReLU(), Keeping(16, 5))
    model = RIDEWrapper(net, num_experts, fork_at="2")
    model(torch.randn(4, 8))
    total = LOOPS[loop]
    layers = [model.trunk[0], *(expert[at] for expert in model.experts for at in (2, 4))]
    torch.testing.assert_close(total(model), sum(total(layer) for layer in layers))


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("loop", ["list", "dict", "default"])
def test_a_loop_over_a_list_of_all_modules_holds_each_layer_once_and_is_told(
    loop: str, num_experts: int
) -> None:
    net = nn.Sequential(Keeping(8, 16), nn.ReLU(), Keeping(16, 16), nn.ReLU(), Keeping(16, 5))
    model = RIDEWrapper(net, num_experts, fork_at="2")
    model(torch.randn(4, 8))

    def total(module: nn.Module) -> Any:
        parts = list(dict(module.named_modules()).values())
        if loop == "list":
            parts = list(module.modules())
        if loop == "default":
            return sum(getattr(part, "kept", 0.0) for part in parts)
        found = 0.0
        for part in parts:
            if hasattr(part, "kept"):
                found = found + part.kept
        return found

    layers = [model.trunk[0], *(expert[at] for expert in model.experts for at in (2, 4))]
    with pytest.warns(UserWarning, match="The answer to `hasattr` or to `getattr`"):
        found = total(model)
    torch.testing.assert_close(found, sum(total(layer) for layer in layers))


def test_who_asks_for_a_tensor_by_a_dot_gets_it_from_a_stand_in_of_the_trunk() -> None:
    model = RIDEWrapper(nn.Sequential(Keeping(8, 16), nn.ReLU(), nn.Linear(16, 5)), 2, fork_at="2")
    assert model.experts[0][0].weight is model.trunk[0].weight
    with pytest.warns(UserWarning, match=r"asked for `0\.weight`.*`model\.trunk\[0\]`"):
        assert not hasattr(model.experts[0][0], "weight")
    assert hasattr(model.experts[0][0], "in_features")  # plain values are everybody's


def test_a_loop_that_does_not_ask_whether_a_layer_is_there_is_told_so() -> None:
    model = RIDEWrapper(nn.Sequential(Keeping(8, 16), nn.ReLU(), nn.Linear(16, 5)), 2, fork_at="2")
    assert model.experts[0][0].weight is model.trunk[0].weight
    with pytest.raises(ReplayError, match=r"asks a stand-in for `0\.weight`.*would count twice"):
        sum(part.weight.sum() for name, part in model.experts.named_modules() if name == "0.0")


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: model.trunk(x),
        lambda model, x: nn.Sequential(*list(model.children())[:-1])(x),
        lambda model, x: nn.Sequential(*model.trunk.children())(x),
    ],
    ids=["trunk", "children", "layers"],
)
def test_who_runs_the_trunk_by_itself_is_told_once_that_he_gets_expert_0(run) -> None:
    backbone = nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    model, x = RIDEWrapper(backbone, 3, fork_at="2"), torch.randn(4, 8)
    model(x), model.eval()(x), model.run_trunk(x), model.router_inputs(x)
    expected = model.experts[0](x)
    with pytest.warns(UserWarning, match="as far as `2`, which is forked, .* expert 0 alone, of 3"):
        found = run(model, x)
    torch.testing.assert_close(found, expected)
    run(model, x)
    run(RIDEWrapper(backbone, 1, fork_at="2"), x)  # whose trunk is the backbone
