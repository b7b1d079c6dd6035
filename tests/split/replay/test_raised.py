"""Exceptions in a forward: its own that it catches, and the library's, which it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, expert_logits
from ride_plugin._split._replay._raised import Raised
from tests.naive import copies_of, train_both


class Failed(RuntimeError):
    """Takes other arguments than it hands on, and carries a tensor."""

    def __init__(self, rows: int, left: Tensor) -> None:
        super().__init__(f"{rows} rows")
        self.left = left


class Fast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fails, self.kind = nn.Linear(8, 8), False, "custom"

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.fails and self.kind == "custom":
            raise Failed(len(x), x)
        if self.fails:
            raise OSError(2, "missing")
        return x


class FallsBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fast = Fast()
        self.slow = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.a(x).relu())
        try:
            x = self.fast(x)
        except Failed as error:
            x = self.slow(x) + error.left * (str(error) == f"{len(x)} rows")
        except OSError as error:
            x = self.slow(x) * (error.errno or 0)
        return self.c(self.b(2 * x).relu())


def wrapped(net: nn.Module, **options: Any) -> RIDEWrapper:
    return RIDEWrapper(net, 3, fork_at="b", example_input=torch.randn(2, 6), **options)


@pytest.mark.parametrize("kind", ["custom", "builtin"])
@pytest.mark.parametrize("fails_at", ["build", "run"])
def test_a_module_that_fails_and_is_caught_fails_in_each_expert_too(
    fails_at: str, kind: str
) -> None:
    net = FallsBack()
    net.fast.fails, net.fast.kind = fails_at == "build", kind
    model = wrapped(net)
    for module in (net, model.trunk):
        module.fast.fails, module.fast.kind = True, kind
    runs: list[None] = []
    batches = [torch.randn(5, 6) for _ in range(3)]
    train_both(net, model, batches, before_each=lambda: torch.manual_seed(7))
    model.trunk.slow.register_forward_hook(lambda *_: runs.append(None))
    model.train()(batches[0])
    assert len(runs) == 1
    x, rows = batches[0], torch.tensor([3, 0])
    with model.evaluating(), torch.no_grad():
        expected = torch.stack([each.eval()(x) for each in copies_of(net, model)], dim=1)
        assert torch.equal(expert_logits(model(x)), expected)
        part = model.run_trunk(x).select(rows)
        logits = torch.stack([model.run_expert(k, part)[0] for k in range(3)], dim=1)
        torch.testing.assert_close(logits, expected[rows])


def test_a_module_that_fails_and_is_not_caught_ends_the_pass() -> None:
    model, x = wrapped(FallsBack()).eval(), torch.randn(5, 6)
    before = model(x)
    model.trunk.a.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    model.trunk.a._forward_pre_hooks.popitem()
    assert torch.equal(model(x), before)
    plain = model.to_module(0)
    assert not any(m._forward_hooks or m._forward_hooks_always_called for m in plain.modules())


class ReturnsNothing(nn.Module):
    """Returns None, also where it runs while an exception is being handled."""

    def forward(self, x: Tensor) -> None:
        self.seen = x.detach().sum()


class RunsInHandler(FallsBack):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = ReturnsNothing()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        try:
            raise KeyError
        except KeyError:
            self.nothing(x)
            x = self.slow(x)
        return self.c(self.b(x).relu())


def test_modules_that_run_while_an_exception_is_handled_have_not_raised_it() -> None:
    net = RunsInHandler()
    model = wrapped(net)
    train_both(
        net, model, [torch.randn(5, 6) for _ in range(2)], before_each=lambda: torch.manual_seed(7)
    )
    assert not any("raised" in key for key in model.run_trunk(torch.randn(5, 6)).keys)


class Catches(FallsBack):
    """Catches every exception around the fork, and counts."""

    def __init__(self, caught: type[BaseException]) -> None:
        super().__init__()
        self.caught, self.failures = caught, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        try:
            x = self.b(self.slow(x)).relu()
        except self.caught:
            self.failures += 1
            x = torch.zeros_like(x)
        return self.c(x) + self.failures


def test_a_forward_may_catch_every_exception_around_the_fork() -> None:
    net = Catches(Exception)
    model = wrapped(net)
    train_both(
        net, model, [torch.randn(5, 6) for _ in range(2)], before_each=lambda: torch.manual_seed(7)
    )
    with pytest.raises(ReplayError, match=r"at the fork: it catches whatever there is"):
        wrapped(Catches(BaseException))


def test_an_expert_that_leaves_the_path_is_told_where_its_forward_catches_that() -> None:
    model = wrapped(Catches(Exception)).eval()
    model.experts[1].slow = nn.Identity()  # in place of what reads the tape
    with pytest.raises(ReplayError):
        model(torch.randn(5, 6))


def test_a_narrow_expert_may_catch_every_exception() -> None:
    model = wrapped(Catches(Exception), expert_width=0.5).eval()
    assert model(torch.randn(5, 6)).shape == (5, 4)
    assert all(expert.failures == 0 for expert in model.experts)


def test_what_is_raised_again_is_alike_and_leads_nowhere() -> None:
    left = torch.ones(2)
    try:
        raise Failed(3, left)
    except Failed as caught:
        again = Raised.of(caught).again()
    assert type(again) is Failed
    assert str(again) == "3 rows"
    assert again.left is left
    assert again.__traceback__ is None


def test_hooks_that_torch_always_calls_run_where_a_forward_is_ended() -> None:
    class Holds(nn.Sequential):
        pass

    body = Holds(nn.Linear(6, 8), nn.ReLU(), Holds(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    pair = RIDEWrapper.from_pair(body, nn.Linear(8, 4), 2, fork_at="feature_extractor.2.2").eval()
    inside: list[nn.Module] = []
    calls: list[nn.Module] = []

    def enters(module: nn.Module, args: Any) -> None:
        inside.append(module)
        calls.append(module)

    def leaves(module: nn.Module, args: Any, result: Any) -> None:
        assert inside.pop() is module

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enters),
        nn.modules.module.register_module_forward_hook(leaves, always_call=True),
    ]
    try:
        features, classifier = pair.as_pair()
        calls.clear()
        pair(torch.randn(5, 6))
        assert not inside
        classifier(features(torch.randn(5, 6)))
        assert not inside
    finally:
        for handle in handles:
            handle.remove()
    assert pair.trunk.feature_extractor[2] in calls
    pair.trunk.register_forward_hook(lambda module, args, result: result + 1, always_call=True)
    with pytest.warns(UserWarning, match=r"always_call=True` raised TypeError"):
        pair(torch.randn(5, 6))
