"""Which dimension of a value is the batch, and taking rows of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ReplayError, RIDEWrapper, SplitError, expert_logits
from ride_plugin._split._replay._hollow import hollow
from ride_plugin._split._replay._rows import Rows, find_rows, join_rows, take_rows


def test_the_dimension_that_scales_is_the_batch() -> None:
    assert find_rows("k", torch.rand(7, 2, 4), torch.rand(7, 3, 4), (2, 3)) == Rows(1, 1)
    assert find_rows("k", torch.rand(8, 4), torch.rand(12, 4), (2, 3)) == Rows(0, 4)
    assert find_rows("k", torch.rand(8, 4), torch.rand(8, 4), (2, 3)) is None


@pytest.mark.parametrize("shapes", [((2, 2), (3, 3)), ((2, 4), (5, 4)), ((2,), (3, 1))])
def test_ambiguity_is_an_error(shapes) -> None:
    with pytest.raises(SplitError, match=r"`windows` hands to the experts.*Pass `fork_at="):
        find_rows("windows", torch.rand(shapes[0]), torch.rand(shapes[1]), (2, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_taken_in_the_layout_of_the_value(memory_format) -> None:
    value = torch.rand(5, 3, 4, 4).contiguous(memory_format=memory_format)
    rows = torch.tensor([4, 0, 0])
    taken = take_rows(value, Rows(0, 1), rows, 5)
    assert torch.equal(taken, value[rows])
    assert taken.is_contiguous(memory_format=memory_format)


def test_rows_of_windows() -> None:
    value = torch.arange(12).view(6, 2)  # two windows for each of three samples
    taken = take_rows(value, Rows(0, 2), torch.tensor([2, 0]), 3)
    assert torch.equal(taken, value[[4, 5, 0, 1]])
    along = take_rows(value.t(), Rows(1, 2), torch.tensor([1]), 3)
    assert torch.equal(along, value.t()[:, 2:4])


def test_hollow_values_keep_taking_no_memory() -> None:
    taken = take_rows(hollow(torch.rand(5, 3)), Rows(0, 1), torch.tensor([1, 2]), 5)
    assert taken.shape == (2, 3)
    assert taken.isnan().all()
    assert taken.stride() == (0, 0)


def test_a_value_without_rows_is_compared_only_where_an_expert_reads_it() -> None:
    table = torch.rand(1, 4)
    assert join_rows([table, table.clone()], None, True, [2, 3]) is table
    dropped = [hollow(table), hollow(table)]
    assert join_rows(dropped, None, False, [2, 3]) is dropped[0]
    for live, other in ((True, table + 1), (True, table[0]), (False, table[:, :3])):
        with pytest.raises(ArgumentError, match=r"no batch dimension differs.*Run them apart"):
            join_rows([table, other], None, live, [2, 3])


@pytest.mark.parametrize("spec", [None, Rows(0, 1)])
def test_values_of_several_dtypes_are_not_joined(spec: Rows | None) -> None:
    values = [torch.rand(2, 3), torch.rand(2, 3).bfloat16()]
    with pytest.raises(ArgumentError, match=r"bfloat16 on cpu and torch\.float32 on cpu"):
        join_rows(values, spec, True, [2, 2])


def test_rows_of_another_number_of_windows_than_the_examples() -> None:
    value = torch.arange(18).view(9, 2)  # three windows for each of three samples
    taken = take_rows(value, Rows(0, 2), torch.tensor([2, 0]), 3)
    assert torch.equal(taken, value[[6, 7, 8, 0, 1, 2]])


@pytest.mark.parametrize(("size", "in_example"), [(7, 2), (6, 1)])
def test_slices_that_cannot_be_told_apart_are_refused(size: int, in_example: int) -> None:
    with pytest.raises(ReplayError, match=r"slices along dimension 0.*`example_input=`"):
        take_rows(torch.rand(size, 2), Rows(0, in_example), torch.tensor([0]), 3)


class Video(nn.Module):
    """Frames [B, N, 3, 8, 8] are folded into the batch up to their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.late(self.stem(x.flatten(0, 1)).relu()).mean((2, 3))
        return self.head(y.view(x.shape[0], x.shape[1], -1).mean(1))


def test_videos_of_any_number_of_frames_are_routed_as_they_are_run() -> None:
    example = torch.randn(2, 3, 3, 8, 8)
    model = RIDEWrapper(Video(), 2, fork_at="late", example_input=example).eval()
    for frames in (2, 3, 5):
        x, rows = torch.randn(4, frames, 3, 8, 8), torch.tensor([3, 1])
        whole = expert_logits(model(x))
        state = model.run_trunk(x)
        for k in range(2):
            logits, _ = model.run_expert(k, state.select(rows))
            torch.testing.assert_close(logits, whole[rows, k])
    with pytest.raises(ArgumentError, match="one input size"):
        type(state).cat([state, model.run_trunk(torch.randn(4, 3, 3, 8, 8))])


class Pads(nn.Module):
    """Pads to a multiple of four before the fork, with nothing where there is no need."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.zeros(*x.shape[:2], -x.shape[2] % 4)], dim=2)
        return self.fc(self.b(self.a(x).relu()).mean(2))


@pytest.mark.parametrize("length", [10, 12])
def test_a_tensor_without_elements_may_cross_the_fork(length: int) -> None:
    example = torch.randn(2, 3, length)
    model = RIDEWrapper(Pads(), 2, fork_at="b", example_input=example).eval()
    for x in (torch.randn(4, 3, 12), torch.randn(4, 3, 9)):
        whole, rows = expert_logits(model(x)), torch.tensor([3, 1])
        state = model.run_trunk(x)
        halves = [state.select(torch.tensor(half)).hollowed() for half in ([0, 1], [2, 3])]
        again = type(state).cat(halves).to(dtype=torch.float32)
        logits, _ = model.run_expert(1, again.select(rows))
        torch.testing.assert_close(logits, whole[rows, 1])
