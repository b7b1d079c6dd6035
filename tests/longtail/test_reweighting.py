import copy

import pytest
import torch

from ride_plugin import RIDEError, RIDELoss
from ride_plugin.longtail import (
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    effective_number_weights,
)

COUNTS = [500, 40, 3]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_weights_equal_the_series_of_the_effective_number(beta: float) -> None:
    inverse = [1 / sum(beta**k for k in range(n)) for n in COUNTS]
    expected = [3 * w / sum(inverse) for w in inverse]
    assert effective_number_weights(COUNTS, beta).tolist() == pytest.approx(expected, 1e-6)


def test_weights_equal_the_authors_numbers(losses) -> None:
    weights = effective_number_weights(losses["class_counts"])
    torch.testing.assert_close(weights, losses["drw_class_weights"].float(), rtol=1e-5, atol=0)


def test_beta_close_to_one_keeps_its_digits() -> None:
    weights = effective_number_weights(COUNTS, 1 - 1e-14)
    assert (weights[2] / weights[0]).item() == pytest.approx(500 / 3, rel=1e-4)


def criteria():
    return [
        LDAMLoss(COUNTS),
        FocalLoss(weight=torch.ones(3)),
        torch.nn.CrossEntropyLoss(weight=torch.ones(3)),
    ]


@pytest.mark.parametrize("criterion", criteria(), ids=lambda c: type(c).__name__)
def test_weights_switch_in_place_at_the_start_epoch(criterion) -> None:
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
    buffer = criterion.weight
    seen = []
    for epoch in range(4):
        assert drw.last_epoch == epoch
        seen.append((drw.is_active, criterion.weight.tolist()))
        drw.step()
    after = effective_number_weights(COUNTS).tolist()
    assert seen == [(False, [1.0] * 3)] * 2 + [(True, after)] * 2
    assert criterion.weight is buffer


def test_the_loss_changes_with_the_weights() -> None:
    logits, target = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    criterion = LDAMLoss(COUNTS)
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    before = criterion(logits, target)
    drw.step()
    weighted = LDAMLoss(COUNTS, weight=effective_number_weights(COUNTS))(logits, target)
    assert criterion(logits, target) != before
    torch.testing.assert_close(criterion(logits, target), weighted, rtol=1e-6, atol=0)


def test_start_epoch_zero_acts_at_once() -> None:
    criterion = LDAMLoss(COUNTS)
    assert DeferredReweighting(criterion, COUNTS, start_epoch=0).is_active
    assert criterion.weight.tolist() != [1.0] * 3


def test_resuming_restores_the_weights_in_both_directions() -> None:
    own = [0.5, 1.0, 2.0]
    first = LDAMLoss(COUNTS, weight=own)
    drw = DeferredReweighting(first, COUNTS, start_epoch=1)
    early = copy.deepcopy(drw.state_dict())  # as a file would hold it
    drw.step()
    resumed = LDAMLoss(COUNTS, weight=own)
    again = DeferredReweighting(resumed, COUNTS, start_epoch=1)
    again.load_state_dict(drw.state_dict())
    assert again.last_epoch == 1
    assert torch.equal(resumed.weight, first.weight)
    again.load_state_dict(early)
    assert resumed.weight.tolist() == own


def test_going_back_to_a_state_that_was_not_copied_takes_the_weights_back() -> None:
    criterion = LDAMLoss(COUNTS)
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
    early = drw.state_dict()
    for _ in range(3):
        drw.step()
    drw.load_state_dict(early)
    assert drw.last_epoch == 0
    assert criterion.weight.tolist() == [1.0] * 3


def test_it_follows_a_criterion_that_was_cast_after_construction() -> None:
    criterion = LDAMLoss(COUNTS)
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    criterion.double()
    drw.step()
    assert criterion.weight.dtype == torch.float64
    torch.testing.assert_close(criterion.weight, drw.weight.double())


def test_bad_input_is_named() -> None:
    with pytest.raises(RIDEError, match=r"`criterion`.*None in CrossEntropyLoss.*torch.ones\(3\)"):
        DeferredReweighting(torch.nn.CrossEntropyLoss(), COUNTS, start_epoch=1)
    with pytest.raises(RIDEError, match=r"`criterion`.*\[3\].*\[2\]"):
        DeferredReweighting(LDAMLoss([2, 1]), COUNTS, start_epoch=1)
    with pytest.raises(RIDEError, match=r"`start_epoch`.*-1"):
        DeferredReweighting(LDAMLoss(COUNTS), COUNTS, start_epoch=-1)
    with pytest.raises(RIDEError, match=r"`beta`.*< 1, but got 1"):
        effective_number_weights(COUNTS, 1.0)
    drw = DeferredReweighting(LDAMLoss(COUNTS), COUNTS, start_epoch=1)
    with pytest.raises(RIDEError, match="`epoch` to be an integer >= 0, but got"):
        drw.load_state_dict({"epoch": torch.tensor(-1)})
    with pytest.raises(RIDEError, match="`criterion` to be a module that holds class weights"):
        DeferredReweighting(torch.nn.functional.cross_entropy, COUNTS, start_epoch=1)


@pytest.mark.parametrize("shares", [[0.9, 0.09, 0.01], torch.tensor(COUNTS) / sum(COUNTS)])
def test_shares_are_no_numbers_of_samples(shares) -> None:
    for call in (
        lambda: effective_number_weights(shares),
        lambda: DeferredReweighting(LDAMLoss(shares), shares, start_epoch=1),
    ):
        with pytest.raises(RIDEError, match=r"`class_counts`.*not shares"):
            call()
    assert effective_number_weights([1, 0.5]).sum() == 2  # what the mean of several draws may be


@pytest.mark.parametrize("criterion", criteria()[:2], ids=lambda c: type(c).__name__)
def test_compiled_in_one_graph_the_switch_needs_no_recompilation(criterion) -> None:
    logits, target = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
        drw.step()
        torch.testing.assert_close(compiled(logits, target), criterion(logits, target))


def test_a_tensor_that_others_hold_stays_as_it_is() -> None:
    ones = torch.ones(3)
    mine, other = (torch.nn.CrossEntropyLoss(weight=ones) for _ in range(2))
    DeferredReweighting(mine, COUNTS, start_epoch=0)
    assert ones.tolist() == other.weight.tolist() == [1.0, 1.0, 1.0]
    assert mine.weight[2] > 2


def test_weights_that_the_loop_sets_before_stay_until_the_start_epoch() -> None:
    criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(3))
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
    criterion.weight = torch.tensor([1.0, 2.0, 3.0])
    drw.step()
    assert criterion.weight.tolist() == [1.0, 2.0, 3.0]
    before = copy.deepcopy(drw.state_dict())
    drw.step()
    assert torch.equal(criterion.weight, drw.weight)
    drw.load_state_dict(before)
    assert criterion.weight.tolist() == [1.0, 2.0, 3.0]


def test_what_is_set_later_acts_at_once() -> None:
    criterion = LDAMLoss(COUNTS)
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=160)
    drw.last_epoch = 170
    assert torch.equal(criterion.weight, effective_number_weights(COUNTS))
    assert int(drw.state_dict()["epoch"]) == 170
    drw.start_epoch = 171
    assert criterion.weight.tolist() == [1.0] * 3
    drw.weight = [1, 2, 3]
    assert criterion.weight.tolist() == [1.0] * 3
    drw.start_epoch = 0
    assert criterion.weight.tolist() == [1.0, 2.0, 3.0]
    drw.weight = torch.tensor([3.0, 2.0, 1.0])
    assert criterion.weight.tolist() == [3.0, 2.0, 1.0]
    for name, value in (("weight", [1, 2]), ("start_epoch", -1), ("last_epoch", None)):
        with pytest.raises(RIDEError, match=f"`{name}`"):
            setattr(drw, name, value)
    assert criterion.weight.tolist() == [3.0, 2.0, 1.0]


def test_a_fresh_loss_goes_back_from_a_late_state_to_an_early_one() -> None:
    def build() -> RIDELoss:
        criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
        drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
        return RIDELoss(criterion, COUNTS, schedules=[drw])

    trained = build()
    early = copy.deepcopy(trained.state_dict())
    for _ in range(3):
        trained.step()
    fresh = build()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.criterion.weight, effective_number_weights(COUNTS))
    fresh.load_state_dict(early)
    assert fresh.criterion.weight.tolist() == [1.0, 2.0, 3.0]
    later = build()
    later.schedules[0].start_epoch = 10
    later.load_state_dict(trained.state_dict())
    assert later.criterion.weight.tolist() == [1.0, 2.0, 3.0]
