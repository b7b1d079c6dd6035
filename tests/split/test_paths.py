"""A call unlike the example: other arguments, masks and flags, in training and routed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ReplayError,
    RIDEWrapper,
    RoutingInference,
    SplitError,
    expert_logits,
)
from tests.naive import copies_of, train_both

X, MASK, ROW, VECTOR = torch.randn(6, 6), torch.rand(6, 8), torch.rand(1, 8), torch.rand(8)


class WithOptions(nn.Module):
    """What arguments decide behind the fork leaves no trace before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.adds = False

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        skip: bool = False,
        mode: str = "plain",
        steps: int = 0,
    ) -> Tensor:
        h = self.a(x).relu()
        early = h * 2
        out = self.b(h)
        if skip:
            out = out + early
        if mode == "twice":
            h += 1
            out = out + h
        if self.adds:
            h += 1
        if steps:
            h += 1
            out = out + h + steps * early
        if mask is not None:
            out = out * mask
        if bias is not None:
            out = out + bias
        return self.fc(out)


CALLS: dict[str, tuple[Any, Any]] = {
    "a mask more": (((X,), {}), ((X, MASK), {})),
    "a mask less": (((X, MASK), {}), ((X,), {})),
    "another argument": (((X,), {"mask": MASK}), ((X,), {"bias": MASK})),
    "one mask for all rows": (((X, MASK), {}), ((X, ROW), {})),
    "a mask for each row": (((X, ROW), {}), ((X, MASK), {})),
    "a mask without rows": (((X, MASK), {}), ((X, VECTOR), {})),
    "a mask with rows": (((X, VECTOR), {}), ((X, MASK), {})),
    "another order": (((), {"x": X, "mask": VECTOR}), ((), {"mask": VECTOR, "x": X})),
    "a flag": (((X,), {}), ((X,), {"skip": True})),
    "a flag less": (((X,), {"skip": True}), ((X,), {})),
    "a word": (((X,), {}), ((X,), {"mode": "twice"})),
    "a number": (((X,), {"steps": 0}), ((X,), {"steps": 3})),
    "a flag in its place": (((X, None, None, False), {}), ((X, None, None, True), {})),
}


def wrap(example: Any) -> tuple[RIDEWrapper, list[nn.Module]]:
    args, kwargs = example
    few = tuple(_two(a) for a in args), {key: _two(value) for key, value in kwargs.items()}
    backbone = WithOptions()
    model = RIDEWrapper(backbone, 3, fork_at="b", example_input=few)
    return model, copies_of(backbone, model)


def _two(value: Any) -> Any:
    rows = isinstance(value, Tensor) and value.shape[0] == len(X)
    return value[:2] if rows else value


@pytest.mark.parametrize("case", CALLS)
def test_training_computes_what_the_copies_compute(case: str) -> None:
    check_training(case, lambda model: model)


@pytest.mark.compiles
@pytest.mark.parametrize("case", ["a mask more", "a word"])
def test_compiled_it_computes_what_the_copies_compute(case: str) -> None:
    check_training(case, lambda model: torch.compile(model, backend="eager"))


def check_training(case: str, made: Callable[[nn.Module], Any]) -> None:
    example, (args, kwargs) = CALLS[case]
    model, copies = wrap(example)
    call = made(model)
    for _ in range(2):
        got = expert_logits(call(*args, **kwargs))
        for index, each in enumerate(copies):
            torch.testing.assert_close(got[:, index], each(*args, **kwargs))


@pytest.mark.parametrize("case", CALLS)
def test_evaluation_and_every_choice_of_rows_are_those_of_the_copies(case: str) -> None:
    example, (args, kwargs) = CALLS[case]
    model, copies = wrap(example)
    model.eval()
    with torch.no_grad():
        wanted = torch.stack([each(*args, **kwargs) for each in copies], dim=1)
        torch.testing.assert_close(expert_logits(model(*args, **kwargs)), wanted)
        state = model.run_trunk(*args, **kwargs)
        for rows in ([3], [5, 1], [0, 2, 4, 5]):
            some = state.select(torch.tensor(rows))
            for index in range(3):
                torch.testing.assert_close(model.run_expert(index, some)[0], wanted[rows, index])
        routed = RoutingInference(model, ConfidenceRouter(), 0.3)
        out = routed(*args, return_routing=True, **kwargs)
        for row, used in enumerate(out.num_experts_used.tolist()):
            torch.testing.assert_close(out.logits[row], wanted[row, :used].mean(0))


def test_states_of_calls_that_differ_are_not_joined() -> None:
    model, _ = wrap(CALLS["a flag"][0])
    model.eval()
    states = [model.run_trunk(X), model.run_trunk(X, skip=True)]
    with pytest.raises(ValueError, match="one path through the backbone"):
        type(states[0]).cat(states)


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_that_begins_to_change_what_others_read_is_told(training: bool) -> None:
    model, _ = wrap(CALLS["a flag"][0])
    model.train(training)
    for part in (model.trunk, *model.experts):
        part.adds = True
    with pytest.raises(ReplayError, match=r"in place what `relu` returned.*example_input="):
        model(X)


def test_a_flag_in_a_dict_of_inputs_is_a_part_of_the_path() -> None:
    class Batches(WithOptions):
        def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
            return super().forward(**batch)

    example = {"x": X[:2], "skip": False}
    model = RIDEWrapper(Batches(), 2, fork_at="b", example_input=(example,)).eval()
    batch = {"x": X, "skip": True}
    with torch.no_grad():
        each = [model.to_module(k)(batch) for k in range(2)]
        torch.testing.assert_close(model(batch), torch.stack(each).mean(0))


def set_flag(model: RIDEWrapper, value: bool) -> None:
    for part in (model.trunk, *model.experts):
        part.always = value


class Reads(WithOptions):
    """An attribute decides whether what was computed before the fork is read behind it."""

    always = False

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:  # type: ignore[override]
        return super().forward(x, skip=self.always or skip)


def read_by_attribute() -> tuple[RIDEWrapper, list[nn.Module]]:
    """A model of which an attribute was set after wrapping, and its copies."""
    backbone = Reads()
    model = RIDEWrapper(backbone, 3, fork_at="b", example_input=X[:2])
    copies = copies_of(backbone, model)
    set_flag(model, True)
    for each in copies:
        each.always = True
    return model, copies


UNREAD = r"what `mul` returned before the fork.*Set it before wrapping"


def test_a_value_that_an_attribute_lets_experts_read_later_is_told_in_evaluation() -> None:
    model, _ = read_by_attribute()
    model.eval()
    state = model.run_trunk(X)
    with pytest.raises(ReplayError, match=UNREAD):
        model(X)
    for each in (state, state.select(torch.tensor([1, 4])), pickle.loads(pickle.dumps(state))):
        with pytest.raises(ReplayError, match=UNREAD):
            model.run_expert(0, each)
    with pytest.raises(ReplayError, match=UNREAD):
        RoutingInference(model, ConfidenceRouter(), 0.3)(X)
    set_flag(model, False)
    assert model.run_expert(0, state)[0].isfinite().all()


@pytest.mark.exports
def test_stages_are_not_exported_of_values_that_were_dropped() -> None:
    model, _ = read_by_attribute()
    with pytest.raises(ReplayError, match=UNREAD):
        RoutingInference(model, ConfidenceRouter(), 0.3).export_stages()


def test_a_value_that_an_attribute_lets_experts_read_later_is_there_in_training() -> None:
    model, copies = read_by_attribute()
    wanted = torch.stack([each(X) for each in copies], dim=1)
    torch.testing.assert_close(expert_logits(model(X)), wanted)


@pytest.mark.compiles
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_keeps_what_it_reads(training: bool) -> None:
    model, copies = read_by_attribute()
    model.train(training)
    wanted = torch.stack([each.train(training)(X) for each in copies], dim=1)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(expert_logits(compiled(X)), wanted)


@pytest.mark.compiles
def test_a_compiled_model_is_told_that_a_state_lacks_what_it_reads() -> None:
    model, _ = read_by_attribute()
    model.eval()
    set_flag(model, False)
    with torch.no_grad():
        state = model.run_trunk(X)
        whole = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(state), model(X))
        set_flag(model, True)
        with pytest.raises(RuntimeError, match=UNREAD):  # the compiler's, which quotes ours
            torch.compile(model, backend="eager")(state)


def test_an_attribute_set_before_wrapping_or_an_argument_works_as_the_error_says() -> None:
    model, copies = read_by_attribute()
    model.eval()
    wanted = torch.stack([each(X) for each in copies], dim=1)
    backbone = Reads()
    backbone.always = True
    anew = RIDEWrapper(backbone, 3, fork_at="b", example_input=X[:2]).eval()
    anew.load_state_dict(model.state_dict())
    torch.testing.assert_close(expert_logits(anew(X)), wanted)
    set_flag(model, False)
    torch.testing.assert_close(expert_logits(model(X, skip=True)), wanted)


class AsksForShapes(WithOptions):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        early = self.a(x).relu()
        early, other = early * 2, early
        out = self.b(other)
        assert isinstance(early, Tensor)
        assert (early.dtype, early.dim()) == (out.dtype, 2)
        assert len(early) == early.size(0)
        return self.fc(out.view(early.shape)) / early.shape[1]


def test_the_shape_of_a_value_that_was_dropped_may_be_asked_for() -> None:
    backbone = AsksForShapes()
    model = RIDEWrapper(backbone, 3, fork_at="b", example_input=X[:2], num_classes=5).eval()
    wanted = torch.stack([each(X) for each in copies_of(backbone, model)], dim=1)
    torch.testing.assert_close(expert_logits(model(X)), wanted)


def test_a_hook_of_an_expert_may_change_what_was_dropped_but_not_look_at_it() -> None:
    backbone = WithOptions()
    model = RIDEWrapper(backbone, 3, fork_at="b", example_input=X[:2]).eval()
    wanted = expert_logits(model(X))
    model.experts[1].register_forward_pre_hook(lambda module, args: (args[0] + 0, *args[1:]))
    torch.testing.assert_close(expert_logits(model(X)), wanted)
    model.experts[2].register_forward_pre_hook(lambda module, args: print(args[0].sum().item()))
    with pytest.raises(ReplayError, match="reads an argument"):
        model(X)


class Trims(nn.Module):
    """Cuts padding off up to the longest row of a batch, before the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        hidden = self.b(self.a(x[:, :longest]).relu()).relu()
        mask = (torch.arange(longest) < lengths[:, None]).float()
        return self.fc((hidden * mask[..., None]).sum(1) / lengths[:, None])


def test_rows_are_chosen_where_a_batch_is_cut_to_its_longest_row() -> None:
    x, lengths = torch.randn(8, 7, 6), torch.tensor([3, 4, 5, 6, 7, 3, 4, 5])
    model = RIDEWrapper(Trims(), 2, fork_at="b", example_input={"x": x, "lengths": lengths})
    with model.evaluating(), torch.no_grad():
        expected = model(x=x, lengths=lengths)
        state = model.run_trunk(x, lengths)  # by position, which the build has not seen
        for rows in (torch.tensor([0, 5]), torch.tensor([4, 1, 2])):
            torch.testing.assert_close(model(state.select(rows)), expected[rows])


_collecting: list[list[Tensor]] = [[]]  # as transformers does, outside of any module


def _collect(module: nn.Module, args: Any, output: Tensor) -> None:
    _collecting[-1].append(output)


class Layer(nn.Linear):
    """Found by its class."""


class Collecting(nn.Module):
    """Returns what all layers returned where a call asks for it, by hooks of its first time."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(Layer(8, 8) for _ in range(3))
        self.fc = nn.Linear(8, 5)
        self.has_hooks = False
        self.looks = looks  # at values, so that it does not run without them

    def forward(self, x: Tensor, states: bool = False) -> dict[str, Any]:
        if states and not self.has_hooks:
            for module in self.modules():
                if type(module) is Layer:
                    module.register_forward_hook(_collect)
            self.has_hooks = True
        _collecting.append([])
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h).relu()
        collected = _collecting.pop()
        if self.looks and bool(h.sum() > 1e9):
            h = h * 2
        return {"logits": self.fc(h)} | ({"states": collected} if states else {})


@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("fork_at", ["layers.1", "fc"])
def test_whole_outputs_that_lack_the_trunk_on_a_later_path_are_refused(
    num_experts: int, looks: bool, fork_at: str
) -> None:
    model = RIDEWrapper(Collecting(looks), num_experts, fork_at=fork_at, example_input=X).train()
    if num_experts > 1:
        model(X, states=True)  # the path is known before somebody asks for whole outputs
    model.return_experts = "outputs"
    assert len(model(X)) == num_experts
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"`return_experts`.*for these arguments, but"):
            model(X, states=True)
    assert [list(output) for output in model(X)] == [["logits"]] * num_experts


@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.parametrize("looks", [False, True])
def test_whole_outputs_on_a_later_path_are_those_of_the_copies(
    num_experts: int, looks: bool
) -> None:
    backbone = Collecting(looks)
    model = RIDEWrapper(
        backbone, num_experts, fork_at="layers.0", example_input=X, return_experts="outputs"
    ).train()
    seen: list[Tensor] = []
    model.experts[0].fc.register_forward_hook(lambda module, args, out: seen.append(out))
    model(X)
    for _ in range(2):
        outputs = model(X, states=True)
        for got, copied in zip(outputs, copies_of(backbone, model), strict=True):
            torch.testing.assert_close(got, copied(X, states=True))
            assert len(got["states"]) == 3
    assert len(seen) == 3  # an observer sees no pass that is thrown away


class Grid(nn.Linear):
    """Moves a buffer to where its inputs lie, when it is told to: by a call of its own, or not."""

    def __init__(self, outputs: int) -> None:
        super().__init__(8, outputs)
        self.register_buffer("grid", torch.zeros(8))

    def move(self, x: Tensor) -> None:
        with torch.no_grad():
            self.grid.lerp_(x.mean(0), 0.5)

    def forward(self, x: Tensor, moves: bool = False) -> Tensor:
        if moves:
            self.move(x)
        return super().forward((x - self.grid).tanh())


class Grids(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layers = how, nn.ModuleList(Grid(n) for n in (8, 8, 5))

    def forward(self, x: Tensor, moves: bool = False) -> Tensor:
        if self.how == "reads" and moves:
            x = x * self.layers[2].weight.norm()
        first = x
        for layer in self.layers:
            if self.how == "calls" and moves:
                layer.move(x)
            x = layer(x, moves and self.how == "in the forward")
        if self.how == "calls late" and moves:
            self.layers[0].move(first)
        if self.how == "notes" and moves:
            self.layers[0].grid.zero_()
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("calls", r"`layers\.1\.grid` before the fork.*the module that holds"),
        ("reads", r"`layers\.2\.weight` before the fork.*the module that holds"),
        ("calls late", r"after the fork writes `layers\.0\.grid`, which the trunk holds"),
    ],
)
def test_a_call_on_which_one_side_of_the_fork_uses_what_the_other_owns_is_refused(
    how: str, told: str, training: bool
) -> None:
    x = torch.randn(6, 8)
    model = RIDEWrapper(Grids(how), 3, fork_at="layers.1", example_input=x).train(training)
    model(x)
    for call in (model, model.run_trunk):
        with pytest.raises(ReplayError, match=told):
            call(x, moves=True)
    model(x)
    with pytest.raises(SplitError, match=told):
        RIDEWrapper(Grids(how), 3, fork_at="layers.1", example_input=(x, True))


def test_what_comes_to_the_same_however_often_it_is_written_is_no_matter() -> None:
    x, net = torch.randn(6, 8), Grids("notes")
    model = RIDEWrapper(net, 3, fork_at="layers.1", example_input=x)
    train_both(net, model, [((x,), {"moves": moves}) for moves in (False, True, False)])


def test_what_experts_own_is_used_in_the_forward_of_its_module_as_errors_say() -> None:
    x, net = torch.randn(6, 8), Grids("in the forward")
    model = RIDEWrapper(net, 3, fork_at="layers.1", example_input=x)
    train_both(net, model, [((x,), {"moves": moves}) for moves in (False, True, False)])
    grids = [expert.get_submodule("layers.2").grid for expert in model.experts]
    assert not torch.equal(grids[0], grids[1])


class HandsOn(nn.Module):
    """Returns what it computed early, where a flag asks for it; nothing late reads that."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, states: bool = False) -> dict[str, Tensor]:
        early = torch.tanh(self.early(x))
        logits = {"logits": self.fc(torch.relu(self.late(early.sin())))}
        return logits | {"early": early} if states else logits


@pytest.mark.parametrize("grad", [True, False])
def test_whole_outputs_hold_what_no_expert_reads_at_the_first_call_of_a_kind(grad: bool) -> None:
    backbone = HandsOn()
    model = RIDEWrapper(backbone, 2, fork_at="late", return_experts="outputs", example_input=X)
    copies = copies_of(backbone, model)
    model.train()
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            for got, each in zip(model(X, states=True), copies, strict=True):
                torch.testing.assert_close(got, each(X, states=True))
                assert got["early"].sum().isfinite()
        assert got["early"].requires_grad == grad


def test_whole_outputs_hold_what_no_expert_reads_beside_a_trunk_in_evaluation_mode() -> None:
    backbone = HandsOn()
    backbone.early.requires_grad_(False)
    model = RIDEWrapper(
        backbone,
        2,
        fork_at="late",
        return_experts="outputs",
        logits="logits",
        example_input={"x": X, "states": True},
    )
    model.train().trunk.eval()
    for output in model(x=X, states=True):
        torch.testing.assert_close(output["early"], torch.tanh(backbone.early(X)))
    stored = model.run_trunk(x=X, states=True)
    for output in model(stored):
        assert output["early"].shape == (6, 8)  # known, and the values are not
        with pytest.raises(ReplayError, match=r"`tanh` returned.*stored state.*pass the batch"):
            output["early"].sum()


class LayerDrop(nn.Module):
    """Leaves out whole layers at random in training, by one draw for the batch (LayerDrop)."""

    def __init__(self, p: float, num_layers: int = 4) -> None:
        super().__init__()
        self.p, self.embed, self.head = p, nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers))
        self.late = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.training:  # one draw a row, so that layers after it differ between batch sizes;
            x = x * torch.rand(len(x), 1)  # dropout takes one for all rows in torch 2.5
        for block in self.blocks:
            if not (self.training and torch.rand([]) < self.p):
                x = x + block(x).relu()
        return self.head(self.late(x).relu())


@pytest.mark.parametrize("num_experts", [1, 3])
def test_layers_of_the_trunk_may_be_left_out_at_random_in_training(num_experts: int) -> None:
    net, x = LayerDrop(0.3), torch.randn(5, 6)
    model = RIDEWrapper(net, num_experts, init="copy", fork_at="late", example_input=x)
    for seed in range(12):
        draws = partial(torch.manual_seed, seed)
        train_both(net, model, [torch.randn(4, 6)], before_each=draws)
    model.eval()
    expected = torch.stack([each.eval()(x) for each in copies_of(net, model)], dim=1)
    torch.testing.assert_close(expert_logits(model(x)), expected)


class Encoder(LayerDrop):
    """Returns a state for each layer that has run, so that their number is random."""

    def forward(self, x: Tensor) -> Any:
        states = [self.embed(x)]
        if self.training:
            states[0] = states[0] * torch.rand(len(x), 1)
        for block in self.blocks:
            if not (self.training and torch.rand([]) < self.p):
                states.append(states[-1] + block(states[-1]).relu())
        return states[-1], tuple(states)


class OfEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(0.3)
        del self.encoder.late, self.encoder.head
        self.late, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.encoder(x)[0]).relu())


def test_a_module_of_the_trunk_may_return_another_number_of_tensors_at_random() -> None:
    net, x = OfEncoder(), torch.randn(5, 6)
    model = RIDEWrapper(net, 3, init="copy", fork_at="late", example_input=x)
    for seed in range(12):
        draws = partial(torch.manual_seed, seed)
        train_both(net, model, [torch.randn(4, 6)], before_each=draws)


def test_a_path_that_is_hardly_taken_twice_is_told_as_random() -> None:
    with pytest.raises(SplitError, match=r"leaves out layers at random.*`config\.layerdrop`"):
        RIDEWrapper(LayerDrop(0.5, 24), 2, fork_at="late", example_input=torch.randn(2, 6))
