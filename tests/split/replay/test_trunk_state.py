"""The trunk's result: moved, saved, batched, and handed to the experts in place of a batch."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ReplayError,
    RIDEWrapper,
    RoutingInference,
    expert_logits,
    experts_loss,
)
from ride_plugin._split._cut._features import pooled
from ride_plugin._split._replay._hollow import is_hollow
from ride_plugin._tree import tensors_in
from ride_plugin.routing import TrunkState
from tests.adapters import KINDS, low_rank
from tests.backbones import VisionTransformer, mlp


class WithGlue(nn.Module):
    """A mask and a sum outside submodules, dropout in the experts, a cache on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(6, 5)
        self.scale: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.full((1,), 2.0)
        mask = (ids > 0).unsqueeze(-1)
        x = self.first(self.embed(ids)) * self.scale
        x = self.second(x) * mask
        return self.head(x.sum(1) / mask.sum(1).clamp(min=1))


def frozen_trunk() -> RIDEWrapper:
    model = RIDEWrapper(
        WithGlue(), 3, fork_at="second", init="copy", example_input=torch.randint(0, 20, (2, 7))
    )
    model.trunk.requires_grad_(False)
    return model


def stored(model: RIDEWrapper, *args: Tensor) -> TrunkState:
    with model.evaluating(), torch.no_grad():
        return model.run_trunk(*args).detach()


def gradients(model: RIDEWrapper, batch: object, target: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)  # dropout
    model.zero_grad()
    experts_loss(F.cross_entropy, model(batch), target).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoint_experts", [False, True])
def test_the_state_gives_the_output_and_gradients_of_the_batch(checkpoint_experts: bool) -> None:
    model = frozen_trunk().train()
    model.checkpoint_experts = checkpoint_experts
    ids, target = torch.randint(0, 20, (6, 7)), torch.randint(0, 5, (6,))
    state = stored(model, ids)
    expected, got = (gradients(model, batch, target) for batch in (ids, state))
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    rows = torch.tensor([4, 1])
    model.eval()
    torch.testing.assert_close(model(state.select(rows)), model(ids)[rows])


def test_a_fresh_state_lets_the_trunk_train() -> None:
    model = frozen_trunk().train()
    model.trunk.requires_grad_(True)
    x, target = torch.randint(0, 20, (3, 7)), torch.randint(0, 5, (3,))
    expected, got = (gradients(model, batch, target) for batch in (x, model.run_trunk(x)))
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)
    with pytest.raises(ArgumentError, match=r"model\.trunk\.requires_grad_\(False\)"):
        model(stored(model, x))
    with pytest.raises(ArgumentError, match="state alone"):
        model(stored(model, x), x)
    assert model.eval()(stored(model, x)).shape == (3, 5)


@pytest.mark.parametrize("way", ["pickle", "torch.save", "torch.save, weights only"])
@pytest.mark.parametrize("whole", [True, False])
def test_states_go_to_disk_and_back(way: str, whole: bool) -> None:
    model = frozen_trunk().eval()
    ids = torch.randint(0, 20, (6, 7))
    state = stored(model, ids)
    expected = model(state)
    if not whole:  # rows with the same keys and layout, put together again
        state = [state[i] for i in range(6)]
    if way == "pickle":
        back = pickle.loads(pickle.dumps(state))
    else:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        back = torch.load(file, weights_only=way.endswith("only"))
    back = back if whole else TrunkState.cat(back)
    assert torch.equal(model(back), expected)


def test_a_state_takes_no_memory_for_what_no_expert_reads() -> None:
    model = RIDEWrapper(VisionTransformer(5), 2).eval()
    state = stored(model, torch.randn(8, 3, 32, 32))
    file = io.BytesIO()
    torch.save(state.to("cpu", torch.float16), file)
    tokens = max(v.numel() for v in state.values if isinstance(v, Tensor))
    assert len(file.getvalue()) < 2 * tokens + 20_000 < 2 * 8 * 3 * 32 * 32 + 20_000


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_path_learned_at_run_time_drops_what_no_expert_reads(mode: Any) -> None:
    model = RIDEWrapper(VisionTransformer(5), 2).eval()
    batch = torch.randn(8, 3, 32, 32)
    with mode():
        known, learned = model.run_trunk(batch), model.run_trunk(x=batch)
        torch.testing.assert_close(model(learned), model(batch))
    kept = [[is_hollow(t) for t in tensors_in(s.values)] for s in (known, learned)]
    assert any(kept[0])
    assert kept[0] == kept[1]


def test_a_model_made_without_gradients_drops_what_no_expert_reads() -> None:
    with torch.no_grad():
        model = RIDEWrapper(VisionTransformer(5), 2).eval()
    assert any(map(is_hollow, tensors_in(model.run_trunk(torch.randn(8, 3, 32, 32)).values)))


def test_a_loader_batches_states_with_targets() -> None:
    model = frozen_trunk().eval()
    ids, target = torch.randint(0, 20, (10, 7)), torch.arange(10)
    state = stored(model, ids)
    assert len(state) == 10
    expected = model(ids)
    seen = []
    for part, labels in DataLoader(StackDataset(state, target), batch_size=4, shuffle=True):
        assert part.batch_size == len(labels)
        torch.testing.assert_close(model(part), expected[labels])
        seen += labels.tolist()
    assert sorted(seen) == list(range(10))
    with pytest.raises(IndexError, match="Row 10 of a state of 10 rows"):
        state[10]
    torch.testing.assert_close(model(state[-1]), expected[-1:])


def test_moving_a_state_keeps_integers_and_what_is_hollow() -> None:
    model = RIDEWrapper(VisionTransformer(5), 2).eval()
    state = stored(model, torch.randn(4, 3, 32, 32))
    halved = state.to(dtype=torch.bfloat16)
    floats = [v for v in halved.values if isinstance(v, Tensor) and v.is_floating_point()]
    assert {v.dtype for v in floats} == {torch.bfloat16}
    strides = [v.stride() for v in state.values if isinstance(v, Tensor)]
    assert [v.stride() for v in halved.values if isinstance(v, Tensor)] == strides
    there = state.to("meta").values
    assert all(v.is_meta for v in there if isinstance(v, Tensor))
    assert torch.equal(model(halved.to(dtype=torch.float32)).argmax(1), model(state).argmax(1))


def test_everything_that_takes_a_batch_takes_a_state() -> None:
    model = frozen_trunk()
    ids = torch.randint(0, 20, (12, 7))
    state = stored(model, ids)
    for got, expected in zip(model.router_inputs(state), model.router_inputs(ids), strict=True):
        assert torch.equal(got, expected)
    serve = RoutingInference(model, ConfidenceRouter("margin"), threshold=0.3)
    torch.testing.assert_close(serve(state), serve(ids))
    target = torch.arange(12) % 5
    by_state = serve.calibrate([(state, target)], max_experts=2)
    by_batch = serve.calibrate([(ids, target)], max_experts=2)
    torch.testing.assert_close(by_state.curve.accuracy, by_batch.curve.accuracy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_trunk_in_evaluation_keeps_nothing_for_a_backward_pass(kind: str) -> None:
    model = RIDEWrapper(KINDS[kind](), 2, fork_at="blocks.2", init="copy").train()
    model.trunk.eval()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        state = model.run_trunk(torch.randn(4, 8))
        assert kept == []
        assert not any(v.requires_grad for v in state.values if isinstance(v, Tensor))
        held = [v for v in state.values if isinstance(v, Tensor) and any(v.stride())]
        assert len(held) == 1  # the last block's result
        model(state)
        assert kept


def test_experts_train_on_a_state_while_the_trunk_stays_as_it_is() -> None:
    model = RIDEWrapper(low_rank(), 3, fork_at="blocks.2", init="copy")
    x, target = torch.randn(20, 8), torch.arange(20) % 5
    state = stored(model, x)
    trunk = copy.deepcopy(model.trunk.state_dict())
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 0.02)
    model.train()
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            loss = experts_loss(F.cross_entropy, model(state), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(t, trunk[name]) for name, t in model.trunk.state_dict().items())
    torch.testing.assert_close(model.eval()(state), model(x))


class WithTable(nn.Module):
    """Adds an argument that is the same for all rows, before the fork alone or behind it too."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = self.b((self.a(x) + table).relu()).relu()
        return self.c(x + table if self.late else x)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), ()])
def test_states_with_a_value_for_all_rows_are_joined(late: bool, shape: tuple[int, ...]) -> None:
    x, table = torch.randn(5, 6), torch.randn(shape)
    model = RIDEWrapper(WithTable(late), 2, fork_at="b", example_input=(x[:2], table)).eval()
    with torch.no_grad():
        states = [model.run_trunk(part, table.clone()) for part in x.split(3)]
        torch.testing.assert_close(model(TrunkState.cat(states)), model(x, table))
        others = [model.run_trunk(x, table), model.run_trunk(x, table + 1)]
        if late:
            with pytest.raises(ArgumentError, match="no batch dimension differs"):
                TrunkState.cat(others)
        else:
            expected = torch.cat([model(x, table), model(x, table + 1)])
            torch.testing.assert_close(model(TrunkState.cat(others)), expected)


class Keeps(nn.Module):
    """Keeps something from call to call: what it has computed, or how often it was called."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.count, self.kept, self.features = what, 0, [], None
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.what == "features":
            self.features = x
        elif self.what == "list":
            self.kept.append(x)
        else:
            self.count += 1
        return self.c(self.b(x).relu())


@pytest.mark.parametrize("what", ["features", "list", "count"])
def test_states_of_a_backbone_that_keeps_something_are_joined_where_that_is_right(
    what: str, tmp_path: Path
) -> None:
    net = Keeps(what)
    model = RIDEWrapper(net, 2, fork_at="b", example_input=torch.randn(2, 6)).eval()
    batches = [torch.randn(3, 6), torch.randn(2, 6)]
    with torch.no_grad():
        expected = torch.cat([model(x) for x in batches])
        states = [model.run_trunk(x) for x in batches]
        if what == "count":
            with pytest.raises(ArgumentError, match="a count say, which differs"):
                TrunkState.cat(states)
            return
        torch.testing.assert_close(model(TrunkState.cat(states)), expected)
        torch.save(states[0], tmp_path / "state")
        stored = torch.load(tmp_path / "state", weights_only=True)
        torch.testing.assert_close(model(stored), expected[:3])


def test_what_is_no_expert_no_state_and_no_rows_is_named() -> None:
    model = RIDEWrapper(mlp(), 3).eval()
    (x,), _ = model.example_input(4)
    state = model.run_trunk(x)
    index: Any
    for index in (3, -1, True, 1.0, None):
        with pytest.raises(ArgumentError, match="`index` to be an integer from 0 to 2"):
            model.run_expert(index, state)
    given: Any
    for given in (x, None, (state,)):
        with pytest.raises(ArgumentError, match="`state` to be what `run_trunk` returned"):
            model.run_expert(0, given)
    rows: Any
    for rows in ([1, 0], None):
        with pytest.raises(ArgumentError, match="`rows` to be an int64 tensor"):
            state.select(rows)
    with pytest.raises(ArgumentError, match="`states` to be at least one"):
        TrunkState.cat([])


def test_rows_are_indices_and_no_mask() -> None:
    model = RIDEWrapper(mlp(), 2).eval()
    state = model.run_trunk(torch.rand(3, 20))
    for rows in (torch.tensor([True, False, True]), torch.tensor([[0]]), torch.tensor([0.0])):
        with pytest.raises(ArgumentError, match="rows"):
            state.select(rows)


@pytest.mark.parametrize("positions", [(), (5,), (5, 5), (2, 3, 4)])
def test_features_are_the_mean_over_positions(positions: tuple[int, ...]) -> None:
    channels_last = len(positions) == 1  # tokens; a feature map has its channels first
    shape = (3, *positions, 7) if channels_last else (3, 7, *positions)
    features = torch.randn(shape)
    axes = tuple(d for d in range(1, features.dim()) if d != (2 if channels_last else 1))
    expected = torch.from_numpy(features.numpy().mean(axes)) if axes else features
    torch.testing.assert_close(pooled(features), expected)


def test_handles_of_hooks_do_not_lead_to_the_original() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.one = self.body.register_forward_hook(double)
            self.several = [self.fc.register_forward_hook(double)]

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.stem(x)))

    net, x = Hooked(), torch.rand(3, 6)
    before = net(x)
    model = RIDEWrapper(net, 1, fork_at="body", example_input=x)
    torch.testing.assert_close(model(x), before)
    model.experts[0].one.remove()  # a handle of nothing
    torch.testing.assert_close(net(x), before)
    net.one.remove()
    net.several[0].remove()
    torch.testing.assert_close(model(x), before)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class Scaled(nn.Module):
    """Reads buffers of its own in front of the fork and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("shift", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * self.stem(x) + self.shift
        return self.fc(self.scale * self.body(x) + self.shift)


def test_an_expert_on_its_own_has_the_buffers_that_it_read_in_the_trunk() -> None:
    x = torch.rand(3, 6)
    model = RIDEWrapper(Scaled(), 2, fork_at="body", example_input=x).eval()
    for index in range(2):
        alone = model.to_module(index)
        torch.testing.assert_close(alone(x), expert_logits(model(x))[:, index])
        names = set(dict(alone.named_buffers()))
        assert names == {"scale", "shift"}
        assert "scale" in alone.state_dict()
        assert "shift" not in alone.state_dict()


class Measures(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, {"largest": float(x.detach().abs().max())}


class Weighs(nn.Module):
    """Numbers among the arguments, and beside what a module of the trunk returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Measures(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, weights: Any = (1.0, 1.0)) -> Tensor:
        h, seen = self.a(x / x.abs().max(1, keepdim=True).values * weights[0])
        return self.c(self.b(h).relu() * weights[1] * seen["largest"])


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("numbers", [(1.0, 2.0), (2.0, 1.0)])
def test_states_with_other_numbers_are_not_joined(kind: Any, numbers: Any) -> None:
    model = RIDEWrapper(Weighs(), 2, fork_at="b", example_input=torch.randn(2, 6)).eval()
    x = torch.randn(6, 6)
    with torch.no_grad():
        first, alike = (model.run_trunk(part, kind((1.0, 1.0))) for part in x.split(3))
        other = model.run_trunk(x[3:], kind(numbers))
        joined = TrunkState.cat([first, alike])
        torch.testing.assert_close(
            expert_logits(model(joined)), expert_logits(model(x, kind((1.0, 1.0))))
        )
    with pytest.raises(ArgumentError, match="`states` to differ in their tensors alone"):
        TrunkState.cat([first, other])


def test_states_beside_which_a_module_returned_another_number_are_not_joined() -> None:
    class Plain(Weighs):
        def forward(self, x: Tensor, weights: Any = (1.0, 1.0)) -> Tensor:
            h, seen = self.a(x)
            return self.c(self.b(h).relu() + 0 * len(seen))

    model = RIDEWrapper(Plain(), 2, fork_at="b", example_input=torch.randn(2, 6)).eval()
    states = [model.run_trunk(torch.randn(3, 6)) for _ in range(2)]
    with pytest.raises(ArgumentError, match="`states` to differ in their tensors alone"):
        TrunkState.cat(states)


class _Global(nn.Module):
    """Flagged rows are gathered where any row of the batch is flagged, as Longformer's tokens."""

    def forward(self, h: Tensor, flag: Tensor, some: bool) -> Tensor:
        picked = h[flag]
        return h + picked.reshape(len(picked), -1).sum() if some else h


class _WithGlobal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.late, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.gather = _Global()

    def forward(self, x: Tensor) -> Tensor:
        flag = x[:, 0] > 0
        some = bool(flag.any())
        h = self.embed(x)
        return self.fc(self.gather(self.late(h), flag, some) * 0 + h)


def test_an_error_on_chosen_rows_says_that_the_whole_batch_may_have_decided() -> None:
    example = torch.rand(3, 4) + 5
    model = RIDEWrapper(_WithGlobal(), 2, fork_at="late", example_input=example).eval()
    x = torch.cat([torch.rand(1, 4), -torch.rand(2, 4)])
    with torch.no_grad():
        state = model.run_trunk(x)
        model.run_expert(1, state)
        model.run_expert(1, state.select(torch.tensor([0, 2])))
        with pytest.raises(ReplayError, match=r"2 rows that were chosen .*0 elements") as told:
            model.run_expert(1, state.select(torch.tensor([1, 2])))
    assert type(told.value.__cause__) is RuntimeError
