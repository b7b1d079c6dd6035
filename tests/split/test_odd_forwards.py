"""Forwards that do something unusual with rows, caches or weights: works, or says what to do."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from ride_plugin import ReplayError, RIDEWrapper, SplitError
from tests.naive import train_both

# Copies stay equal where no classifier is found, which is told; here it is what they compute.
pytestmark = pytest.mark.filterwarnings("ignore:Experts 0 and 1 have equal weights")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)


def wrapped(net: nn.Module, **options: Any) -> RIDEWrapper:
    options = {"fork_at": "b", "init": "copy", "example_input": torch.randn(2, 6), **options}
    return RIDEWrapper(net, 3, **options)


def batches(number: int = 3) -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(number)]


class MapsRows(Base):
    where = "early"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.where == "early":
            x = torch.vmap(torch.dot)(x, x).unsqueeze(1) + x
        x = self.b(x).relu()
        if self.where == "late":
            x = torch.vmap(lambda row: self.c(row) * row.sum())(x)
            return x
        return self.c(x)


class MapsInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.dot)(x, x).unsqueeze(1) + x


def test_vmap_before_the_fork_belongs_into_a_submodule_or_behind_it() -> None:
    with pytest.raises(SplitError, match=r"`torch.vmap`.*into the forward of a submodule"):
        wrapped(MapsRows())
    net = MapsRows()
    net.where = "late"
    train_both(net, wrapped(net, num_classes=4), batches())
    net = nn.Sequential(nn.Linear(6, 8), MapsInside(), nn.Linear(8, 8), nn.Linear(8, 4))
    train_both(net, wrapped(net, fork_at="2"), batches())


class TestTimeAugmentation(Base):
    __test__ = False

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Tensor:
        if self.interleaved:
            both = torch.stack([x, x.flip(1)], dim=1).flatten(0, 1)
            return self.c(self.b(self.a(both).relu()).relu()).unflatten(0, (-1, 2)).mean(1)
        both = torch.cat([x, x.flip(1)])
        first, second = self.c(self.b(self.a(both).relu()).relu()).chunk(2)
        return (first + second) / 2


def test_augmentation_along_the_batch_keeps_the_slices_of_a_row_together() -> None:
    with pytest.raises(SplitError, match=r"several slices of each row.*torch.stack.*instead of"):
        wrapped(TestTimeAugmentation(interleaved=False), num_classes=4)
    net = TestTimeAugmentation(interleaved=True)
    train_both(net, wrapped(net, num_classes=4), batches())


class Packed(nn.Module):
    """Two recurrent layers on one packed sequence, or on two of their own."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.first, self.second = (nn.LSTM(n, 8, batch_first=True) for n in (6, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        def pack(x: Tensor) -> Any:
            return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)

        out, _ = self.first(pack(x))
        if self.inside:
            out = pack(pad_packed_sequence(out, batch_first=True)[0])
        _, (last, _) = self.second(out)
        return self.fc(last[-1])


@pytest.mark.parametrize("inside", [True, False])
def test_packed_sequences_are_forked_where_they_are_padded_again(inside: bool) -> None:
    def batch(rows: int = 4) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        return (torch.randn(rows, 5, 6), torch.tensor([5, 2, 4, 1])[:rows]), {}

    net = Packed(inside)
    with pytest.raises(SplitError, match="packed sequence has no such dimension: fork where"):
        wrapped(net, fork_at="second", example_input=batch(3)[0])
    model = wrapped(net, fork_at="fc", example_input=batch()[0])
    train_both(net, model, [batch() for _ in range(2)])


class AssignsABuffer(Base):
    """As CTRL: a table is moved to where the input is, at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.linspace(0.5, 1.0, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.table = self.table.to(x.device, x.dtype)
        return self.c(self.b(self.a(x).relu() * self.table).relu())


def test_a_buffer_that_is_assigned_to_itself() -> None:
    net = AssignsABuffer()
    model = wrapped(net)
    train_both(net, model, batches())
    train_both(net.double(), model.double(), [x.double() for x in batches()])


class RescalesInEvaluation(Base):
    """As RWKV: weights of late layers are divided before a forward, by one in a small model."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor, self.rescaled = divisor, False

    def forward(self, x: Tensor) -> Tensor:
        if self.rescaled == self.training:
            with torch.no_grad():
                self.b.weight.mul_(self.divisor if self.training else 1 / self.divisor)
            self.rescaled = not self.training
        return self.c(self.b(self.a(x).relu()).relu())


def test_an_experts_weights_are_rescaled_by_the_trunk_in_name_only() -> None:
    net = RescalesInEvaluation(1.0)
    train_both(net, wrapped(net), batches())
    with pytest.raises(SplitError, match=r"uses `b.weight` before the fork"):
        wrapped(RescalesInEvaluation(2.0))


class Cache:
    def __init__(self) -> None:
        self.steps: list[Tensor] = []


class Caching(nn.Module):
    """As a decoder: layers hand on an object that is no tensor, filled as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.use_cache = True
        self.layers = nn.ModuleList(CachingLayer(index) for index in range(4))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache() if self.use_cache else None
        for layer in self.layers:
            x = layer(x, cache)
        return self.fc(x)


class CachingLayer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(6, 6)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        if cache is not None:
            cache.steps.append(x)
            x = x + cache.steps[self.index]
        return self.linear(x).relu()


def test_a_cache_that_layers_of_the_trunk_fill_is_switched_off() -> None:
    net = Caching()
    with pytest.raises(SplitError, match=r"no tensor, a cache say .*use_cache = False"):
        wrapped(net, fork_at="layers.2")
    net.use_cache = False
    train_both(net, wrapped(net, fork_at="layers.2"), batches())


class Hooked(nn.Module):
    """Reads what a hook on one of its layers left on it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
        self.fc, self.feature = nn.Linear(6, 5), None
        self.encoder[2].register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.feature = output

    def forward(self, x: Tensor) -> Tensor:
        self.encoder(x)
        return self.fc(self.feature)


def test_what_a_hook_leaves_on_the_model_is_told_where_an_expert_misses_it() -> None:
    with pytest.raises(SplitError, match=r"a hook leaves on the model \(hand it on in the forward"):
        wrapped(Hooked(), fork_at="fc")


class Text(nn.Module):
    """Returns what each layer computed beside the logits, as with `output_hidden_states`."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.fc = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        hidden = [self.words(ids) + self.places(torch.arange(ids.shape[1]))]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]).relu())
        attentions = tuple(h @ h.transpose(1, 2) for h in hidden)
        logits = self.fc(hidden[-1].mean(1))
        return {"logits": logits, "hidden_states": tuple(hidden), "attentions": attentions}


@pytest.mark.parametrize("fork_at", ["words", "places", "layers.2"])
def test_hidden_states_beside_the_logits_and_a_fork_at_an_embedding(fork_at: str) -> None:
    net = Text()
    model = wrapped(net, fork_at=fork_at, example_input=torch.randint(0, 20, (2, 6)))
    train_both(net, model, [torch.randint(0, 20, (5, 6)) for _ in range(2)])


class Ramp(nn.Module):
    """A layer whose class keeps what a method returned, by module and size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    @functools.lru_cache  # noqa: B019
    def ramp(self, size: int) -> Tensor:
        return torch.linspace(0, 1, size) + self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ramp(x.shape[-1])


class CachesOnTheRoot(Base):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    @functools.cache  # noqa: B019
    def ramp(self, size: int) -> Tensor:
        return torch.linspace(0, 1, size) + self.b.weight.detach()[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x * self.ramp(8) if self.where == "early" else x
        x = self.b(x).relu()
        return self.c(x * self.ramp(8) if self.where == "late" else x)


def test_what_functools_keeps_for_a_module_is_each_expert_s_own() -> None:
    net = nn.Sequential(nn.Linear(6, 8), Ramp(), nn.Linear(8, 8), Ramp(), nn.Linear(8, 4))
    train_both(net, wrapped(net, fork_at="2"), batches())
    late = CachesOnTheRoot("late")
    train_both(late, wrapped(late), batches())


def test_what_functools_keeps_before_the_fork_belongs_into_an_attribute() -> None:
    net = CachesOnTheRoot("early")
    net(torch.randn(2, 6))  # fills the cache of this module, and of none of its copies
    with pytest.raises(SplitError, match=r"`CachesOnTheRoot.ramp`.*attribute of the module"):
        wrapped(net)


@functools.cache
def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size)[:, None]


class CachesOutside(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu() * ramp(x.shape[1])
        return self.c(self.b(x).relu().mean(1))


def test_a_cache_outside_of_the_modules_that_the_trunk_fills_is_named() -> None:
    model = wrapped(CachesOutside(), example_input=torch.randn(2, 5, 6), num_classes=4)
    with pytest.raises(ReplayError, match=r"cache outside of its modules.*keep it in an attribute"):
        model(torch.randn(2, 7, 6))
    assert model(torch.randn(2, 7, 6)).shape == (2, 4)


class RelatesRows(Base):
    """What it does to several rows of the batch together ends behind the fork."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        similar, chosen, early = h @ h.T, h[h.sum(1) > 0.5], h
        h = self.b(h).relu()
        if self.how == "similarity":
            h = h + similar.softmax(1) @ early
        if self.how == "mask":
            h = h + chosen.mean(0)
        if self.how == "mean" or (self.how == "mean in training" and self.training):
            h = h - h.mean(0)
        return self.c(h)


@pytest.mark.parametrize("how", ["similarity", "mask", "mean"])
def test_what_relates_rows_to_one_another_belongs_before_the_fork(how: str) -> None:
    with pytest.raises(SplitError, match=r"rows.*a later submodule, behind"):
        wrapped(RelatesRows(how))
    net = RelatesRows(how)
    train_both(net, wrapped(net, fork_at="c"), batches())


def test_what_relates_rows_to_one_another_may_stand_behind_the_fork_in_training() -> None:
    with pytest.raises(SplitError, match=r"in training only \(`if self.training:`\)"):
        wrapped(RelatesRows("mean"))
    net = RelatesRows("mean in training")
    train_both(net, wrapped(net), batches())


class Masks(nn.Module):
    """As an augmentation of spectrograms does: a mask for each row, in place, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        for row in range(len(x)):
            width = int(torch.randint(0, 3, (1,)))
            x[row, width : width + 2] = 0
        return x


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Augments(Base):
    def __init__(self, augment: nn.Module, where: str) -> None:
        super().__init__()
        self.augment, self.where = augment, where

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training and "before" in self.where:
            x = self.augment(x)
        x = self.b(x.relu()).relu()
        if self.training and "after" in self.where:
            x = self.augment(x)
        return self.c(x)


@pytest.mark.parametrize(
    ("augment", "where"),
    [
        (Masks(), "before"),
        (nn.Sequential(Halves(), Masks()), "before"),
        (Halves(), "after"),
        (Halves(), "before and after"),
    ],
)
def test_a_module_without_parameters_may_run_in_training_only(
    augment: nn.Module, where: str
) -> None:
    net = Augments(augment, where)
    model = wrapped(net)
    train_both(net, model, batches(), before_each=lambda: torch.manual_seed(3))
    x = torch.randn(5, 6)
    alone = [module.eval()(x) for module in model.to_modules()]
    torch.testing.assert_close(model.eval()(x), torch.stack(alone).mean(0))


def test_a_module_that_loops_over_rows_on_both_sides_is_refused() -> None:
    with pytest.raises(SplitError, match="another path for another batch size"):
        wrapped(Augments(Masks(), "before and after"))


class Loops(nn.Module):
    def __init__(self, linear: nn.Module, one_path: bool) -> None:
        super().__init__()
        self.linear, self.one_path = linear, one_path

    def forward(self, x: Tensor) -> Tensor:
        if self.one_path:  # but for the number of rows
            return self.linear(x).relu() * (1.5 if len(x) > 2 else 1.0)
        return torch.stack([self.linear(row).relu() for row in x])


class CountsRows(Base):
    """Does what :class:`Loops` does in its own forward."""

    def __init__(self, one_path: bool) -> None:
        super().__init__()
        self.one_path = one_path

    def forward(self, x: Tensor) -> Tensor:
        if not self.one_path:
            return self.c(self.b(torch.stack([self.a(row).relu() for row in x])).relu())
        h = self.a(x).relu()
        if len(x) > 2:
            h = h * 1.5
        return self.c(self.b(h).relu())


@pytest.mark.parametrize("one_path", [True, False])
def test_what_depends_on_the_number_of_rows_belongs_into_a_submodule(one_path: bool) -> None:
    with pytest.raises(SplitError, match=r"another batch size.*into the forward of a submodule"):
        wrapped(CountsRows(one_path))
    layers = Loops(nn.Linear(6, 8), one_path), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    net = nn.Sequential(*layers)
    train_both(net, wrapped(net, fork_at="1"), batches())


class StopsEarly(Base):
    """Leaves early where there is one sample, as networks with exits of their own do."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu() if self.inside else self.a(x).relu()
        if not self.training and len(x) == 1 and h.softmax(1).max() > 2:
            return h[:, :4]
        return self.c(h if self.inside else self.b(h * 0.5).relu())


def test_a_single_row_that_takes_another_way_than_its_batch_is_told_so() -> None:
    model = wrapped(StopsEarly(inside=False)).eval()
    state = model.run_trunk(torch.randn(5, 6))
    assert model.run_expert(1, state.select(torch.tensor([3, 0])))[0].shape == (2, 4)
    with pytest.raises(ReplayError, match=r"some of the rows.*behind the fork"):
        model.run_expert(1, state.select(torch.tensor([3])))
    model = wrapped(StopsEarly(inside=True)).eval()
    state = model.run_trunk(torch.randn(5, 6))
    assert model.run_expert(1, state.select(torch.tensor([3])))[0].shape == (1, 4)


class TakesApart(Base):
    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.inside = inside
        self.loops = Loops(self.b, False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.inside:
            return self.c(self.loops(h))
        return self.c(torch.cat([self.b(row).relu() for row in h.split(1)]))


def test_a_batch_is_taken_apart_in_a_submodule_or_behind_the_fork() -> None:
    advice = r"`split` returns before the fork holds 2 tensors.*`torch.stack`.*an earlier submodule"
    with pytest.raises(SplitError, match=advice):
        wrapped(TakesApart())
    net = TakesApart()
    train_both(net, wrapped(net, fork_at="a"), batches())
    net = TakesApart(inside=True)
    train_both(net, wrapped(net, fork_at="c"), batches())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_a_trunk_of_another_model_is_loaded_and_not_put_there(training: bool, copied: bool) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    model, other = (wrapped(net(), fork_at="2").train(training) for _ in range(2))
    own, x = model.trunk, torch.randn(5, 6)
    model.trunk = copy.deepcopy(other.trunk) if copied else other.trunk
    for call in (model, model.run_trunk, model.router_inputs):
        with pytest.raises(ReplayError, match=r"`model.trunk` is not the one.*load_state_dict"):
            call(x)
    model.trunk = own
    model.trunk.load_state_dict(other.trunk.state_dict())
    expected = torch.stack([model.experts[k][2](other.trunk[0](x).relu()) for k in range(3)], 1)
    torch.testing.assert_close(model.router_inputs(x).expert_logits, expected)


def test_augmentation_along_the_batch_is_told_in_two_steps_where_no_classifier_is_found() -> None:
    with pytest.raises(SplitError, match=r"If these are logits, pass `num_classes=4`"):
        wrapped(TestTimeAugmentation(interleaved=True))
    net = TestTimeAugmentation(interleaved=True)
    train_both(net, wrapped(net, num_classes=4), batches())


class Reentrant(Base):
    """The older checkpointing, which needs an input with a gradient."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        def early(x: Tensor) -> Tensor:
            return self.a(x).relu()

        def both(x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

        x = x.requires_grad_()
        if self.where == "across":
            return self.c(checkpoint(both, x, use_reentrant=True).relu())
        return self.c(checkpoint(self.b, checkpoint(early, x, use_reentrant=True)).relu())


@pytest.mark.parametrize("where", ["apart", "across"])
@pytest.mark.parametrize("fork_at", ["a", "b", "c"])
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint", "ignore:None of the inputs have")
@pytest.mark.filterwarnings("ignore:The backbone's forward checkpoints one region")
def test_reentrant_checkpoints_are_trained_as_the_copies_are(where: str, fork_at: str) -> None:
    net = Reentrant(where)
    train_both(net, wrapped(net, fork_at=fork_at), batches())


class Doubles(Base):
    """Runs one of its modules with other weights than it has."""

    doubled = "b"

    def forward(self, x: Tensor) -> Tensor:
        for name in "abc":
            module = self.get_submodule(name)
            other = {"weight": 2 * module.weight} if name == self.doubled else {}
            x = torch.func.functional_call(module, other, (x,)).relu()
        return x


@pytest.mark.parametrize("doubled", ["a", "c"])
def test_a_forward_runs_a_module_with_other_weights(doubled: str) -> None:
    net = Doubles()
    net.doubled = doubled
    model = wrapped(net, num_classes=4)
    train_both(net, model, batches())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert len(list(model.parameters())) == 2 + 3 * 4


class CopiesALayer(Base):
    """Perturbs a copy of a layer in each forward, as meta-learning and flat minima do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        other = copy.deepcopy(self.c).requires_grad_(False)
        other.weight.mul_(1.1)
        return self.c(x) + other(x)


class CopiesOnce(Base):
    """Makes its teacher at the first call."""

    teacher: list[nn.Module] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if self.teacher is None:
            self.teacher = [copy.deepcopy(self.c).requires_grad_(False)]
        return self.c(x) + self.teacher[0](x)


@pytest.mark.parametrize("kind", [CopiesALayer, CopiesOnce])
def test_a_forward_runs_a_copy_that_it_has_made_of_a_layer(kind: type[Base]) -> None:
    """A copy of a module has its hooks, those that look at the calls while wrapping too."""
    net = kind()
    train_both(net, wrapped(net), batches())


class CopiesEarly(Base):
    where = "a"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.where == "inside":
            x = self.inner(x)
        else:
            other = copy.deepcopy(getattr(self, self.where))
            x = x + (other(x).sum() if self.where != "a" else other(x[:, :6]))
        return self.c(self.b(x).relu())


class CopiesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + copy.deepcopy(self.layer)(x)


@pytest.mark.parametrize("where", ["a", "c", "inside"])
def test_a_copy_of_a_layer_before_the_fork_belongs_into_a_submodule(where: str) -> None:
    net = CopiesEarly()
    net.where = where
    net.inner = CopiesInside()
    if where == "inside":
        train_both(net, wrapped(net), batches())
    else:
        told = r"copies a module before the fork.*in a submodule"
        with pytest.raises((ReplayError, SplitError), match=told):
            wrapped(net)


class ReadsAttributes(Base):
    """Reads some attribute of a tensor before one that is a tensor itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        rows, grows, turned = x.shape[0], x.requires_grad, x.mT
        x = turned.mT * (1.0 if rows and grows is not None else 2.0)
        return self.c(self.b(x).relu())


def test_attributes_of_tensors_before_the_fork_are_told_apart() -> None:
    net = ReadsAttributes()
    train_both(net, wrapped(net), batches())


@pytest.mark.compiles
def test_attributes_of_tensors_are_compiled_in_one_graph() -> None:
    model = wrapped(ReadsAttributes()).eval()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.exports
def test_a_model_that_reads_attributes_is_exported() -> None:
    model, x = wrapped(ReadsAttributes()).eval(), torch.randn(5, 6)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))
