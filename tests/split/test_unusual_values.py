"""Values between modules that are no plain tensors, and hooks: each expert is a copy of its own."""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ReplayError, RIDEWrapper, SplitError, expert_logits
from ride_plugin._split._verify._hidden import _hides_tensors
from tests.naive import copies_of, train_both


class Base(nn.Module):
    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8) if first is None else first
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def wrapped(net: nn.Module, example: Any = None, **options: Any) -> RIDEWrapper:
    example = torch.randn(2, 6) if example is None else example
    options = {"fork_at": "b", "init": "copy", "num_classes": 4, **options}
    return RIDEWrapper(net, 3, example_input=example, **options)


def batches() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


def routes_rows(model: RIDEWrapper, x: Any, rows: list[int]) -> None:
    """An expert's logits of some rows are those rows of its logits."""
    chosen = torch.tensor(rows)
    with model.evaluating(), torch.no_grad():
        state = model.run_trunk(x)
        for index in range(model.num_experts):
            whole, part = (
                model.run_expert(index, each)[0] for each in (state, state.select(chosen))
            )
            torch.testing.assert_close(part, whole[chosen], rtol=1e-5, atol=1e-5)


class First(nn.Module):
    """A layer that returns its result in some container."""

    def __init__(self, put: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.put = nn.Linear(6, 8), put

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x).relu()
        return self.put(y, y.tanh())


class Empties(Base):
    """Takes the one value out before the fork and the other behind it."""

    def forward(self, x: Tensor) -> Tensor:
        values = self.a(x)
        first = values.pop("y") if isinstance(values, dict) else values.pop()
        x = self.b(first).relu()
        second = values.pop("z") if isinstance(values, dict) else values.pop()
        assert not values
        return self.c(x + second)


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda y, z: [y, z],
    "dict": lambda y, z: {"y": y, "z": z},
    "deque": lambda y, z: deque([y, z], maxlen=2),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_each_expert_empties_a_container_of_its_own(kind: str) -> None:
    net = Empties(First(CONTAINERS[kind]))
    model = wrapped(net)
    train_both(net, model, batches())
    routes_rows(model, torch.randn(5, 6), [3, 0, 0])


@dataclass
class Held:
    values: list[Tensor]
    latest: Tensor


class ChangesInside(Base):
    """Puts a new tensor where the trunk's lay, inside of what a layer returned: if told so."""

    more = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        latest, values = (out.latest, out.values) if isinstance(out, Held) else out
        h = self.b(latest)
        if self.more:
            values[-1] = values[-1] + h
            values.append(h.tanh())
            if isinstance(out, Held):
                out.latest = h
        latest = out.latest if isinstance(out, Held) else latest
        return self.c((h + latest + sum(values)).relu())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("put", [lambda y, z: (z, [y]), lambda y, z: Held([y], z)])
def test_each_expert_changes_a_list_inside_of_what_a_layer_returned(put: Any, late: bool) -> None:
    net = ChangesInside(First(put))
    net.more = not late
    model = wrapped(net)
    for each in (net, model.trunk, *model.experts):
        each.more = True  # type: ignore[assignment]
    train_both(net, model, batches())
    routes_rows(model, torch.randn(5, 6), [3, 0, 0])


class TakesBatches(Base):
    """Counts inside of what it is given, and takes out what scales."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8))

    def forward(self, batch: Any) -> Tensor:
        h = self.b(self.a(batch["x"][0]).relu())
        scale = batch.pop("scale", None)
        batch["meta"]["n"] += 1
        batch["x"][0] = batch["x"][0] + 1
        h = h * batch["meta"]["n"] + batch["x"][0].mean(1, keepdim=True)
        return self.c(h if scale is None else h * scale)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("scaled", [False, True])
def test_each_expert_changes_a_batch_of_its_own(kind: Any, scaled: bool) -> None:
    def batch(scale: bool) -> Any:
        made = kind(x=[torch.randn(5, 6)], meta={"n": 1})
        if scale:
            made["scale"] = torch.rand(5, 1)
        return made

    net, example = TakesBatches(), batch(scaled)
    model = RIDEWrapper(net, 2, fork_at="b", example_input=((example,), {}))
    assert example["meta"] == {"n": 1}
    later = [((batch(not scaled),), {}) for _ in range(2)]  # a path that is learned
    train_both(net, model, later)
    with torch.no_grad():
        model.eval()
        model(later[0][0][0])
    assert later[0][0][0]["meta"] == {"n": 1}
    assert len(later[0][0][0]["x"]) == 1


class Bag:
    def __init__(self, y: Tensor, z: Tensor) -> None:
        self.y, self.z = y, z

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.y, self.z))


def with_attribute(y: Tensor, z: Tensor) -> Tensor:
    y.gate = z  # type: ignore[attr-defined]
    return y


class Unpacks(Base):
    def forward(self, x: Tensor) -> Tensor:
        values = self.a(x)
        if isinstance(values, Tensor):
            return self.c(self.b(values).relu() * getattr(values, "gate", 1.0))
        if callable(values):
            return self.c(values(self.b(self.other(x))).relu())
        y, z = values
        return self.c(self.b(y).relu() * z)

    def other(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2)[:, :8]


class Iterates(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.stack([self.b(value) for value in self.a(x)]).sum(0).relu())


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (lambda: Unpacks(First(Bag)), "`a` returns a Bag"),
        (lambda: Unpacks(First(with_attribute)), "`a` returns a tensor with tensors as attributes"),
        (lambda: Unpacks(First(lambda y, z: lambda b: b * z)), "`a` returns a function that"),
        (lambda: Iterates(First(lambda y, z: map(torch.tanh, [y, z]))), "`a` returns a map"),
        (lambda: Iterates(First(lambda y, z: (v for v in (y, z)))), "`a` returns a generator"),
    ],
    ids=["object", "attribute", "function", "map", "generator"],
)
def test_tensors_out_of_sight_are_named(net: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(SplitError, match=rf"{named}.*tuple, list, dict or dataclass"):
        wrapped(net())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
        y = self.linear(x)
        return y.relu(), 3, y.tanh()


class TakesAPair(Base):
    def __init__(self) -> None:
        super().__init__(Pair())
        self.stem = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, _, z = self.a(self.stem(x))
        return self.c(self.b(y).relu() + z)


def halve(module: nn.Module, given: Any, taken: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else 0.5 * gradient for gradient in given)


def triple_first(module: nn.Module, gradients: Any) -> tuple[Tensor | None, ...]:
    return (3 * gradients[0], *gradients[1:])


# A hook on a layer whose input requires no gradient makes torch warn.
ignored = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@ignored
@pytest.mark.parametrize("kind", [Base, TakesAPair])
@pytest.mark.parametrize("on_root", [False, True])
def test_full_backward_hooks_act_on_trunk_and_experts(kind: type[Base], on_root: bool) -> None:
    net = kind()
    for module in [net] if on_root else [net.a, net.b, net.c]:
        module.register_full_backward_hook(halve)
        module.register_full_backward_pre_hook(triple_first)
    train_both(net, wrapped(net), batches())


@ignored
@pytest.mark.parametrize("before", [False, True])
def test_a_backward_hook_for_all_modules_that_there_are_hears_each_layer_once(before: bool) -> None:
    model = wrapped(Base())
    # A hook on the model itself rebuilds its output, so the experts' logits are returned.
    model.return_experts = "training"
    register = (
        torch.nn.modules.module.register_module_full_backward_pre_hook
        if before
        else torch.nn.modules.module.register_module_full_backward_hook
    )
    x, heard = torch.randn(5, 6), []

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).expert_logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    handle = register(lambda module, *_: heard.append(module))
    try:
        torch.testing.assert_close(gradients(), expected)
    finally:
        handle.remove()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(sum(m is layer for m in heard) == 1 for layer in layers)


@ignored
def test_a_full_backward_hook_of_the_trunk_runs_once_and_gets_the_sum_of_the_experts() -> None:
    model, seen = wrapped(Base()), []
    model.trunk.a.register_full_backward_hook(lambda m, given, taken: seen.append(taken[0]))
    x = torch.randn(5, 6)
    expected = []

    def expect(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(expected.append)

    model.trunk.a.register_forward_hook(expect)
    model(x).sum().backward()
    assert len(seen) == len(expected) == 1
    torch.testing.assert_close(seen[0], expected[0])


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class ReversesAView(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(Reverse.apply(self.b(Reverse.apply(self.a(x))).relu()))


@ignored
def test_a_view_of_itself_that_no_hook_makes_is_glue_as_any_other() -> None:
    net = ReversesAView()
    train_both(net, wrapped(net), batches())
    net.a.register_full_backward_hook(halve)
    train_both(net, wrapped(net), batches())


class Bank(nn.Module):
    """Layers that hand tensors on in a dict that all of them hold."""

    def __init__(self, bank: dict[str, Tensor], write: bool) -> None:
        super().__init__()
        self.bank, self.write = bank, write

    def forward(self, x: Tensor) -> Tensor:
        if self.write:
            self.bank["skip"] = x
            return x
        return x + self.bank["skip"]


class SharesADict(Base):
    def __init__(self) -> None:
        super().__init__()
        bank: dict[str, Tensor] = {}
        self.writes, self.reads = Bank(bank, True), Bank(bank, False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.writes(self.a(x).relu())
        return self.c(self.reads(self.b(x).relu()))


def test_copies_for_a_pass_share_the_dict_that_the_modules_share() -> None:
    net = SharesADict()
    for fork_at in ("a", "writes"):
        train_both(net, wrapped(net, fork_at=fork_at), batches())
    with pytest.raises(SplitError, match="something of its early part that is no tensor"):
        wrapped(net)


class ReadsWhatAHookKept(Base):
    def __init__(self) -> None:
        super().__init__()
        kept: dict[str, Tensor] = {}
        self.kept = kept
        self.a.register_forward_hook(lambda module, args, out: kept.update(a=out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.c(x + self.kept["a"])


def test_a_hook_that_fills_what_the_backbone_keeps_is_named() -> None:
    with pytest.raises(SplitError, match=r"a forward hook of `a`.*captured `kept`"):
        wrapped(ReadsWhatAHookKept())


class BagOfWords(Base):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.weight, self.again = nn.Parameter(torch.randn(6, 8)), again

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.sparse.mm(x, self.weight).relu()).relu()
        return self.c(y + torch.sparse.mm(x, self.weight) if self.again else y)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("again", [False, True])
def test_sparse_batches_are_split_trained_and_routed(layout: torch.layout, again: bool) -> None:
    def batch() -> Tensor:
        return (torch.randn(5, 6) * (torch.rand(5, 6) > 0.5)).to_sparse(layout=layout)

    net = BagOfWords(again)
    model = wrapped(net, batch())
    x = batch()
    expected = torch.stack([each.eval()(x) for each in copies_of(net, model)], 1)
    torch.testing.assert_close(model.router_inputs(x).expert_logits, expected.detach())
    routes_rows(model, x, [4, 1])
    if layout is torch.sparse_coo:  # torch cannot deepcopy the other
        train_both(net, model, [batch() for _ in range(2)])


class MixesByASparseMatrix(Base):
    """The columns of the features are joints of a skeleton, say, and a buffer says which touch."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        touch = (torch.rand(8, 8) > 0.5).float()
        self.register_buffer("touch", touch.to_sparse(layout=layout))

    def mixed(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.touch, x.T).T

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.mixed(self.b(self.mixed(self.a(x).relu())).relu()))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_on_both_sides_of_the_fork(layout: torch.layout) -> None:
    net = MixesByASparseMatrix(layout)
    model, x = wrapped(net), torch.randn(5, 6)
    # Of the other layout torch makes no deep copies.
    plain = copies_of(net, model) if layout is torch.sparse_coo else model.to_modules()
    expected = torch.stack([each.eval()(x) for each in plain], 1)
    torch.testing.assert_close(model.router_inputs(x).expert_logits, expected.detach())
    routes_rows(model, x, [4, 1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_batch_is_to_be_padded(layout: torch.layout) -> None:
    example = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 3)], layout=layout)
    with pytest.raises(ArgumentError, match=r"nested tensor.*to_padded_tensor"):
        wrapped(Base(), example)


class Ragged(nn.Module):
    """Sequences of several lengths in a nested tensor, which does not leave the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = [row[: 1 + number % 3] for number, row in enumerate(x)]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return torch.stack([row.mean(0) for row in self.layer(nested).unbind()])


@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype:UserWarning")
def test_nested_tensors_may_be_used_inside_a_submodule() -> None:
    net = nn.Sequential(Ragged(), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    model = wrapped(net, torch.randn(2, 3, 6), fork_at="2")
    train_both(net, model, [torch.randn(5, 3, 6) for _ in range(2)])


class AsksForTheType(Base):
    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            if type(module) is nn.Linear:
                x = module(x).relu()
        return x


def test_a_forward_that_asks_for_the_type_of_a_submodule_is_told() -> None:
    with pytest.raises(ReplayError, match=r"`type\(submodule\)`.*isinstance"):
        wrapped(AsksForTheType())


class HooksOnTensors(Base):
    """Scales gradients by hooks: of a tensor before the fork, of it or another one behind."""

    def __init__(self, late_on_trunk: bool) -> None:
        super().__init__()
        self.late_on_trunk = late_on_trunk

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if x.requires_grad:
            x.register_hook(lambda gradient: 0.5 * gradient)
        y = self.b(x).relu()
        if y.requires_grad:
            (x if self.late_on_trunk else y).register_hook(lambda gradient: 0.3 * gradient)
        return self.c(y + x)


def test_hooks_behind_the_fork_on_a_tensor_of_the_trunk_get_each_expert_s_share() -> None:
    net = HooksOnTensors(late_on_trunk=True)
    train_both(net, wrapped(net), batches())


@pytest.mark.parametrize("name", ["trunk.a", "experts.1.b", "experts.1.c", "experts.0.b"])
@pytest.mark.parametrize("how", ["copy", "new"])
def test_a_module_that_was_replaced_after_wrapping_is_watched_as_before(
    name: str, how: str
) -> None:
    """A copy brings hooks along, which act on nothing; a new module has none."""
    net = HooksOnTensors(late_on_trunk=False)
    model = wrapped(net)
    expected = model.router_inputs(torch.ones(5, 6))
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = copy.deepcopy(old) if how == "copy" else nn.Linear(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.set_submodule(name, new)
    got = model.router_inputs(torch.ones(5, 6))
    torch.testing.assert_close(got, expected)
    train_both(net, model, batches())
    routes_rows(model, torch.randn(5, 6), [2, 0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_derivatives_are_those_of_the_copies() -> None:
    net = Base()
    model = wrapped(net).eval()
    copies, x, direction = copies_of(net, model), torch.randn(5, 6), torch.randn(5, 6)
    for call, plain in (
        (lambda x: expert_logits(model(x)), lambda x: torch.stack([c(x) for c in copies], 1)),
        (model, lambda x: torch.stack([c(x) for c in copies], 1).mean(1)),
    ):
        got, expected = (torch.func.jvp(f, (x,), (direction,)) for f in (call, plain))
        torch.testing.assert_close(got, expected)
    of_one = {"experts.1.c.bias": torch.ones(4)}
    bias = {"experts.1.c.bias": model.experts[1].c.bias}

    def of_bias(bias: dict[str, Tensor]) -> Tensor:
        return expert_logits(torch.func.functional_call(model, bias, (x,)))

    _, tangent = torch.func.jvp(of_bias, (bias,), (of_one,))
    assert torch.equal(tangent, torch.tensor([0.0, 1, 0])[:, None].expand(5, 3, 4))


def test_what_a_function_captured_is_looked_at_where_a_variable_was_never_set() -> None:
    def function(tensor: Tensor | None, late: bool) -> Callable[[], object]:
        if late:
            unset = 1

        def inner() -> object:
            return tensor, unset

        return inner

    assert _hides_tensors(function(None, late=False)) is None
    assert _hides_tensors(function(torch.ones(1), late=False)) is not None


class Encodes(nn.Module):
    """torch's own encoder as it is made by default: in evaluation it packs rows that are padded."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.encoder = (
            nn.Embedding(9, 8, padding_idx=0),
            nn.TransformerEncoder(layer, 3),
        )
        self.head = nn.Linear(8, 4)
        self.pooled = pooled

    def forward(self, ids: Tensor) -> Tensor:
        h = self.encoder(self.embed(ids), src_key_padding_mask=ids == 0)
        return self.head(h.mean(1) if self.pooled else h[:, 0])


def padded() -> Tensor:
    ids = torch.randint(1, 9, (5, 4))
    ids[1, 3:] = ids[2, 2:] = ids[3, 1:] = 0
    return ids


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fork_at", [None, "embed", "encoder", "encoder.layers.1", "head"])
def test_torchs_own_encoder_takes_a_padding_mask(fork_at: str | None) -> None:
    net, ids = Encodes(pooled=False), padded()
    model = wrapped(net, ids, fork_at=fork_at)
    assert fork_at is not None or model.fork_at == "encoder.layers.2"
    with model.evaluating(), torch.no_grad():
        expected = torch.stack([each.eval()(ids) for each in copies_of(net, model)], dim=1)
        torch.testing.assert_close(expert_logits(model(ids)), expected, rtol=1e-5, atol=1e-5)
    routes_rows(model, ids, [3, 0])
    train_both(net, model, [ids, ids])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("given", [slice(0, 5), slice(1, 2), slice(1, 3), slice(3, 5)])
def test_logits_that_hang_on_the_padding_of_an_encoder_are_refused_between_its_layers(
    given: slice,
) -> None:
    net, ids = Encodes(pooled=True), padded()
    with pytest.raises(SplitError, match=r"`encoder`.*padded positions.*'encoder'"):
        wrapped(net, ids[given], fork_at=None)
    model = wrapped(net, ids, fork_at="encoder").eval()
    with torch.no_grad():
        expected = copies_of(net, model)[1].eval()(ids)
        torch.testing.assert_close(expert_logits(model(ids))[:, 1], expected)
