import math

import pytest
import torch

from ride_plugin import RIDEError, experts_loss
from ride_plugin.longtail import LDAMLoss

COUNTS = [400, 60, 9, 2]


def naive(logits, target, counts, weight, max_margin=0.5, scale=30.0):
    rarity = [n**-0.25 for n in counts]
    total, weights = 0.0, 0.0
    for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        row = list(row)
        row[y] -= scale * max_margin * rarity[y] / max(rarity)
        peak = max(row)
        total += weight[y] * (peak + math.log(sum(math.exp(z - peak) for z in row)) - row[y])
        weights += weight[y]
    return total / weights


def batch(dtype=torch.float64):
    return (30 * (2 * torch.rand(7, 4) - 1)).to(dtype), torch.tensor([0, 3, 1, 2, 2, 0, 3])


@pytest.mark.parametrize("weight", [None, [0.2, 0.5, 1.0, 2.3]])
def test_equals_the_equation_by_loops(weight) -> None:
    logits, target = batch()
    loss = LDAMLoss(COUNTS, weight=weight).double()(logits, target)
    assert loss.item() == pytest.approx(naive(logits, target, COUNTS, weight or [1.0] * 4), 1e-6)


def test_margin_and_scale_are_those_of_the_arguments() -> None:
    logits, target = batch()
    logits = logits / 3
    loss = LDAMLoss(COUNTS, max_margin=0.2, scale=10.0)(logits, target)
    expected = naive(logits, target, COUNTS, [1.0] * 4, 0.2, 10.0)
    assert loss.item() == pytest.approx(expected, 1e-6)


@pytest.mark.parametrize("phase", ["before", "after"])
def test_equals_the_authors_numbers(losses, phase: str) -> None:
    experts = losses["expert_logits"].clone().requires_grad_()
    weight = losses["drw_class_weights"] if phase == "after" else None
    loss = LDAMLoss(losses["class_counts"], weight=weight)(experts[:, 0], losses["target"])
    loss.backward()
    torch.testing.assert_close(loss, losses[f"ldam_{phase}_drw_loss"], rtol=1e-5, atol=0)
    reference = losses[f"ldam_{phase}_drw_grad"]
    torch.testing.assert_close(experts.grad[: len(reference)], reference, rtol=1e-5, atol=1e-9)


def test_gradient_is_that_of_finite_differences() -> None:
    logits, target = batch()
    criterion = LDAMLoss(COUNTS).double()
    logits = (logits / 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), (logits,))


def test_zero_margin_is_cross_entropy() -> None:
    logits, target = batch(torch.float32)
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(LDAMLoss(COUNTS, max_margin=0)(logits, target), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype) -> None:
    logits, target = batch(dtype)
    criterion = LDAMLoss(COUNTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, criterion(logits.float(), target), rtol=1e-6, atol=0)


def test_masked_class_leaves_loss_and_gradient_finite() -> None:
    logits, target = batch(torch.float32)
    logits[:, 1] = -math.inf
    logits.requires_grad_()
    loss = LDAMLoss(COUNTS)(logits[[0, 1]], target[[0, 1]])
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_logits_of_a_linear_head_are_refused_with_the_remedy() -> None:
    logits, target = batch(torch.float32)
    logits[0, 0] = 45.0
    with pytest.raises(RIDEError, match=r'within \+-30, but got 45\..*classifier="cosine"'):
        LDAMLoss(COUNTS)(logits, target)
    assert LDAMLoss(COUNTS, scale=45.0)(logits, target).isfinite()


def test_refused_in_a_later_batch_too_on_the_cpu() -> None:
    logits, target = batch(torch.float32)
    criterion = LDAMLoss(COUNTS)
    criterion(logits, target)
    with pytest.raises(RIDEError, match="cosines times scale"):
        criterion(logits * 10, target)


def test_cosines_that_round_above_one_pass() -> None:
    logits = torch.tensor([[30.25, -30.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert LDAMLoss(COUNTS)(logits, torch.tensor([0])).isfinite()


def test_checkpoints_hold_nothing_of_it_and_it_moves_with_to() -> None:
    criterion = LDAMLoss(COUNTS)
    assert not criterion.state_dict()
    assert criterion.double().margins.dtype == torch.float64


def test_the_callers_weight_tensor_stays_untouched() -> None:
    weight = torch.ones(4)
    LDAMLoss(COUNTS, weight=weight).weight.fill_(3.0)
    assert weight.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_counts": [3, 0]}, "`class_counts` to be positive.*0 for class 1"),
        ({"class_counts": [3, -1]}, "`class_counts`.*-1 for class 1"),
        ({"class_counts": [[3, 1]]}, "`class_counts`.*one-dimensional"),
        ({"class_counts": COUNTS, "max_margin": -0.1}, "`max_margin`.*-0.1"),
        ({"class_counts": COUNTS, "scale": 0}, "`scale`.*> 0.*got 0"),
        ({"class_counts": COUNTS, "scale": math.nan}, "`scale`"),
        ({"class_counts": COUNTS, "weight": [1.0, 1.0]}, r"`weight`.*\[4\].*\[2\]"),
        ({"class_counts": COUNTS, "weight": [1.0, 1.0, 1.0, -1.0]}, "`weight`.*non-negative"),
    ],
)
def test_bad_arguments_are_named(arguments, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        LDAMLoss(**arguments)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2).long(), r"`logits`.*\[B, 4\].*\[2, 3\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2).long(), "`logits`.*experts_loss"),
        (torch.zeros(2, 4), torch.tensor([0, 4]), "`target`.*0 to 3.*to 4"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), "`target`.*from -1"),
        (torch.zeros(2, 4), torch.zeros(3).long(), r"`target`.*indices \[2\].*\[3\]"),
        (torch.zeros(2, 4), torch.zeros(2).bool(), "`target`.*torch.bool"),
        (torch.zeros(2, 4), torch.full((2, 4), 0.25), r"`target`.*lam \* loss"),
    ],
)
def test_bad_batches_are_named(logits, target, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        LDAMLoss(COUNTS)(logits, target)


def test_masked_classes_are_no_cosine_that_is_too_large() -> None:
    logits = torch.tensor([[0.1, 0.2, -torch.inf]])
    assert LDAMLoss([9, 4, 1], scale=0.5)(logits, torch.tensor([0])).isfinite()


def test_the_bound_of_cosines_holds_on_both_sides_and_is_itself_allowed() -> None:
    criterion, target = LDAMLoss([9, 4, 1], scale=1.0), torch.tensor([0])
    for edge in (1.02, -1.02):
        assert criterion(torch.tensor([[edge, 0, 0]], dtype=torch.float64), target).isfinite()
        with pytest.raises(RIDEError, match="cosines times scale"):
            criterion(torch.tensor([[edge * 1.001, 0, 0]]), target)


def test_a_margin_that_is_set_acts_from_then_on() -> None:
    logits, target = 30 * torch.rand(4, 3), torch.tensor([0, 1, 2, 2])
    criterion = LDAMLoss([50, 5, 1])
    for margin in (0.0, 0.3):
        criterion.max_margin = margin
        expected = LDAMLoss([50, 5, 1], max_margin=margin)
        assert torch.equal(criterion(logits, target), expected(logits, target))
    with pytest.raises(RIDEError, match="`max_margin`"):
        criterion.max_margin = -1


def cosines(rows: int = 8, features: int = 64) -> torch.Tensor:
    directions = (torch.randn(n, features) for n in (rows, 4))
    return torch.nn.functional.linear(*(torch.nn.functional.normalize(d) for d in directions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cosines_that_nobody_multiplied_are_warned_of_once(dtype) -> None:
    criterion, target = LDAMLoss(COUNTS), torch.arange(4).repeat(2)
    with pytest.warns(UserWarning, match=r"within \+-1, like cosines.*by 30 in the head") as warned:
        plain = criterion(cosines().to(dtype), target)
    assert warned[0].filename == __file__
    assert len(warned) == 1
    assert plain.isfinite()
    criterion(cosines().to(dtype), target)
    experts = cosines(16).view(8, 2, 4)
    with pytest.warns(UserWarning, match="Multiply them by 16 in"):
        experts_loss(LDAMLoss(COUNTS, scale=16.0), experts, target)
    masked = cosines()
    masked[:, 1] = -math.inf
    with pytest.warns(UserWarning, match="like cosines"):
        LDAMLoss(COUNTS)(masked, target % 3 // 2 * 2)


def test_logits_that_may_be_small_are_not_taken_for_plain_cosines() -> None:
    target = torch.arange(4).repeat(2)
    for _ in range(200):  # as a fresh head with as many features as residual networks have
        LDAMLoss(COUNTS)(30 * cosines(8, 512), target)
    LDAMLoss(COUNTS, scale=2.0)(cosines(), target)
    LDAMLoss(COUNTS)(torch.zeros(8, 4), target)
    LDAMLoss(COUNTS)(cosines()[:1], target[:1])  # a handful says nothing
    criterion = LDAMLoss(COUNTS)
    criterion(30 * cosines(), target)
    criterion(cosines(), target)  # after the first batch nothing is looked for
    with pytest.warns(UserWarning, match="sum to one") as warned:
        LDAMLoss(COUNTS)(cosines().softmax(1), target)
    assert len(warned) == 1
