"""The parts of the splitter: nested values, rows, tapes, units, examples, initialisation."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ReplayError, SplitError
from ride_plugin._initialise import reinitialise
from ride_plugin._inputs import as_inputs, resize_batch
from ride_plugin._split._example import find_example
from ride_plugin._split._fork import choose_fork
from ride_plugin._split._probe import call_tree, clone_module
from ride_plugin._split._rows import Rows, find_rows, take_rows
from ride_plugin._split._state import hollow
from ride_plugin._split._tape import Player, Recorder, Running
from ride_plugin._split._units import tokens, units_of
from ride_plugin._tree import logits_in, map_tensors, tensors_in
from tests.backbones import CifarResNet, ImageNetResNet, VisionTransformer, mlp


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


@dataclass
class Output:
    loss: float | None
    logits: Tensor


class TestTree:
    def test_tensors_in_nested_values_come_depth_first(self) -> None:
        a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
        value = {"x": Pair(a, [b]), "y": (3, None, Output(None, c)), "z": OrderedDict(k=d)}
        assert [int(t) for t in tensors_in(value)] == [0, 1, 2, 3]

    def test_map_keeps_structure_and_leaves_the_original(self) -> None:
        value = {"x": Pair(torch.ones(1), [torch.ones(2)]), "y": Output(None, torch.ones(3))}
        mapped = map_tensors(lambda t: t + 1, value)
        assert type(mapped["x"]) is Pair
        assert mapped["y"].loss is None
        assert all((t == 2).all() for t in tensors_in(mapped))
        assert all((t == 1).all() for t in tensors_in(value))

    def test_map_rebuilds_what_torch_functions_return(self) -> None:
        values, indices = map_tensors(lambda t: t[:1], torch.max(torch.rand(3, 4), dim=1))
        assert values.shape == indices.shape == (1,)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda t: t,
            lambda t: (t,),
            lambda t: {"logits": t},
            lambda t: Output(None, t),
            lambda t: (t, torch.rand(2, 7)),
        ],
    )
    def test_logits_are_found(self, wrap) -> None:
        logits = torch.rand(2, 5)
        assert logits_in(wrap(logits)) is logits

    def test_no_logits(self) -> None:
        assert logits_in(torch.rand(2, 3, 4)) is None
        assert logits_in(("a", 1)) is None


class TestRows:
    def test_the_dimension_that_scales_is_the_batch(self) -> None:
        assert find_rows("k", torch.rand(7, 2, 4), torch.rand(7, 3, 4), (2, 3)) == Rows(1, 1)
        assert find_rows("k", torch.rand(8, 4), torch.rand(12, 4), (2, 3)) == Rows(0, 4)
        assert find_rows("k", torch.rand(8, 4), torch.rand(8, 4), (2, 3)) is None

    @pytest.mark.parametrize("shapes", [((2, 2), (3, 3)), ((2, 4), (5, 4)), ((2,), (3, 1))])
    def test_ambiguity_is_an_error(self, shapes) -> None:
        with pytest.raises(SplitError, match=r"`windows` hands to the experts.*Pass `fork_at="):
            find_rows("windows", torch.rand(shapes[0]), torch.rand(shapes[1]), (2, 3))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_rows_are_taken_in_the_layout_of_the_value(self, memory_format) -> None:
        value = torch.rand(5, 3, 4, 4).contiguous(memory_format=memory_format)
        rows = torch.tensor([4, 0, 0])
        taken = take_rows(value, Rows(0, 1), rows)
        assert torch.equal(taken, value[rows])
        assert taken.is_contiguous(memory_format=memory_format)

    def test_rows_of_windows(self) -> None:
        value = torch.arange(12).view(6, 2)  # two windows for each of three samples
        taken = take_rows(value, Rows(0, 2), torch.tensor([2, 0]))
        assert torch.equal(taken, value[[4, 5, 0, 1]])
        along = take_rows(value.t(), Rows(1, 2), torch.tensor([1]))
        assert torch.equal(along, value.t()[:, 2:4])

    def test_hollow_values_keep_taking_no_memory(self) -> None:
        taken = take_rows(hollow(torch.rand(5, 3)), Rows(0, 1), torch.tensor([1, 2]))
        assert taken.shape == (2, 3)
        assert taken.isnan().all()
        assert taken.stride() == (0, 0)


class TestTape:
    def record(self) -> tuple[tuple[str, ...], list[object]]:
        recorder = Recorder(((), {}), stop_at_fork=False, layouts=())
        x = torch.ones(2)
        recorder.enter()
        y = torch.relu(x) * 2
        recorder.unit_begins()
        torch.tanh(y)  # inside a unit: not glue
        recorder.unit_ends("unit", y)
        y[0] = 5
        y.shape[0] + 1
        recorder.leave()
        return tuple(recorder.keys), recorder.values

    def test_glue_and_units_are_recorded_in_order(self) -> None:
        keys, _ = self.record()
        assert keys == ("inputs", "relu", "mul", "unit", "__setitem__")

    def test_replay_returns_what_was_recorded(self) -> None:
        keys, values = self.record()
        player, x = Player(keys, values), torch.full((2,), torch.nan)
        player.enter()
        try:
            y = torch.relu(x) * 3
            assert player.next_value() is y
            y[0] = 7  # replayed: not assigned again
        finally:
            player.leave()
        assert y.tolist() == [5, 2]

    def test_another_operation_is_out_of_step(self) -> None:
        player, x = Player(*self.record()), torch.ones(2)
        player.enter()
        try:
            with pytest.raises(ReplayError, match=r"came to `tanh` where the trunk ran `relu`"):
                torch.tanh(x)
        finally:
            player.leave()

    def test_early_fork_is_out_of_step(self) -> None:
        with pytest.raises(ReplayError, match="came to `the fork`"):
            Player(*self.record()).fork_begins()

    def test_each_thread_has_its_own_pass(self) -> None:
        running = Running()
        running.features = torch.ones(1)
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.append(running.features))
        thread.start()
        thread.join()
        assert seen == [None]


class TestUnitsAndFork:
    def test_units_are_blocks_and_layers_between_them(self) -> None:
        root, _ = call_tree(CifarResNet(n=2).eval(), ((torch.rand(2, 3, 32, 32),), {}))
        names = [unit.name for unit in units_of(root)]
        assert names[:4] == ["conv1", "bn1", "layer1.0", "layer1.1"]
        assert names[-1] == "linear"
        assert [tokens(unit) for unit in units_of(root)][-2:] == [64, 1]

    def test_multiply_adds_of_resnet_32_are_the_known_number(self) -> None:
        root, _ = call_tree(CifarResNet().eval(), ((torch.rand(1, 3, 32, 32),), {}))
        assert root.multiply_adds == pytest.approx(69.1e6, rel=0.01)  # ResNet paper: 0.69e8

    @pytest.mark.parametrize(
        ("backbone", "size", "reason"),
        [
            (CifarResNet(n=1), 32, "last two of 3 resolution levels"),
            (ImageNetResNet(), 64, "last two of 5 resolution levels"),
            (VisionTransformer(), 32, "last third of 6 TransformerEncoderLayer blocks"),
        ],
    )
    def test_reason_for_the_default_fork(self, backbone, size: int, reason: str) -> None:
        root, _ = call_tree(backbone.eval(), ((torch.rand(2, 3, size, size),), {}))
        assert choose_fork(root, None).reason == reason

    def test_probing_leaves_no_hook_behind(self) -> None:
        backbone = mlp()
        call_tree(backbone, ((torch.rand(2, 20),), {}))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


class TestExample:
    def test_forms(self) -> None:
        x = torch.rand(2, 3)
        assert as_inputs(x) == ((x,), {})
        assert as_inputs((x, 1)) == ((x, 1), {})
        assert as_inputs({"x": x}) == ((), {"x": x})
        with pytest.raises(ArgumentError, match="`example_input`"):
            as_inputs("x")

    def test_rows_are_repeated_and_varied(self) -> None:
        x, ids, scale = torch.rand(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor(2.0)
        (got, got_ids, got_scale), _ = resize_batch(((x, ids, scale), {}), 5)
        assert torch.equal(got[:2], x)
        assert len(got.unique(dim=0)) == 5
        assert got_ids.shape == (5, 3)
        assert set(got_ids.flatten().tolist()) == set(ids.flatten().tolist())
        assert got_scale is scale

    @pytest.mark.parametrize(
        ("backbone", "shape"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), (2, 784)),
            (
                nn.Sequential(
                    nn.Conv1d(4, 8, 9), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5)
                ),
                (2, 4, 64),
            ),
            (
                nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 5)),
                (2, 1, 28, 28),
            ),
            (nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(128, 5)), (2, 16)),
        ],
    )
    def test_inputs_are_guessed_from_the_first_layer(self, backbone, shape) -> None:
        (x,), kwargs = find_example(backbone.eval(), None)
        assert tuple(x.shape) == shape
        assert not kwargs


class TestInitialise:
    def test_entries_are_shuffled_constants_stay_statistics_are_reset(self) -> None:
        expert = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        with torch.no_grad():
            expert[0].bias.fill_(0.25)
            expert[1].running_mean.fill_(3)
        before = clone_module(expert)
        assert reinitialise(expert, keep=set()) == []
        assert not torch.equal(expert[0].weight, before[0].weight)
        flat, old = expert[0].weight.flatten(), before[0].weight.flatten()
        assert torch.equal(flat.sort().values, old.sort().values)
        assert (expert[0].bias == 0.25).all()
        assert (expert[1].running_mean == 0).all()

    def test_tied_tensors_are_kept(self) -> None:
        expert = nn.Linear(6, 5)
        before = expert.weight.clone()
        reinitialise(expert, keep={id(expert.weight)})
        assert torch.equal(expert.weight, before)
