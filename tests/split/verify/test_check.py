"""What the self-check of a build compares beside the logits: the trunk alone, and whole outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, RIDEWrapper, SplitError
from tests.naive import copies_of, train_both

X = torch.randn(5, 6)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), Inner(), nn.Linear(8, 4)

    def number(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu() / self.number()).relu())


class Linears(Base):
    def number(self) -> int:
        return len([m for m in self.modules() if isinstance(m, nn.Linear)])


class Parameters(Base):
    def number(self) -> int:
        return len(list(self.parameters()))


class Names(Base):
    def number(self) -> int:
        return len(list(self.named_modules()))


class OfAPart(Base):
    def number(self) -> int:
        return len(list(self.b.modules()))


@pytest.mark.parametrize("net", [Linears, Parameters, Names, OfAPart])
def test_a_trunk_that_looks_through_the_backbone_is_refused(net: type[Base]) -> None:
    with pytest.raises(SplitError, match=r"stops at the fork.*in what `div` returns.*`__init__`"):
        RIDEWrapper(net(), 2, fork_at="b", example_input=X)


def test_what_is_counted_at_the_start_works_as_the_error_says() -> None:
    class Kept(Parameters):
        def __init__(self) -> None:
            super().__init__()
            self.count = super().number()

        def number(self) -> int:
            return self.count

    backbone = Kept()
    train_both(backbone, RIDEWrapper(backbone, 2, fork_at="b", example_input=X), [X, X])


class AlwaysOn(Base):
    """Dropout in evaluation too, behind the fork or before it."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = h if self.late else nn.functional.dropout(h, training=True)
        h = self.b(h)
        return self.c(nn.functional.dropout(h, training=True) if self.late else h)


class RowsMean(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        return self.c(h - h.mean(0))


def test_a_forward_that_draws_in_evaluation_is_told_from_one_that_looks_at_other_rows() -> None:
    with pytest.raises(SplitError, match=r"draws random numbers in evaluation.*self\.training"):
        RIDEWrapper(AlwaysOn(late=True), 2, fork_at="b", example_input=X)
    with pytest.raises(SplitError, match=r"depends on the rows that come with it"):
        RIDEWrapper(RowsMean(), 2, fork_at="b", example_input=X)
    RIDEWrapper(AlwaysOn(late=True), 2, fork_at="c", example_input=X)
    RIDEWrapper(AlwaysOn(late=False), 2, fork_at="b", example_input=X)


def test_draws_on_both_sides_of_the_fork_are_named_though_no_row_depends_on_others() -> None:
    class Columns(Base):
        """Columns chosen at random, the same ones for all rows, as sampled attention has them."""

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            h = self.b(h + h[:, torch.randperm(h.shape[1])[:1]])
            return self.c(h + h[:, torch.randperm(h.shape[1])[:1]])

    for seed in range(12):  # in some of them the second draw of the random state changes nothing
        torch.manual_seed(seed)
        with pytest.raises(SplitError, match="draws random numbers in evaluation"):
            RIDEWrapper(Columns(), 2, fork_at="b", example_input=X)


class Mixture(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux = y.pow(2).mean()
        return y


class Auxiliary(nn.Module):
    """Returns a term of all of its layers beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Mixture(6, 8), Mixture(8, 8), nn.Linear(8, 4)

    def beside(self, early: Tensor, late: Tensor) -> Any:
        return sum(m.aux for m in self.modules() if type(m) is Mixture)

    def forward(self, x: Tensor) -> dict[str, Any]:
        early = self.a(x)
        late = self.b(early.relu())
        return {"logits": self.c(late.relu()), "beside": self.beside(early, late)}


class Hidden(Auxiliary):
    def beside(self, early: Tensor, late: Tensor) -> Any:
        return [m.aux for m in self.modules() if type(m) is Mixture]


class OfWhatModulesReturn(Auxiliary):
    def beside(self, early: Tensor, late: Tensor) -> Any:
        return [early, early.pow(2).mean() + late.pow(2).mean()]


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (Auxiliary, r"another output\['beside'\]"),
        (Hidden, r"2 tensors instead of 3.*output\['beside'\]\[1\]"),
    ],
)
def test_whole_outputs_that_lack_the_trunk_are_not_handed_out(
    net: type[Auxiliary], named: str
) -> None:
    with pytest.raises(ArgumentError, match=rf"`return_experts`.*{named}"):
        RIDEWrapper(net(), 2, fork_at="b", example_input=X, return_experts="outputs")
    model = RIDEWrapper(net(), 2, fork_at="b", example_input=X)
    with pytest.raises(ArgumentError, match=rf"`return_experts`.*{named}"):
        model.return_experts = "outputs"
    assert model.return_experts is False


def test_whole_outputs_are_those_of_the_copies() -> None:
    backbone = OfWhatModulesReturn()
    model = RIDEWrapper(backbone, 2, fork_at="b", example_input=X, return_experts="outputs")
    for got, copied in zip(model(X), copies_of(backbone, model), strict=True):
        torch.testing.assert_close(got, copied(X))


class Keeps(nn.Linear):
    """Keeps a term on itself, or returns it."""

    def __init__(self, returns: bool) -> None:
        super().__init__(8, 8)
        self.returns, self.term = returns, None

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        if self.returns:
            return y, y.pow(2).mean()
        self.term = y.pow(2).mean()
        return y


class AddsUp(nn.Module):
    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Keeps(returns) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        terms = []
        for layer in self.layers:
            x = layer(x)
            x, term = x if layer.returns else (x, None)
            terms.append(term)
            x = x.relu()
        logits = self.head(x)
        kept = [
            term if layer.returns else layer.term
            for layer, term in zip(self.layers, terms, strict=True)
        ]
        return logits, sum(kept)


def test_terms_that_layers_of_the_trunk_keep_are_to_be_returned() -> None:
    x = torch.randn(5, 8)
    with pytest.raises(SplitError, match=r"themselves, `layers\.0\.term`, which.*return them"):
        RIDEWrapper(AddsUp(False), 2, fork_at="layers.1", logits=0, example_input=x)
    net = AddsUp(True)
    model = RIDEWrapper(
        net, 2, fork_at="layers.1", logits=0, example_input=x, return_experts="outputs"
    )
    for got, copied in zip(model(x), copies_of(net, model), strict=True):
        torch.testing.assert_close(got, copied(x))


class SeedsAnew(Base):
    """Draws a seed from the system and sets it, as reversible layers do to drop the same again."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        if self.training:
            torch.manual_seed(torch.seed() % 2**31)
        return self.c(nn.functional.dropout(h, self.rate, self.training))


def test_a_backbone_that_differs_from_itself_is_told_so() -> None:
    told = r"training mode.*the backbone's own in a second pass.*`torch.seed\(\)`.*probability 0"
    with pytest.raises(SplitError, match=told):
        RIDEWrapper(SeedsAnew(0.3), 2, fork_at="b", example_input=X)
    net = SeedsAnew(0.0)
    train_both(net, RIDEWrapper(net, 2, fork_at="b", example_input=X), [X, X])
