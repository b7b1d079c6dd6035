"""State that a forward writes: queues, banks, prototypes, counters, in modules and on the root.

Each expert has to have what an independent copy of the backbone would have.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ride_plugin import ReplayError, RIDEWrapper, SplitError
from tests.naive import train_both


def wrapped(net: nn.Module, fork_at: str = "b", num_experts: int = 3) -> RIDEWrapper:
    example = torch.randn(2, 6)
    return RIDEWrapper(net, num_experts, fork_at=fork_at, init="copy", example_input=example)


def batches(number: int = 3) -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(number)]


class Stateful(nn.Module):
    """A layer that adds a little of what it has stored, and stores something in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.randn(7, 8))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank.clone()
        out = x + 0.1 * (x @ bank.t()).softmax(1) @ bank
        if self.training:
            self.store(x.detach())
        return out * (1 + 0.01 * self.pointer)


class Ring(Stateful):
    def store(self, x: Tensor) -> None:
        start = int(self.pointer)
        self.bank[(torch.arange(len(x)) + start) % 7] = x
        self.pointer[0] = (start + len(x)) % 7


class BoundAnew(Stateful):
    def store(self, x: Tensor) -> None:
        self.bank = torch.cat([x, self.bank])[:7]
        self.pointer = self.pointer + 1


class EntryBoundAnew(Stateful):
    def store(self, x: Tensor) -> None:
        self._buffers["bank"] = torch.cat([x, self.bank])[:7]


class Data(Stateful):
    def store(self, x: Tensor) -> None:
        self.bank.data = 0.9 * self.bank + 0.1 * x.mean(0)


class Average(Stateful):
    def store(self, x: Tensor) -> None:
        self.bank.mul_(0.9).add_(0.1 * x.mean(0))
        self.pointer += 1


class CodeBook(Stateful):
    """A parameter without gradient, written by assignment to its data."""

    def __init__(self) -> None:
        super().__init__()
        del self.bank
        self.bank = nn.Parameter(torch.randn(7, 8), requires_grad=False)

    def store(self, x: Tensor) -> None:
        self.bank.data = 0.9 * self.bank + 0.1 * x.mean(0)


class CodeBookInPlace(CodeBook):
    def store(self, x: Tensor) -> None:
        self.bank.mul_(0.9).add_(0.1 * x.mean(0))


class Table(Stateful):
    """Integers in two dimensions beside nothing that trains: no constant, as the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(4, 3, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.store(x)
        return x * (1 + 0.01 * self.bank.sum())

    def store(self, x: Tensor) -> None:
        self.bank[0] += 1


class TableBoundAnew(Table):
    def store(self, x: Tensor) -> None:
        self.bank = self.bank + 1


MODULES: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (Ring, BoundAnew, EntryBoundAnew, Data, Average, CodeBook, CodeBookInPlace)
} | {
    "Table": Table,
    "TableBoundAnew": TableBoundAnew,
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral_norm of hooks": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "BatchNorm": lambda: nn.BatchNorm1d(8),
}


@pytest.mark.parametrize(
    ("kind", "fork_at"),
    [(kind, "2") for kind in MODULES]
    + [(kind, "3") for kind in ("BoundAnew", "CodeBook", "Table")],
)
def test_modules_write_once_in_the_trunk_and_each_its_own_in_experts(
    kind: str, fork_at: str
) -> None:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), MODULES[kind](), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    train_both(net, wrapped(net, fork_at), batches())


class Root(nn.Module):
    """The same on the root, whose own forward runs on both sides of the fork."""

    def __init__(self, where: str, kind: type[Stateful]) -> None:
        super().__init__()
        self.where, self.kind = where, kind
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        if issubclass(kind, CodeBook):
            self.bank = nn.Parameter(torch.randn(7, 8), requires_grad=False)
        else:
            self.register_buffer("bank", torch.randn(7, 8))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def read(self, x: Tensor) -> Tensor:
        bank = self.bank.clone()
        return (x + 0.1 * (x @ bank.t()).softmax(1) @ bank) * (1 + 0.01 * self.pointer)

    def write(self, x: Tensor) -> None:
        if self.training:
            self.kind.store(self, x.detach())  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if "read early" in self.where:
            x = self.read(x)
        if "write early" in self.where:
            self.write(x)
        x = self.b(x).relu()
        if "read late" in self.where:
            x = self.read(x)
        if "write late" in self.where:
            self.write(x)
        return self.c(x)


KINDS = (Ring, BoundAnew, EntryBoundAnew, Data, Average, CodeBook)


@pytest.mark.parametrize(
    "where", ["read early, write early", "write early, read late", "read late, write late"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_root_writes_once_in_the_trunk_and_each_its_own_in_experts(
    kind: type[Stateful], where: str
) -> None:
    net = Root(where, kind)
    if kind is EntryBoundAnew and "write early" in where:
        with pytest.raises(SplitError, match=r"sets `_buffers\['bank'\]`.*`self.bank = ...`"):
            wrapped(net)
        return
    train_both(net, wrapped(net), batches())


@pytest.mark.parametrize("kind", [BoundAnew, EntryBoundAnew, Data])
def test_one_expert_writes_as_the_backbone_does(kind: type[Stateful]) -> None:
    net = Root("read late, write late", kind)
    train_both(net, wrapped(net, num_experts=1), batches())


@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_that_reads_what_experts_wrote_is_refused(kind: type[Stateful]) -> None:
    with pytest.raises(SplitError, match=r"`bank` keeps what.*other values for each expert"):
        wrapped(Root("read early, write late", kind))


@pytest.mark.parametrize("how", ["run", "checkpoint", "copy"])
def test_evaluation_reads_what_training_wrote(how: str) -> None:
    net = Root("read late, write late", BoundAnew)
    model = wrapped(net)
    model.checkpoint_experts = False
    copies = train_both(net, model, batches())
    x = torch.randn(4, 6)
    expected = torch.stack([each.eval()(x) for each in copies], 1)
    if how == "copy":
        model = torch.load(_saved(model), weights_only=False)
    model.checkpoint_experts = how == "checkpoint"
    torch.testing.assert_close(model.router_inputs(x).expert_logits, expected)
    state = wrapped(Root("read late, write late", BoundAnew))
    state.load_state_dict(model.state_dict())
    torch.testing.assert_close(state.router_inputs(x).expert_logits, expected)


def _saved(model: nn.Module) -> Any:
    from io import BytesIO

    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


class AfterWarmUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("bank", torch.zeros(3, 4, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            self.bank[0] += 1
        return x * (1 + 0.1 * self.bank.sum())


def test_a_table_that_is_written_later_is_refused_when_it_is() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), AfterWarmUp(), nn.Linear(8, 4))
    model = wrapped(net, "1").train()
    for x in batches(2):
        model(x)
    with pytest.raises(ReplayError, match=r"written \['2.bank'\], which all experts share"):
        model(torch.randn(5, 6))


class Attributes(nn.Module):
    """State in plain attributes of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.step = 0
        self.mean: Any = None
        self.kept: list[Tensor] = []
        self.by_size: dict[int, Tensor] = {}


class CountsLate(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        self.step += 1
        return self.c(x) * (1 + 0.1 * self.step)


class CountsEverywhere(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        x = self.a(x).relu() * (1 + 0.1 * self.step)
        x = self.b(x).relu()
        self.step += 1
        return self.c(x) * (1 + 0.1 * self.step)


class CountsLateReadsEarly(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu() * (1 + 0.1 * self.step)).relu()
        self.step += 1
        return self.c(x)


class AveragesLate(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        now = x.detach().mean(0)
        if self.training:
            self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        return self.c(x if self.mean is None else x - self.mean)


class KeepsLate(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if self.training:
            self.kept.append(x.detach().mean(0))
        return self.c(x + sum(self.kept[-2:]))


class KeepsEarly(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.training:
            self.kept.append(x.detach().mean(0))
        x = x + sum(self.kept[-2:])
        return self.c(self.b(x).relu() + sum(self.kept[:1]))


class KeepsFeatures(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        self.kept.append(self.a(x).relu())
        self.kept.append(self.b(self.kept[0]).relu())
        return self.c(self.kept[0] + self.kept[1])


class CachesBySize(Attributes):
    def scale(self, x: Tensor) -> Tensor:
        if len(x) not in self.by_size:
            self.by_size[len(x)] = torch.linspace(0.5, 1.0, len(x) + 3)[:-3].unsqueeze(1)
        return self.by_size[len(x)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu() * self.scale(x).mean()
        return self.c(self.b(x).relu() * self.scale(x).mean())


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize(
    "kind",
    [
        CountsLate,
        CountsEverywhere,
        CountsLateReadsEarly,
        AveragesLate,
        KeepsLate,
        KeepsEarly,
        KeepsFeatures,
        CachesBySize,
    ],
)
def test_plain_attributes(kind: type[Attributes], num_experts: int) -> None:
    net = kind()
    model = wrapped(net, num_experts=num_experts)
    train_both(net, model, [*batches(), torch.randn(3, 6), torch.randn(5, 6)])


class MeanComesBack(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x if self.mean is None else x * self.mean).relu()
        self.mean = float(x.detach().mean())
        return self.c(x)


class KeptFromBothSides(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.training:
            self.kept.append(x.detach().mean(0))
        x = self.b(x).relu()
        if self.training:
            self.kept.append(x.detach().mean(0))
        return self.c(x + sum(self.kept[-4:]))


@pytest.mark.parametrize(("kind", "name"), [(MeanComesBack, "mean"), (KeptFromBothSides, "kept")])
def test_attributes_that_would_mix_experts_are_refused(kind: type[Attributes], name: str) -> None:
    with pytest.raises(SplitError, match=f"`{name}` keeps what"):
        wrapped(kind())


class OneNormTwice(Attributes):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.norm(self.a(x)).relu())).relu())


class LateWritesEarlyWeight(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if self.training:
            with torch.no_grad():
                self.a.weight.mul_(0.99)
        return self.c(x)


class LateReplacesEarlyBuffer(Attributes):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_buffer("last", torch.zeros(8))

    def replace(self, value: Tensor) -> None:
        self.a.last.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu() + self.a.last).relu()
        if self.training:
            self.replace(x.detach().mean(0))
        return self.c(x)


class LateWritesTheSame(LateReplacesEarlyBuffer):
    def replace(self, value: Tensor) -> None:
        self.a.last.copy_(torch.arange(8))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (OneNormTwice, "norm.running_mean"),
        (LateWritesEarlyWeight, "a.weight"),
        (LateReplacesEarlyBuffer, "a.last"),
    ],
)
def test_experts_that_write_what_the_trunk_holds_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(SplitError, match=f"after the fork writes.*`{name}`"):
        wrapped(kind())


class LateBindsEarlyBuffer(LateReplacesEarlyBuffer):
    def replace(self, value: Tensor) -> None:
        self.a.last = value


class Remembers(nn.Linear):
    mean = 1.0
    on = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.mean if self.on else 1.0)


class LateSetsEarlyNumber(Attributes):
    def __init__(self) -> None:
        super().__init__()
        self.a = Remembers(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.a.on = True
        x = self.b(self.a(x).relu()).relu()
        self.a.mean = float(x.detach().mean())
        return self.c(x)


class LateCallsEarlyMethod(LateSetsEarlyNumber):
    class Noting(Remembers):
        on = True

        def note(self, mean: float) -> None:
            self.mean = mean

    def __init__(self) -> None:
        super().__init__()
        self.a = self.Noting(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        self.a.note(float(x.detach().mean()))
        return self.c(x)


class LateSetsInsideOfEarly(Attributes):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8))
        self.a[0].seen = {"mean": 1.0}

    def early(self, x: Tensor) -> Tensor:
        return self.a(x) * self.a[0].seen["mean"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.early(x).relu()).relu()
        self.a[0].seen["mean"] = float(x.detach().mean())
        return self.c(x)


class KeptInArray(Attributes):
    def __init__(self) -> None:
        super().__init__()
        self.seen = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b((self.a(x) + float(self.seen[0])).relu()).relu()
        self.seen[0] = float(x.detach().mean())
        return self.c(x)


class Mean:
    value: Any = 0.0


class KeptInObject(Attributes):
    def __init__(self) -> None:
        super().__init__()
        self.keeper(Mean())

    def keeper(self, seen: Mean) -> None:
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        x = self.b((self.a(x) + self.seen.value).relu()).relu()
        self.seen.value = x.detach().mean(0)
        return self.c(x)


class KeptInObjectOfEarly(KeptInObject):
    def keeper(self, seen: Mean) -> None:
        self.a.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        x = self.b((self.a(x) + self.a.seen.value).relu()).relu()
        self.a.seen.value = float(x.detach().mean())
        return self.c(x)


class LateKeepsInsideOfEarly(LateSetsInsideOfEarly):
    def early(self, x: Tensor) -> Tensor:
        return self.a(x)


class LateSwitchesOff(LateSetsEarlyNumber):
    def forward(self, x: Tensor) -> Tensor:
        self.a.on = True
        x = self.b(self.a(x).relu()).relu()
        self.a.on = False
        return self.c(x)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (LateBindsEarlyBuffer, "`a.last`"),
        (LateSetsEarlyNumber, "`a.mean`"),
        (LateCallsEarlyMethod, "`a.mean`"),
        (LateSetsInsideOfEarly, "`a.0.seen`"),
        (KeptInArray, "something"),
        (KeptInObject, "something"),
        (KeptInObjectOfEarly, "`a.seen`"),
    ],
)
def test_what_experts_leave_where_the_trunk_reads_it_a_step_later_is_refused(
    kind: Any, name: str
) -> None:
    with pytest.raises(SplitError, match=f"in a second step.*leaves {name} where"):
        wrapped(kind())


@pytest.mark.parametrize("kind", [LateSwitchesOff, LateKeepsInsideOfEarly])
def test_what_no_step_reads_before_it_is_set_may_be_set_on_a_module_of_the_trunk(kind: Any) -> None:
    net = kind()
    train_both(net, wrapped(net), batches())


def test_what_every_expert_writes_alike_may_be_the_trunk_s() -> None:
    net = LateWritesTheSame()
    train_both(net, wrapped(net), batches())


class Pairs(nn.Module):
    """Two images through one encoder with BatchNorm, one after the other or both at once."""

    def __init__(self, at_once: bool = False) -> None:
        super().__init__()
        self.at_once = at_once
        self.encoder = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.at_once:
            both = self.encoder(torch.stack([a, b], dim=1).flatten(0, 1)).unflatten(0, (-1, 2))
            return self.head(both.flatten(1))
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], dim=1))


@pytest.mark.parametrize(
    ("at_once", "fork_at"), [(False, "encoder"), (False, "head"), (True, "encoder.3")]
)
def test_pairs_of_images_work_as_the_error_says(at_once: bool, fork_at: str) -> None:
    def batch(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 6), torch.randn(rows, 6)

    with pytest.raises(SplitError, match=r"earlier submodule.*a later one.*torch\.stack\(\[a, b\]"):
        RIDEWrapper(Pairs(), 3, fork_at="encoder.3", example_input=batch(2))
    net = Pairs(at_once)
    model = RIDEWrapper(net, 3, fork_at=fork_at, init="copy", example_input=batch(2))
    train_both(net, model, [(batch(5), {}) for _ in range(2)])


class ReadsAhead(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.a(x).relu(), self.b.weight)
        return self.c(self.b(x.relu()).relu())


class NormalisesAhead(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.c.weight.copy_(F.normalize(self.c.weight, dim=1))
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize(
    ("kind", "name"), [(ReadsAhead, "b.weight"), (NormalisesAhead, "c.weight")]
)
def test_a_trunk_that_computes_with_an_experts_weights_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(SplitError, match=f"uses `{name}` before the fork"):
        wrapped(kind())


class MadeAtTheFirstCall(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.linspace(0.5, 1, 8))
        return self.c(self.b(x * self.scale).relu())


def test_what_is_made_at_the_first_call_asks_for_a_call_before_wrapping() -> None:
    net = MadeAtTheFirstCall()
    with pytest.raises(SplitError, match="Run one batch through the backbone before wrapping"):
        wrapped(net)
    net(torch.randn(2, 6))
    train_both(net, wrapped(net), batches())


class InitialisesFromData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not bool(self.ready):
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.ready.fill_(True)
        return x + self.shift


@pytest.mark.parametrize("fork_at", ["2", "1"])
def test_initialisation_from_the_first_batch(fork_at: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), InitialisesFromData(), nn.Linear(8, 8), nn.Linear(8, 4))
    model = wrapped(net, fork_at)
    assert not any(bool(b) for n, b in model.named_buffers() if n.endswith("ready"))
    train_both(net, model, batches())


class DrawsWithNumpy(Attributes):
    """Manifold mixup: one share, drawn early, mixes early and late."""

    def forward(self, x: Tensor) -> Tensor:
        share = float(np.random.beta(2.0, 2.0)) if self.training else 1.0  # noqa: NPY002
        share += random.random() if self.training else 0.0
        x = self.a(x).relu()
        x = share * x + (1 - share) * x.flip(0)
        x = self.b(x).relu()
        return self.c(share * x + (1 - share) * x.flip(0))


class DrawsLate(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.c(x * (1 + self.training * float(np.random.rand())))  # noqa: NPY002


def test_every_expert_repeats_what_the_trunk_drew_with_numpy() -> None:
    net = DrawsWithNumpy()
    model = wrapped(net)
    train_both(net, model, batches(), before_each=lambda: (np.random.seed(3), random.seed(4)))  # noqa: NPY002


@pytest.mark.parametrize("kind", [DrawsWithNumpy, DrawsLate])
def test_a_build_leaves_every_random_state_as_it_is(kind: type[Attributes]) -> None:
    def states() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),  # noqa: NPY002
        ]

    net, before = kind(), states()
    wrapped(net)
    # Fresh classifiers are drawn for the experts: torch's state may move on, the others may not.
    assert states()[1:] == before[1:]
