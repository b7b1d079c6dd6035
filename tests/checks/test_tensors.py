"""The room of tensor checks: what comes in, how it goes on, in which words it is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ride_plugin import (
    ArgumentError,
    DiversityLoss,
    experts_loss,
    functional,
    longtail,
)
from ride_plugin._checks import _tensors, _values
from tests.hostile import case_name


def test_shapes_of_floating_point_tensors() -> None:
    tensor = torch.zeros(2, 3, 4)
    for shape in (
        ("B", "E", "C"),
        (2, "E", 4),
        ("...", 4),
        ("...", 3, "C"),
        ("...", "B", "E", "C"),
    ):
        assert _tensors.check_floating(tensor, "logits", *shape) is tensor
    for shape in (("B", "C"), (2, "E", 5), ("...", 3), ("...", "A", "B", "E", "C")):
        with pytest.raises(ArgumentError, match=r"`logits`.*floating-point.*shape \[2, 3, 4\]"):
            _tensors.check_floating(tensor, "logits", *shape)
    for value in (tensor.long(), tensor.numpy(), tensor.tolist(), None):
        with pytest.raises(
            ArgumentError, match=r"`logits` to be a floating-point tensor \[B, E, C\]"
        ):
            _tensors.check_floating(value, "logits", "B", "E", "C")


# Class counts: in the order of class indices, whatever they come in.

COUNTS = [5, 50, 7]


class Series:
    """What a pandas Series is to us: values in some order, and the label of each."""

    ndim = 1

    def __init__(self, values: list[int], index: list[Any]) -> None:
        self.values, self.index = values, index

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        return np.array(self.values, dtype)

    def to_dict(self) -> dict[Any, int]:
        return dict(zip(self.index, self.values, strict=True))


READ_ONLY = np.array(COUNTS)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "counts",
    [
        *(COUNTS, tuple(COUNTS), np.array(COUNTS), np.array(COUNTS[::-1])[::-1], READ_ONLY),
        *(torch.tensor(COUNTS), torch.tensor(COUNTS).half(), [np.int64(n) for n in COUNTS]),
        *({0: 5, 1: 50, 2: 7}, {2: 7, 0: 5, 1: 50}, {np.int64(2): 7, 1: 50, 0: np.int32(5)}),
        *(Counter([1] * 50 + [2] * 7 + [0] * 5), Series([50, 7, 5], [1, 2, 0])),
    ],
    ids=lambda counts: type(counts).__name__,
)
def test_class_counts_are_put_in_the_order_of_classes(counts: Any) -> None:
    checked = _tensors.check_class_counts(counts)
    assert checked.tolist() == COUNTS
    assert checked.dtype == torch.float64
    if not isinstance(counts, torch.Tensor):
        assert _tensors.as_weight(counts, 3).tolist() == COUNTS


def test_value_counts_of_pandas_itself() -> None:
    pandas = pytest.importorskip("pandas")
    counts = pandas.Series([1] * 50 + [2] * 7 + [0] * 5).value_counts()
    assert counts.tolist() == [50, 7, 5]  # by frequency, which is not the order of classes
    assert _tensors.check_class_counts(counts).tolist() == COUNTS
    assert _tensors.check_class_counts(counts.sort_index().to_numpy()).tolist() == COUNTS
    assert _tensors.as_labels(pandas.Series([2, 0], index=[7, 3])).tolist() == [2, 0]
    with pytest.raises(ArgumentError, match="class indices from 0 on as its keys"):
        _tensors.check_class_counts(pandas.Series(["cat", "cat", "dog"]).value_counts())


@pytest.mark.parametrize(
    "counts",
    [
        {"cat": 5, "dog": 3},
        {1: 5, 2: 3},
        Counter([0, 0, 2]),
        Series([5, 3], [0, 0]),
        {0.5: 2, 1: 3},
    ],
)
def test_keys_that_are_not_the_class_indices_are_refused(counts: Any) -> None:
    with pytest.raises(ArgumentError, match=r"class indices from 0 on as its keys.*Pass a list"):
        _tensors.check_class_counts(counts)
    with pytest.raises(ArgumentError, match="`weight` to have the class indices"):
        _tensors.as_weight(counts)


@pytest.mark.parametrize(
    "counts",
    [
        *(None, "12", 3, [], [4], [[1, 2]], [1, None], ["1", "2"], [True, True], [1j, 2], {1, 2}),
        *(np.array(["a", "b"]), torch.ones(2, device="meta"), [[1], [1, 2]], {0: "a", 1: "b"}),
        *([1, 0], [1, -2], [1, math.nan], [1, math.inf], object(), iter([1, 2]), {0: 1, 1: None}),
    ],
    ids=case_name,
)
def test_what_are_no_class_counts_is_refused(counts: Any) -> None:
    with pytest.raises(ArgumentError, match="Expected argument `class_counts` to be "):
        _tensors.check_class_counts(counts)


# Targets.


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_class_indices_of_any_integer_type_become_int64(dtype: torch.dtype) -> None:
    checked = _tensors.check_target(torch.tensor([0, 2], dtype=dtype), 2, 3)
    assert checked.dtype == torch.int64
    assert checked.tolist() == [0, 2]


def test_probabilities_are_taken_as_they_are() -> None:
    mixed = torch.tensor([[0.2, 0.8, 0.0]])
    assert _tensors.check_target(mixed, 1, 3) is mixed
    with pytest.raises(ArgumentError, match=r"`target`.*add two losses"):
        _tensors.check_target(mixed, 1, 3, soft=False)


@pytest.mark.parametrize(
    "target",
    [
        *(None, "a", [0, 1], np.array([0, 1]), torch.tensor([0]), torch.tensor([[0, 1]]), 0),
        *(torch.tensor([True, False]), torch.tensor([0j, 1]), torch.zeros(2), torch.ones(2, 3)),
        *(torch.tensor([[2.0, -1, 0]] * 2), torch.tensor([[math.nan, 1, 0]] * 2)),
    ],
    ids=case_name,
)
def test_what_is_no_target_is_refused(target: Any) -> None:
    with pytest.raises(ArgumentError, match="Expected argument `target`"):
        _tensors.check_target(target, 2, 3)


def test_classes_out_of_range_are_named() -> None:
    for labels, words in (([0, 3], "from 0 to 2, but got values from 0 to 3"), ([-1], "-1 to -1")):
        with pytest.raises(ArgumentError, match=words):
            _tensors.check_classes(torch.tensor(labels), "target", 3)
    _tensors.check_classes(torch.tensor([0, 2]), "target", 3)
    _tensors.check_classes(torch.tensor([9]), "target")
    _tensors.check_classes(torch.tensor([9], device="meta"), "target", 3)  # not read back


@pytest.mark.parametrize("index", [-100, -1, 3])
@pytest.mark.parametrize(
    "criterion",
    [
        longtail.BalancedSoftmaxLoss([3, 2, 1]),
        longtail.LDAMLoss([3, 2, 1]),
        longtail.FocalLoss(weight=[1.0, 2.0, 3.0]),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_no_class_index_is_left_out_without_a_word_where_none_is_read(criterion, index) -> None:
    """As in a graph, and on an accelerator, whose kernels stop at an index out of range."""
    logits, target = torch.zeros(2, 3), torch.tensor([0, index])
    with pytest.raises(ArgumentError, match=f"`target`.*values from {min(0, index)} to "):
        criterion(logits, target)
    compiled = torch.compile(criterion, backend="eager")
    assert compiled(logits, torch.tensor([0, 2])) == criterion(logits, torch.tensor([0, 2]))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        compiled(logits, target)


@pytest.mark.parametrize(
    "labels",
    [None, "01", [], [0.5], [[0, 1]], [True, False], [-1], ["a"], 3, [0, None], object()],
    ids=case_name,
)
def test_what_are_no_labels_is_refused(labels: Any) -> None:
    with pytest.raises(ArgumentError, match="Expected argument `labels` to "):
        _tensors.as_labels(labels)


@pytest.mark.parametrize(
    "call",
    [
        lambda z, y: experts_loss(F.cross_entropy, z, y),
        lambda z, y: longtail.FocalLoss()(z[:, 0], y),
        lambda z, y: longtail.BalancedSoftmaxLoss([3, 2, 1])(z[:, 0], y),
        lambda z, y: functional.routing_targets(z, y),
        lambda z, y: functional.sample_temperatures(torch.ones(3), y),
        lambda z, y: DiversityLoss([3, 2, 1], form="paper")(z, y),
    ],
)
def test_a_target_on_another_device_is_named(call) -> None:
    """Of "meta", since torch itself does not refuse it everywhere: focal loss was 0.0."""
    with pytest.raises(ArgumentError, match=r"`target` to be on cpu.*It is on meta"):
        call(torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_unsigned_numbers_are_as_good_as_others(dtype: Any, kind: Any) -> None:
    def unsigned(values: list[int]) -> Any:
        return kind(np.array(values, dtype))

    target, counts, predicted = [0, 1, 2, 2], [200, 50, 7], [0, 2, 2, 1]
    report = longtail.shot_report(predicted, target, counts)
    assert longtail.shot_report(unsigned(predicted), unsigned(target), unsigned(counts)) == report
    assert longtail.FocalLoss(weight=unsigned(counts)).weight.tolist() == counts
    assert longtail.LDAMLoss(counts, weight=unsigned(counts)).weight.tolist() == counts
    right = longtail.expected_calibration_error([0.5] * 4, unsigned([0, 1, 1, 0]))
    assert right == longtail.expected_calibration_error([0.5] * 4, [0, 1, 1, 0])
    with pytest.raises(ArgumentError, match="`output` to hold class indices from 0 to 2"):
        longtail.shot_report(unsigned([0, 1, 2, 3]), target, counts)


# Logits, or what stands in their place.

PROBABILITIES = {
    "softmax": lambda z: z.softmax(-1),
    "of experts": lambda z: z[:, None].expand(-1, 3, -1).softmax(-1),
    "sure of themselves": lambda z: (30 * z).softmax(-1),
    "double": lambda z: z.double().softmax(-1),
    "half": lambda z: z.half().softmax(-1),
    "bfloat16": lambda z: z.bfloat16().softmax(-1),
    "rounded in bfloat16": lambda z: z.bfloat16().softmax(-1).float(),
    "one row": lambda z: z[:1].softmax(-1),
    "one dimension": lambda z: z[0].softmax(-1),
    "two classes": lambda z: z[:, :2].softmax(-1),
    "a class without any": lambda z: z.index_fill(1, torch.tensor(0), -math.inf).softmax(-1),
    "with gradients": lambda z: z.requires_grad_().softmax(-1),
}
LOGITS = {
    "normal": lambda z: z,
    "eight bits": lambda z: z.to(torch.float8_e4m3fn),
    "positive": lambda z: z.abs(),
    "between zero and one": lambda z: z.sigmoid(),
    "logarithms": lambda z: z.log_softmax(-1),
    "zeros": torch.zeros_like,
    "one class": lambda z: torch.ones_like(z[:, :1]),
    "answers": lambda z: F.one_hot(z.argmax(1), z.shape[1]).float(),
    "one row near one": lambda z: torch.tensor([[0.3, 0.71, 0.0]]),
    "none": lambda z: z[:0],
    "NaN": lambda z: z * math.nan,
    "infinite": lambda z: z.abs() * math.inf,
}


def scores() -> torch.Tensor:
    return torch.randn(20, 5)


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_probabilities_in_the_place_of_logits_are_warned_of_with_what_to_pass(kind: str) -> None:
    with pytest.warns(
        UserWarning, match=r"`scores` sum to one.*before its softmax.*`p.log\(\)`"
    ) as (warned):
        assert _tensors.warn_of_probabilities(PROBABILITIES[kind](scores()), "scores")
    assert warned[0].filename == __file__


@pytest.mark.parametrize("kind", LOGITS)
def test_logits_are_taken_without_a_word(kind: str) -> None:
    assert _tensors.warn_of_probabilities(LOGITS[kind](scores()), "scores")


def test_random_logits_of_one_sample_and_two_classes_hardly_ever_look_like_probabilities() -> None:
    logits = torch.randn(20_000, 2)
    taken = sum(_values.are_probabilities(row[None]) for row in logits)
    pairs = sum(_values.are_probabilities(two) for two in logits.view(-1, 2, 2))
    assert taken <= 3
    assert pairs <= 3


def test_probabilities_that_cannot_be_read_are_not_looked_at() -> None:
    uniform = torch.full((4, 3), 1 / 3)
    assert not _tensors.warn_of_probabilities(uniform.to("meta"), "scores")
    looked = []
    torch.vmap(lambda row: looked.append(_tensors.warn_of_probabilities(row, "x")) or row)(uniform)
    assert looked == [False]


CRITERIA = {
    "balanced softmax": lambda: longtail.BalancedSoftmaxLoss([9, 4, 1]),
    "logit adjustment": lambda: longtail.LogitAdjustedLoss([9, 4, 1], 0.5),
    "ldam": lambda: longtail.LDAMLoss([9, 4, 1]),
    "focal": longtail.FocalLoss,
    "focal, weighted": lambda: longtail.FocalLoss(weight=[1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("kind", CRITERIA)
def test_criteria_look_for_probabilities_at_their_first_call_only(kind: str) -> None:
    logits, target = torch.randn(20, 3), torch.arange(20) % 3
    criterion = CRITERIA[kind]()
    with pytest.warns(UserWarning, match="`logits` sum to one") as warned:
        criterion(logits.softmax(1), target)
    assert len(warned) == 1
    for first in (logits, logits.to("meta")):
        criterion = CRITERIA[kind]()
        criterion(first, target.to(first.device))
        if first.is_meta:  # nothing was seen yet
            with pytest.warns(UserWarning, match="`logits` sum to one"):
                criterion(logits.softmax(1), target)
        criterion(logits.softmax(1), target)
    criterion = CRITERIA[kind]()
    with pytest.warns(UserWarning, match="`logits` sum to one"):
        experts_loss(criterion, logits[:, None].softmax(2).expand(-1, 2, -1), target)
    compiled = torch.compile(CRITERIA[kind](), backend="eager", fullgraph=True)
    compiled(logits.softmax(1), target)


def calibration() -> longtail.PriorCalibration:
    labels = torch.arange(300) % 3
    held_out = F.one_hot(labels, 3) * 2 + torch.randn(300, 3)
    return longtail.calibrate_prior(held_out, labels, [100, 10, 1])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda p, y: longtail.adjust_logits(p, [9, 4, 1]), "logits"),
        (lambda p, y: longtail.adjust_logits(p[:, None], [9, 4, 1]), "logits"),
        (lambda p, y: longtail.analyze(p[:, None], y, [9, 4, 1]), "expert_logits"),
        (lambda p, y: longtail.calibrate_prior(p, y, [9, 4, 1]), "logits"),
        (lambda p, y: calibration().adjust(p, 0.0), "logits"),
        (lambda p, y: calibration().estimate(p), "logits"),
    ],
)
def test_what_is_done_with_logits_warns_of_probabilities(call: Any, name: str) -> None:
    target = torch.arange(60) % 3
    logits = F.one_hot(target, 3) + torch.randn(60, 3)
    call(logits, target)
    call(logits.log_softmax(1), target)
    with pytest.warns(UserWarning, match=f"`{name}` sum to one") as warned:
        call(logits.softmax(1), target)
    assert len(warned) == 1
    longtail.shot_report(logits.softmax(1), target, [9, 4, 1])  # takes either


def test_a_temperature_too_small_to_divide_by_gives_no_number() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    assert functional.distillation_kl(logits, logits[:, 0], 1e-300).isnan().all()
    assert functional.pairwise_kl(logits, torch.tensor([1e-40])).isnan().all()


def test_python_s_numbers_keep_all_their_digits() -> None:
    assert _tensors.check_class_counts([16_777_217.0, 3.0])[0] == 16_777_217
    assert _tensors.as_cpu_tensor([0.1, 0.2], "x").tolist() == [0.1, 0.2]
    assert _tensors.as_cpu_tensor(np.array([0.1], np.float32), "x").dtype == torch.float32
    assert _tensors.as_cpu_tensor([1, 2], "x").dtype == torch.int64


def test_counts_without_values_are_told_from_what_is_no_tensor() -> None:
    with pytest.raises(ArgumentError, match=r"`class_counts` to be numbers.*on the meta device"):
        _tensors.check_class_counts(torch.ones(3, device="meta"))
