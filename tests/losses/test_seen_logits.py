"""The diversity term compares the logits that the criteria see, or says that it cannot."""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import ArgumentError, DiversityLoss, RIDELoss
from ride_plugin.longtail import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss
from ride_plugin.losses._seen_logits import adds_a_prior

# `Foreign` counts its calls.
pytestmark = pytest.mark.filterwarnings("ignore:The criterion .* keeps a state")

COUNTS = [50, 20, 5, 2]
PRIOR = torch.tensor([50, 20, 5, 2.0]).div(77).log()
TARGET = torch.tensor([0, 1, 2, 3, 0, 2])


class Foreign(nn.Module):
    """Balanced softmax as others write it; it counts its calls and draws random numbers."""

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = tau
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor, target: Tensor, *args: Any) -> Tensor:
        self.calls += 1
        noise = 1e-6 * (torch.randn(()) + random.random() + np.random.random())  # noqa: NPY002
        return F.cross_entropy(logits + self.tau * PRIOR + noise, target)


class Told(Foreign):
    def with_prior(self, logits: Tensor) -> Tensor:
        return logits + self.tau * PRIOR


def experts() -> Tensor:
    return torch.randn(6, 3, 4, requires_grad=True)


FOREIGN = Foreign()


def as_function(logits: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits + PRIOR, dim=1), target)


def with_counts(logits: Tensor, target: Tensor, counts: list[int]) -> Tensor:
    return F.cross_entropy(logits + torch.tensor(counts).log(), target)


@pytest.mark.parametrize(
    "criterion",
    [
        Foreign(),
        as_function,
        partial(with_counts, counts=COUNTS),
        partial(Foreign()),
        Foreign().__call__,
        lambda logits, target: FOREIGN(logits, target),
        [nn.CrossEntropyLoss()] * 2 + [Foreign()],
    ],
)
def test_a_prior_that_the_term_cannot_see_is_told_once(criterion: Any) -> None:
    loss, out = RIDELoss(criterion, COUNTS), experts()
    remedies = r"adds a prior.*LogitAdjustedLoss.*with_prior\(logits\).*weight=0"
    with pytest.warns(UserWarning, match=remedies):
        loss(out, TARGET)
    loss(out, TARGET)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_factor_for_each_class_is_told_in_words_that_are_true_of_it(classes: int) -> None:
    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        factors = torch.tensor([1.0, 0.5, 0.6, 0.8])[:classes]
        return F.cross_entropy(logits * factors, target)

    target = torch.arange(6) % classes
    out = torch.randn(6, 3, classes, requires_grad=True)
    with pytest.warns(UserWarning, match=r"or has a factor for each class.*with_prior\(logits\)"):
        RIDELoss(criterion, COUNTS[:classes])(out, target)
    # A factor that all classes have is none: the diversity term has a temperature of its own.
    RIDELoss(lambda logits, target: F.cross_entropy(logits * 4, target), COUNTS)(experts(), TARGET)


class InPlace(Foreign):
    """Writes the logits that it is given, as some code for multi-label classification does."""

    def forward(self, logits: Tensor, target: Tensor, *args: Any) -> Tensor:
        logits += 0.0
        return super().forward(logits, target, *args)


def test_a_criterion_that_writes_its_logits_is_looked_at_as_well() -> None:
    with pytest.warns(UserWarning, match="adds a prior"):
        RIDELoss(InPlace(), COUNTS)(experts(), TARGET)


def test_what_is_handed_on_reaches_the_trial_too() -> None:
    with pytest.warns(UserWarning, match="adds a prior"):
        RIDELoss(Foreign(), COUNTS)(experts(), TARGET, "an epoch, say")


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0, 9.0])),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.MultiMarginLoss(),
        LDAMLoss(COUNTS),
        FocalLoss(),
        BalancedSoftmaxLoss(COUNTS),
        LogitAdjustedLoss(COUNTS, tau=-1.0),
        Told(),
        Foreign(tau=0.0),
    ],
)
def test_others_are_taken_without_a_word(criterion: nn.Module) -> None:
    RIDELoss(criterion, COUNTS)(experts(), TARGET)


class OfSigmoids(nn.Module):
    """Binary cross entropy of each class, with a prior or without, and any weights."""

    def __init__(self, prior: bool, **weights: Tensor) -> None:
        super().__init__()
        self.prior, self.weights = prior, weights

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 1:
            target = F.one_hot(target, 4).to(logits)
        z = logits + torch.special.logit(PRIOR.exp()) if self.prior else logits
        return 4 * F.binary_cross_entropy_with_logits(z, target, **self.weights)


def of_soft_labels(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def balanced_of_soft_labels(logits: Tensor, target: Tensor) -> Tensor:
    return of_soft_labels(logits + PRIOR, target)


def soft_targets() -> list[Tensor]:
    one_hot = F.one_hot(TARGET, 4).float()
    return [one_hot, 0.9 * one_hot + 0.025, 0.7 * one_hot + 0.3 * one_hot.flip(0)]


WEIGHT = torch.tensor([0.1, 1.0, 5.0, 9.0])


@pytest.mark.parametrize(
    "criterion",
    [
        Foreign(),
        balanced_of_soft_labels,
        OfSigmoids(prior=True),
        OfSigmoids(prior=True, weight=WEIGHT, pos_weight=WEIGHT),
    ],
)
def test_a_prior_is_told_with_targets_that_are_mixed_too(criterion: Any) -> None:
    for target in soft_targets():
        with pytest.warns(UserWarning, match="adds a prior"):
            RIDELoss(criterion, COUNTS)(experts(), target)


@pytest.mark.parametrize(
    "criterion",
    [
        *(nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=WEIGHT)),
        *(of_soft_labels, Foreign(tau=0.0), nn.MSELoss(), nn.KLDivLoss(reduction="batchmean")),
        *(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT)),
        *(OfSigmoids(prior=False, weight=WEIGHT), nn.MultiLabelSoftMarginLoss(weight=WEIGHT)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_take_mixed_targets_without_a_word(criterion: Any, dtype: torch.dtype) -> None:
    for target in soft_targets():
        assert not adds_a_prior(criterion, torch.randn(6, 4, dtype=dtype), target.to(dtype))


def test_sigmoids_of_class_indices_are_told_by_the_prior_and_not_by_weights() -> None:
    assert adds_a_prior(OfSigmoids(prior=True), torch.randn(6, 4), TARGET)
    assert not adds_a_prior(OfSigmoids(prior=False, weight=WEIGHT), torch.randn(6, 4), TARGET)


def of_two(logits: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits, target, **kwargs)


def focal_of_two(logits: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """With weights inside of the modulating factor, as many have it."""
    loss = F.cross_entropy(logits, target, reduction="none", **kwargs)
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def sigmoids_of_two(logits: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(target, 2).to(logits), **kwargs)


@pytest.mark.parametrize("criterion", [of_two, sigmoids_of_two])
@pytest.mark.parametrize("counts", [(90.0, 10.0), (10.0, 90.0), (3.0, 2.0)])
def test_a_prior_of_two_classes_is_told_from_weights(criterion: Any, counts: Any) -> None:
    counts = torch.tensor(counts)
    prior = counts.div(counts.sum()).log()
    prior = torch.special.logit(prior.exp()) if criterion is sigmoids_of_two else prior

    def adjusted(logits: Tensor, target: Tensor) -> Tensor:
        return criterion(logits + 1.1 * prior, target)

    with pytest.warns(UserWarning, match="adds a prior"):
        # None of the first batch is of the rare class, say.
        RIDELoss(adjusted, counts)(experts()[..., :2], torch.zeros(6, dtype=torch.long))
    RIDELoss(partial(criterion, weight=counts), counts)(experts()[..., :2], TARGET % 2)


@pytest.mark.parametrize(
    "criterion",
    [
        LDAMLoss([90, 10]),
        LDAMLoss([90, 10], scale=1, weight=[0.2, 1.8]),
        FocalLoss(weight=[0.2, 1.8]),
        partial(focal_of_two, weight=torch.tensor([1.0, 9.0])),
        partial(focal_of_two, weight=torch.tensor([0.2, 1.8])),
        partial(of_two, label_smoothing=0.2),
        partial(sigmoids_of_two, pos_weight=torch.tensor([0.2, 5.0])),
        nn.MultiMarginLoss(weight=torch.tensor([0.2, 1.8])),
    ],
)
def test_margins_and_weights_of_two_classes_are_no_prior(criterion: Any) -> None:
    assert not adds_a_prior(criterion, torch.randn(6, 2), TARGET % 2)


def mixed(criterion: Any, logits: Tensor, pair: Any) -> Tensor:
    if isinstance(pair, dict):
        pair = pair.values()
    one, other, share = pair
    return share * criterion(logits, one) + (1 - share) * criterion(logits, other)


class OfArguments(Foreign):
    def forward(self, logits: Tensor, one: Tensor, *rest: Any) -> Tensor:
        return mixed(super().forward, logits, (one, *rest))


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: dict(enumerate(pair))])
def test_a_prior_is_told_with_pairs_of_targets(kind: Any) -> None:
    for target in (TARGET, F.one_hot(TARGET, 4).float()):
        pair = kind([target, target.flip(0), 0.3])
        with pytest.warns(UserWarning, match="adds a prior"):
            RIDELoss(partial(mixed, Foreign()), COUNTS)(experts(), pair)
        RIDELoss(partial(mixed, Foreign(tau=0.0)), COUNTS)(experts(), pair)


def test_a_prior_is_told_where_the_other_labels_are_arguments() -> None:
    with pytest.warns(UserWarning, match="adds a prior"):
        RIDELoss(OfArguments(), COUNTS)(experts(), TARGET, TARGET.flip(0), 0.3)


def test_a_prior_is_told_beside_labels_that_are_ignored() -> None:
    with pytest.warns(UserWarning, match="adds a prior"):
        RIDELoss(Foreign(), COUNTS)(experts(), TARGET.where(TARGET > 0, -100))


def test_what_has_no_labels_is_taken_without_a_word() -> None:
    for target in (torch.rand(6, 1), torch.rand(6, 4, 1), "text", (torch.rand(6), 3)):
        assert not adds_a_prior(Foreign(), torch.randn(6, 4), target)


def test_without_a_diversity_term_nothing_is_asked() -> None:
    RIDELoss(Foreign(), DiversityLoss(COUNTS, weight=0))(experts(), TARGET)


def test_trying_out_leaves_no_trace() -> None:
    criterion, out = Foreign(), experts()
    loss = RIDELoss(criterion, COUNTS)

    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002

    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.random()]  # noqa: NPY002

    seed()
    with pytest.warns(UserWarning, match="adds a prior"):
        loss(out, TARGET)
    drawn = draw()
    assert criterion.calls == 3  # one for each expert
    seed()
    loss(out, TARGET)
    assert draw() == drawn


@pytest.mark.parametrize("taus", [(1.0,), (1.0, 0.0, 2.0)])
def test_a_criterion_of_ones_own_says_what_it_sees(taus: tuple[float, ...]) -> None:
    criteria = [Told(tau) for tau in taus]
    out = experts()
    loss = RIDELoss(copy.copy(criteria) if len(taus) > 1 else criteria[0], COUNTS)
    torch.manual_seed(0)
    got = loss(out, TARGET)
    each = criteria if len(taus) > 1 else criteria * 3
    torch.manual_seed(0)
    alone = sum(one(out[:, i], TARGET) for i, one in enumerate(each))
    seen = torch.stack([out[:, i] + one.tau * PRIOR for i, one in enumerate(each)], dim=1)
    torch.testing.assert_close(got, alone + DiversityLoss(COUNTS)(seen, TARGET))


def test_only_some_criteria_add_a_prior() -> None:
    out = experts()
    loss = RIDELoss([nn.CrossEntropyLoss(), BalancedSoftmaxLoss(COUNTS), Told(2.0)], COUNTS)
    seen = out + torch.tensor([0.0, 1.0, 2.0])[:, None] * PRIOR
    alone = sum(F.cross_entropy(seen[:, i], TARGET) for i in range(3))
    expected = alone + DiversityLoss(COUNTS)(seen, TARGET)
    torch.testing.assert_close(loss(out, TARGET), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logits", [None, "x", torch.zeros(2, 3), torch.zeros(2, 4).long()])
def test_what_are_no_logits_of_these_classes_is_refused(logits: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`logits`"):
        BalancedSoftmaxLoss(COUNTS).with_prior(logits)


def test_float64_stays_so() -> None:
    out = experts().double().detach().requires_grad_()
    each = [nn.CrossEntropyLoss(), BalancedSoftmaxLoss(COUNTS), BalancedSoftmaxLoss(COUNTS)]
    loss = RIDELoss(each, COUNTS).double()
    assert loss(out, TARGET).dtype == torch.float64
    # The ensemble is held constant, which a difference quotient is not: with nearly no weight.
    criterion = RIDELoss(each, DiversityLoss(COUNTS, weight=1e-9)).double()
    assert torch.autograd.gradcheck(lambda z: criterion(z, TARGET), (out,))


def test_half_precision_is_compared_in_float32() -> None:
    out = experts().detach().bfloat16().requires_grad_()
    loss = RIDELoss(BalancedSoftmaxLoss(COUNTS), COUNTS)(out, TARGET)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, RIDELoss(BalancedSoftmaxLoss(COUNTS), COUNTS)(out.float(), TARGET)
    )


@pytest.mark.parametrize(
    "wrap", [lambda c: c, lambda c: partial(F.cross_entropy, weight=c.weight, label_smoothing=0.1)]
)
def test_torchs_cross_entropy_with_weights_and_smoothed_labels_is_no_prior(wrap) -> None:
    weight = torch.logspace(-2, 1, 4)
    criterion = wrap(nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1))
    assert not adds_a_prior(criterion, torch.randn(8, 4), torch.arange(8) % 4)
