"""Distillation per expert, and the authors' numbers for their form."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ride_plugin import (
    ArgumentError,
    DistillationLoss,
    DiversityLoss,
    ExpertOutput,
    MissingExpertLogitsError,
    experts_loss,
)
from ride_plugin._output import attach_expert_logits
from tests import oracles


def batch() -> tuple[Tensor, Tensor]:
    student = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    return student, 2 * torch.randn(6, 5, dtype=torch.float64)


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p = (student / temperature).log_softmax(-1)
    q = (teacher / temperature).softmax(-1)
    return temperature**2 * F.kl_div(log_p, q, reduction="batchmean")


def assert_same(ours: Tensor, expected: Tensor, student: Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    ours_grad, expected_grad = (torch.autograd.grad(x, student)[0] for x in (ours, expected))
    torch.testing.assert_close(ours_grad, expected_grad)


def test_each_expert_is_distilled_once() -> None:
    student, teacher = batch()
    ours = DistillationLoss(weight=0.7, temperature=2.0)(student, teacher)
    expected = 0.7 * sum(kd(student[:, i], teacher, 2.0) for i in range(3))
    assert_same(ours, expected, student)


def test_official_form_distils_the_mean_once() -> None:
    student, teacher = batch()
    ours = DistillationLoss(form="official")(student, teacher)
    assert_same(ours, kd(student.mean(1), teacher, 1.5), student)


@pytest.mark.parametrize("phase", ["before", "after"])
def test_official_pieces_equal_the_reference(losses, phase: str) -> None:
    student, target = losses["expert_logits"].requires_grad_(), losses["target"].long()
    weight = losses["drw_class_weights"] if phase == "after" else None
    start_epoch = 0 if phase == "after" else 1
    diversity = DiversityLoss(
        losses["class_counts"], weight=0.45, form="official", start_epoch=start_epoch
    )
    distillation = DistillationLoss(temperature=1.5, form="official")

    def ldam(expert: Tensor, target: Tensor) -> Tensor:
        return oracles.ldam(expert, target, losses["class_counts"], weight)

    loss = experts_loss(ldam, student, target) + diversity(student, target)
    loss = 3 * (loss + distillation(student, losses["teacher_logits"]))  # once for each expert
    loss.backward()
    torch.testing.assert_close(
        loss, losses[f"ride_distill_{phase}_drw_loss"], rtol=1e-5, atol=0, check_dtype=False
    )
    reference = losses[f"ride_distill_{phase}_drw_grad"]
    assert (student.grad[: len(reference)] - reference).norm() <= 1e-5 * reference.norm()


def test_every_form_of_teacher_output_gives_the_same_loss() -> None:
    student, teacher = batch()
    loss = DistillationLoss()
    expected = loss(student, teacher)
    experts = teacher[:, None] + torch.tensor([-1.0, 1.0])[None, :, None]
    torch.testing.assert_close(loss(student, experts), expected)
    for output in (ExpertOutput(teacher, experts), (teacher, experts)):
        assert loss(student, output).equal(expected)
    assert loss(student, attach_expert_logits(teacher, experts)).equal(expected)


def test_student_that_equals_its_teacher_has_no_loss() -> None:
    student = torch.randn(4, 1, 5).repeat(1, 3, 1)
    assert DistillationLoss()(student, student[:, 0]).abs() < 1e-12


@pytest.mark.parametrize("form", ["per_expert", "official"])
def test_teacher_gets_no_gradient(form) -> None:
    student, teacher = batch()
    teacher.requires_grad_()
    DistillationLoss(form=form)(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DistillationLoss()(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.equal(DistillationLoss()(student.float(), teacher.float()))


def test_bare_student_logits_are_refused() -> None:
    with pytest.raises(MissingExpertLogitsError):
        DistillationLoss()(torch.zeros(6, 5), torch.zeros(6, 5))


@pytest.mark.parametrize("shape", [(6, 4), (5, 5), (6,)])
def test_teacher_that_does_not_fit_is_named(shape) -> None:
    with pytest.raises(ArgumentError, match=r"`teacher_output`.*\[(6, 5|B, C)\]"):
        DistillationLoss()(batch()[0], torch.zeros(shape))


def test_other_unfit_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"`teacher_output`.*but got \[1.0\]"):
        DistillationLoss()(batch()[0], [1.0])
    with pytest.raises(ArgumentError, match="`output` to be of at least one sample"):
        DistillationLoss()(torch.zeros(0, 3, 5), torch.zeros(0, 5))


@pytest.mark.parametrize(
    ("argument", "value"), [("weight", -1.0), ("temperature", 0.0), ("form", "paper")]
)
def test_arguments_out_of_range_are_named(argument: str, value) -> None:
    with pytest.raises(ArgumentError, match=f"Expected argument `{argument}`.*but got '?{value}"):
        DistillationLoss(**{argument: value})


def test_temperature_and_weight_may_be_small() -> None:
    student, teacher = batch()
    loss = DistillationLoss(temperature=0.5, weight=0.25)(student, teacher)
    expected = sum(kd(student[:, i], teacher, 0.5) for i in range(student.shape[1]))
    torch.testing.assert_close(loss, 0.25 * expected)
    assert DistillationLoss(weight=0)(student, teacher) == 0


def test_a_teacher_whose_first_tensor_may_be_features_is_refused() -> None:
    student, teacher = batch()
    for pair in ((teacher, teacher), (torch.zeros(6, 5, 2), teacher), (teacher, None)):
        with pytest.raises(ArgumentError, match="`teacher_output`"):
            DistillationLoss()(student, pair)


# The compiler itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["per_expert", "official"])
def test_compiles_whole(form) -> None:
    student, teacher = batch()
    loss = DistillationLoss(form=form)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for output in (student, ExpertOutput(student.detach().mean(1), student)):
        assert_same(compiled(output, teacher), loss(output, teacher), student)


@pytest.mark.parametrize("form", ["per_expert", "official"])
def test_a_teacher_that_returns_probabilities_is_warned_of_at_the_first_call(form) -> None:
    student, teacher = torch.randn(8, 3, 5), torch.randn(8, 5)
    distillation = DistillationLoss(form=form)
    with pytest.warns(UserWarning, match="`teacher_output` sum to one.*before its softmax"):
        distillation(student, teacher.softmax(1))
    distillation(student, teacher.softmax(1))
    logarithms = DistillationLoss(form=form)(student, teacher.log_softmax(1))
    torch.testing.assert_close(logarithms, DistillationLoss(form=form)(student, teacher))
