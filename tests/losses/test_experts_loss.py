"""Every expert is trained by itself, with whatever criterion."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import (
    ArgumentError,
    DiversityLoss,
    ExpertOutput,
    MissingExpertLogitsError,
    RIDELoss,
    experts_loss,
)
from ride_plugin._output import attach_expert_logits
from ride_plugin.longtail import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0, 0, 1])


WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
CRITERIA = [
    F.cross_entropy,
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=WEIGHT),
    nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=0),
    nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHT),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MultiMarginLoss(),
    lambda logits, target: F.cross_entropy(logits, target, weight=WEIGHT) ** 2,
]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_joins_the_losses_of_each_expert(criterion, reduction: str) -> None:
    logits, target = batch()
    ours = experts_loss(criterion, logits, target, reduction=reduction)
    one_by_one = torch.stack([criterion(logits[:, i], target) for i in range(3)])
    expected = one_by_one.sum() if reduction == "sum" else one_by_one.mean()
    torch.testing.assert_close(ours, expected)
    ours_grad, expected_grad = (torch.autograd.grad(x, logits)[0] for x in (ours, expected))
    torch.testing.assert_close(ours_grad, expected_grad)


def test_probabilities_as_target() -> None:
    logits, target = batch()
    smooth = 0.9 * F.one_hot(target, 5).float() + 0.1 / 5
    expected = sum(F.cross_entropy(logits[:, i], smooth) for i in range(3))
    torch.testing.assert_close(experts_loss(nn.CrossEntropyLoss(), logits, smooth), expected)


def test_it_is_not_the_loss_of_the_mean() -> None:
    logits, target = batch()
    of_mean = F.cross_entropy(logits.mean(1), target)
    assert experts_loss(F.cross_entropy, logits, target, reduction="mean") > of_mean + 0.01


def test_one_expert_is_the_plain_criterion() -> None:
    logits, target = batch()
    loss = experts_loss(F.cross_entropy, logits[:, :1], target)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0], target), rtol=0, atol=0)


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_a_criterion_for_each_expert(container) -> None:
    logits, target = batch()
    criteria = [nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.2, 0.4)]
    expected = sum(one(logits[:, i], target) for i, one in enumerate(criteria))
    torch.testing.assert_close(experts_loss(container(criteria), logits, target), expected)


def test_every_form_of_output_gives_the_same_loss() -> None:
    logits, target = batch()
    mean = logits.mean(1)
    raw = experts_loss(F.cross_entropy, logits, target)
    for output in (attach_expert_logits(mean, logits), ExpertOutput(mean, logits)):
        assert experts_loss(F.cross_entropy, output, target).equal(raw)
    with pytest.raises(MissingExpertLogitsError):
        experts_loss(F.cross_entropy, logits.mean(1), target)


def test_half_precision_reaches_the_criterion_as_float32() -> None:
    logits, target = batch()
    seen = []

    def criterion(expert: Tensor, target: Tensor) -> Tensor:
        seen.append(expert.dtype)
        return F.cross_entropy(expert, target)

    experts_loss(criterion, logits.bfloat16(), target).backward()
    assert seen == [torch.float32] * 3
    assert logits.grad.abs().sum() > 0


def test_custom_subclasses_of_cross_entropy_see_one_expert_at_a_time() -> None:
    shapes = []

    class Custom(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            shapes.append(tuple(logits.shape))
            return super().forward(logits, target)

    experts_loss(Custom(), *batch())
    assert shapes == [(8, 5)] * 3


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.MultiMarginLoss(),
        [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.2), F.multi_margin_loss],
        (nn.CrossEntropyLoss(), nn.MultiMarginLoss(), FocalLoss()),
        nn.ModuleList([nn.CrossEntropyLoss(), nn.MultiMarginLoss(), FocalLoss()]),
    ],
)
def test_compiles_whole(criterion) -> None:
    logits, target = batch()
    compiled = torch.compile(
        lambda z, y: experts_loss(criterion, z, y), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(logits, target), experts_loss(criterion, logits, target))


@pytest.mark.parametrize("label", [5, -1])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MultiMarginLoss()])
def test_index_out_of_range_is_named(label: int, criterion) -> None:
    logits, target = batch()
    target[3] = label
    with pytest.raises(ArgumentError, match="`target` to hold class indices from 0 to 4, but got"):
        experts_loss(criterion, logits, target)


def test_errors_of_the_criterion_itself_pass_through() -> None:
    def broken(logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        experts_loss(broken, *batch())


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda logits, _: logits, r"\[8\], but got a tensor of shape \[8, 5\].*must be averaged"),
        (lambda logits, target: 1.0, r"return a scalar tensor, or one loss.*but got 1\.0"),
        (
            [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")],
            r"losses of one shape for all experts, but got \[\], \[\], \[8\]",
        ),
        ([nn.CrossEntropyLoss()] * 2, "one entry for each of 3 experts, but got 2"),
        ([nn.CrossEntropyLoss(), None, nn.CrossEntropyLoss()], "callable.*got None"),
        (None, "callable.*got None"),
    ],
)
def test_criteria_that_do_not_fit_are_named(criterion, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"Expected argument `criterion`.*{message}"):
        experts_loss(criterion, *batch())


def test_unknown_reduction_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"`reduction`.*but got 'none'"):
        experts_loss(F.cross_entropy, *batch(), reduction="none")


def test_target_of_another_batch_is_named() -> None:
    logits, target = batch()
    with pytest.raises(ArgumentError, match=r"`target`.*indices \[8\].*of shape \[7\]"):
        experts_loss(F.cross_entropy, logits, target[:-1])


COUNTS = [40, 9, 4, 2]


def count_rows(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> list[int]:
    """The number of rows in each call of a class of losses, from here on."""
    rows: list[int] = []
    forward = kind.forward

    def counting(self: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
        rows.append(len(logits))
        return forward(self, logits, target)

    monkeypatch.setattr(kind, "forward", counting)
    return rows


@pytest.mark.parametrize(
    "criterion",
    [
        LDAMLoss(COUNTS, weight=[0.1, 1.0, 2.0, 5.0]),
        FocalLoss(gamma=2.0, weight=[0.1, 1.0, 2.0, 5.0]),
        LogitAdjustedLoss(COUNTS, tau=0.5),
        BalancedSoftmaxLoss(COUNTS),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_for_long_tails_see_all_experts_in_one_call(criterion, reduction, monkeypatch):
    experts = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 3, 0])
    calls = count_rows(monkeypatch, type(criterion))
    loss = experts_loss(criterion, experts, target, reduction=reduction)
    assert calls == [18]
    each = [criterion(experts[:, k], target) for k in range(3)]
    expected = sum(each) if reduction == "sum" else sum(each) / 3
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, experts)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected, experts)[0])


def test_a_subclass_is_asked_for_each_expert():
    class PerBatch(BalancedSoftmaxLoss):
        def forward(self, logits, target):
            return super().forward(logits, target) * len(logits)

    experts, target = torch.randn(6, 3, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    criterion = PerBatch(COUNTS)
    expected = sum(criterion(experts[:, k], target) for k in range(3))
    torch.testing.assert_close(experts_loss(criterion, experts, target), expected)


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, FocalLoss, partial(LDAMLoss, COUNTS)])
@pytest.mark.parametrize("how", ["hook", "hook before", "forward"])
def test_a_criterion_that_was_altered_is_asked_for_each_expert(make, how: str) -> None:
    """What a hook makes of a mean over one expert's rows is no mean over all experts' rows."""
    experts, target = torch.randn(6, 3, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    criterion = make()
    if how == "hook":
        criterion.register_forward_hook(lambda module, args, loss: (loss - 0.5).abs())
    elif how == "hook before":
        criterion.register_forward_pre_hook(lambda module, args: (args[0] / args[0].std(), args[1]))
    else:  # the hardest samples only
        criterion.forward = lambda z, y: F.cross_entropy(z, y, reduction="none").topk(2)[0].mean()
    expected = sum(criterion(experts[:, k], target) for k in range(3))
    torch.testing.assert_close(experts_loss(criterion, experts, target), expected)


def margin_in_place(logits: Tensor, target: Tensor) -> Tensor:
    logits[torch.arange(len(target)), target] -= 0.5
    return F.cross_entropy(logits, target)


def smoothed_in_place(logits: Tensor, target: Tensor) -> Tensor:
    target.mul_(0.9).add_(0.1 / logits.shape[1])
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("criterion", [margin_in_place, smoothed_in_place])
def test_what_a_criterion_writes_into_nobody_else_sees(criterion) -> None:
    logits, target = batch()
    if criterion is smoothed_in_place:
        target = F.one_hot(target, 5).float()
    given = target.clone()
    loss = RIDELoss(criterion, [50, 20, 10, 5, 2])
    total = loss(logits, target)
    copied = logits.detach().clone().requires_grad_()
    each = sum(criterion(copied[:, k].clone(), given.clone()) for k in range(3))
    expected = each + loss.diversity(copied, given)
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, copied.grad)
    assert torch.equal(target, given)

    several, mean = RIDELoss([criterion] * 3, [50, 20, 10, 5, 2]), logits.detach().mean(1)
    kept = mean.clone()
    with torch.no_grad():
        torch.testing.assert_close(several(mean, target), criterion(kept.clone(), given.clone()))
    assert torch.equal(mean, kept)
    assert torch.equal(target, given)


@pytest.mark.parametrize(
    "target",
    [
        torch.rand(8, 4),
        torch.rand(8) > 0.5,
        torch.randn(8, 2, dtype=torch.complex64),
        torch.arange(8, dtype=torch.int32),
        torch.full((8, 2), 9, dtype=torch.uint8),
    ],
)
def test_what_only_the_criterion_understands_reaches_it_as_it_is(target) -> None:
    seen = []

    def criterion(logits: Tensor, given: Tensor) -> Tensor:
        seen.append(given)
        return logits.mean()

    experts_loss(criterion, batch()[0], target)
    whole = target.dtype in (torch.int32, torch.uint8)  # small integers cannot index
    for given in seen:
        assert given.dtype == (torch.int64 if whole else target.dtype)
        assert torch.equal(given, target.to(given.dtype))
    assert len(seen) == 3


@pytest.mark.parametrize("criterion", [F.cross_entropy, lambda logits, target: logits.mean()])
def test_an_empty_batch_is_refused(criterion) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="`output` to be of at least one sample"):
        experts_loss(criterion, torch.zeros(0, 3, 5), empty)


@pytest.mark.parametrize("kind", [BalancedSoftmaxLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss])
def test_losses_for_long_tails_run_once_for_all_experts(kind, monkeypatch) -> None:
    criterion = FocalLoss() if kind is FocalLoss else kind([50, 20, 5])
    rows = count_rows(monkeypatch, kind)
    experts_loss(criterion, 5 * torch.randn(4, 3, 3), torch.tensor([0, 1, 2, 0]))
    assert rows == [12]


def test_a_class_to_ignore_is_not_blamed_for_another_mistake() -> None:
    target = torch.tensor([0, -100, 2])
    criterion = nn.CrossEntropyLoss(weight=torch.ones(5))  # one too many
    with pytest.raises(RuntimeError, match="weight tensor"):
        experts_loss(criterion, torch.randn(3, 2, 4), target)
    ignored = nn.CrossEntropyLoss(ignore_index=7)
    assert experts_loss(ignored, torch.randn(3, 2, 4), torch.tensor([0, 7, 2])).isfinite()
    with pytest.raises(ArgumentError, match="from 0 to 9"):
        experts_loss(ignored, torch.randn(3, 2, 4), torch.tensor([0, 7, 9]))


@pytest.mark.parametrize("criterion_of", [lambda one: one, lambda one: [one, one]])
def test_labels_are_blamed_for_what_torch_says_of_labels_only(criterion_of) -> None:
    logits, target = torch.randn(3, 2, 5), torch.tensor([0, 255, 2])
    for criterion in (
        partial(F.cross_entropy, ignore_index=255, weight=torch.ones(4)),
        nn.CrossEntropyLoss(ignore_index=255, weight=torch.ones(4)),
        lambda z, y: F.cross_entropy(z, y, torch.ones(4), ignore_index=255),
    ):
        with pytest.raises(RuntimeError, match="weight tensor"):
            experts_loss(criterion_of(criterion), logits, target)
    ignoring = criterion_of(partial(F.cross_entropy, ignore_index=255))
    with pytest.raises(ArgumentError, match="got values from 0 to 7"):
        experts_loss(ignoring, logits, torch.tensor([0, 255, 7]))
    if callable(ignoring):
        loss = RIDELoss(F.cross_entropy, [9, 5, 3, 2, 1])
        with pytest.raises(ArgumentError, match="got values from 0 to 7"):
            loss(logits.requires_grad_(), torch.tensor([0, 255, 7]), ignore_index=255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "build",
    [
        lambda weight: nn.CrossEntropyLoss(weight=weight),
        lambda weight: nn.CrossEntropyLoss(weight=weight, reduction="none", label_smoothing=0.1),
        lambda weight: partial(F.cross_entropy, weight=weight),
        lambda weight: nn.MultiMarginLoss(weight=weight),
        lambda weight: [nn.CrossEntropyLoss(weight=weight)] * 2,
    ],
)
def test_class_weights_of_half_precision_are_taken_as_the_logits_are(build, dtype) -> None:
    weight = torch.rand(4).to(dtype)
    target = torch.tensor([0, 1, 2, 3, 1])
    for precise in (torch.float32, torch.float64):
        logits = torch.randn(5, 2, 4).to(dtype).to(precise).requires_grad_()
        expected = experts_loss(build(weight.to(precise)), logits, target)
        assert torch.equal(experts_loss(build(weight), logits, target), expected)
        if precise == torch.float32:
            halves = logits.detach().to(dtype).requires_grad_()
            assert torch.equal(experts_loss(build(weight), halves, target), expected)
            criterion, exact = (
                RIDELoss(build(one), [9, 5, 3, 1]) for one in (weight, weight.float())
            )
            assert torch.equal(criterion(halves, target), exact(halves, target))
            with torch.no_grad():
                assert torch.equal(criterion(halves, target), exact(halves, target))
    assert weight.dtype == dtype


def test_a_cast_criterion_is_taken() -> None:
    criterion, logits = nn.CrossEntropyLoss(weight=torch.ones(4)).bfloat16(), torch.randn(5, 2, 4)
    target = torch.tensor([0, 1, 2, 3, 1])
    expected = experts_loss(F.cross_entropy, logits, target)
    torch.testing.assert_close(
        experts_loss(criterion, logits.bfloat16(), target), expected, rtol=2e-2, atol=0
    )
    assert criterion.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "criterion", [DiversityLoss([9, 5, 3, 1]), RIDELoss(nn.CrossEntropyLoss(), [9, 5, 3, 1])]
)
def test_a_loss_that_takes_the_models_output_is_no_criterion_of_one_expert(criterion) -> None:
    logits = torch.randn(5, 2, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 1])
    for given in (criterion, [criterion, criterion]):
        message = rf"of one expert.*\[5, 4\], but got {type(criterion).__name__}, which takes"
        with pytest.raises(ArgumentError, match=message):
            experts_loss(given, logits, target)
