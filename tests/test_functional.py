"""The equations against naive recomputation, at their limits, and at the edge of the numbers."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from ride_plugin import ArgumentError, DiversityLoss, _numerics, functional
from tests import oracles

BATCH, CLASSES = 6, 7


def make_logits(num_experts: int, spread: float = 3.0, classes: int = CLASSES) -> Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    shape = (BATCH, num_experts, classes)
    logits = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


def temperatures() -> Tensor:
    return torch.linspace(0.5, 1.2, BATCH, dtype=torch.float64)


def assert_same(ours: Tensor, oracle: Tensor, logits: Tensor) -> None:
    weights = torch.linspace(-1, 2, BATCH, dtype=torch.float64)
    torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-12)
    (ours_grad,) = torch.autograd.grad(ours @ weights, logits)
    (oracle_grad,) = torch.autograd.grad(oracle @ weights, logits)
    torch.testing.assert_close(ours_grad, oracle_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("num_experts", [2, 3, 5])
@pytest.mark.parametrize("detach_others", [True, False])
def test_pairwise_kl_equals_loop_over_pairs(num_experts: int, detach_others: bool) -> None:
    logits, temperature = make_logits(num_experts), temperatures()
    ours = functional.pairwise_kl(logits, temperature, detach_others=detach_others)
    assert_same(ours, oracles.pairwise_kl(logits, temperature, detach_others), logits)


@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_kl_from_mean_equals_loop_over_experts(num_experts: int) -> None:
    logits = make_logits(num_experts)
    temperature = torch.linspace(0.6, 1.0, CLASSES, dtype=torch.float64)
    ours = functional.kl_from_mean(logits, temperature)
    assert_same(ours, oracles.kl_from_mean(logits, temperature), logits)


def test_distillation_kl_equals_loop_over_experts() -> None:
    logits, teacher = make_logits(3), make_logits(1)[:, 0]
    ours = functional.distillation_kl(logits, teacher, 1.5)
    oracle = sum(1.5**2 * oracles.kl(teacher.detach() / 1.5, logits[:, i] / 1.5) for i in range(3))
    assert_same(ours, oracle, logits)
    assert not torch.autograd.grad(ours.sum(), teacher, allow_unused=True)[0]


def test_gradient_check_of_what_is_a_true_gradient() -> None:
    logits, temperature = make_logits(3, classes=4), temperatures()
    torch.autograd.gradcheck(
        lambda z: functional.pairwise_kl(z, temperature, detach_others=False), logits
    )
    reference = make_logits(1, classes=4)[:, 0].detach()
    torch.autograd.gradcheck(lambda z: functional.kl_from_reference(z, reference, 0.8), logits)


def test_gradient_with_others_constant_is_that_of_each_expert_alone() -> None:
    logits = make_logits(3)
    (ours,) = torch.autograd.grad(functional.pairwise_kl(logits).sum(), logits)
    log_p = logits.detach().log_softmax(-1)
    for i in range(3):
        others = log_p[:, [j for j in range(3) if j != i]].mean(1)
        d, p = log_p[:, i] - others, log_p[:, i].exp()
        torch.testing.assert_close(ours[:, i], p * (d - (p * d).sum(-1, keepdim=True)))


DIVERGENCES = [
    functional.pairwise_kl,
    functional.kl_from_mean,
    lambda z: functional.kl_from_reference(z, z[:, 0].detach().flip(1)),
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_second_derivative_is_refused_instead_of_wrong(divergence) -> None:
    logits = make_logits(2)
    (once,) = torch.autograd.grad(divergence(logits).sum(), logits, create_graph=True)
    (plain,) = torch.autograd.grad(divergence(logits).sum(), logits)
    assert torch.equal(once, plain)  # the first one alone may be asked for in any way
    for penalty in (once.pow(2).sum(), divergence(logits).sum() + once.sum()):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            penalty.backward(retain_graph=True)
    weight = torch.ones(BATCH, dtype=logits.dtype, requires_grad=True)
    (once,) = torch.autograd.grad(divergence(logits) @ weight, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        once.sum().backward()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda z: torch.func.grad(lambda y: divergence(y).sum())(z).sum())(logits)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_functional_gradient_is_that_of_autograd(divergence) -> None:
    logits = make_logits(3)
    (expected,) = torch.autograd.grad(divergence(logits).sum(), logits)
    detached = logits.detach()
    got, value = torch.func.grad_and_value(lambda z: divergence(z).sum())(detached)
    assert torch.equal(got, expected)
    assert torch.equal(value, divergence(detached).sum())


@pytest.mark.parametrize("divergence", [functional.pairwise_kl, functional.kl_from_mean])
def test_single_expert_and_equal_experts_give_zero_and_no_gradient(divergence) -> None:
    for logits in (make_logits(1), make_logits(1).detach().repeat(1, 4, 1).requires_grad_()):
        value = divergence(logits)
        value.sum().backward()
        assert value.abs().max() <= 1e-30
        assert logits.grad.abs().max() <= 1e-15
    single = make_logits(1).float().detach().requires_grad_()
    assert divergence(single).equal(torch.zeros(BATCH))


@pytest.mark.parametrize("temperature", [1.0, 0.77])
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_close_experts_keep_their_digits_in_float32(classes: int, temperature: float) -> None:
    base = torch.randn(64, 1, classes)
    logits = base + 1e-3 * torch.randn(64, 3, classes)
    assert_digits = {"rtol": 1e-5, "atol": 0.0, "check_dtype": False}
    pairwise = functional.pairwise_kl(logits, temperature)
    exact = functional.pairwise_kl(logits.double(), temperature)
    torch.testing.assert_close(pairwise, exact, **assert_digits)
    mean = functional.kl_from_mean(logits, temperature).mean()
    exact = functional.kl_from_mean(logits.double(), temperature).mean()
    torch.testing.assert_close(mean, exact, **assert_digits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("detach_others", [True, False])
def test_extreme_logits_and_temperatures_stay_finite(dtype, temperature, detach_others) -> None:
    logits = torch.tensor([[[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 1e4]]], dtype=dtype)
    logits.requires_grad_()
    value = functional.pairwise_kl(logits, temperature, detach_others=detach_others)
    value = value + functional.kl_from_mean(logits, temperature)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


def test_extreme_values_are_right_and_not_only_finite() -> None:
    logits = torch.tensor([[[1e4, 0.0], [0.0, 1e4]]])
    torch.testing.assert_close(functional.pairwise_kl(logits), torch.tensor([2e4]))
    expected = torch.tensor([2 * (5e3 - math.log(2))])
    torch.testing.assert_close(functional.kl_from_mean(logits), expected)


@pytest.mark.parametrize("divergence", [functional.pairwise_kl, functional.kl_from_mean])
def test_class_masked_in_all_experts_is_as_if_it_were_not_there(divergence) -> None:
    without = make_logits(3)
    mask = torch.full((BATCH, 3, 1), -torch.inf, dtype=torch.float64)
    masked = torch.cat([without.detach(), mask], dim=-1).requires_grad_()
    divergence(masked).sum().backward()
    divergence(without).sum().backward()
    torch.testing.assert_close(divergence(masked), divergence(without))
    torch.testing.assert_close(masked.grad[..., :-1], without.grad)
    assert masked.grad[..., -1].eq(0).all()


@pytest.mark.parametrize("divergence", [functional.pairwise_kl, functional.kl_from_mean])
def test_nan_logits_are_not_hidden(divergence) -> None:
    logits = make_logits(3).detach()
    logits[2, 1, 0] = math.nan
    assert divergence(logits).isnan().tolist() == [False, False, True, False, False, False]


MASKS = (-torch.inf, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_masked_in_some_experts_only_has_no_finite_divergence(mask, dtype) -> None:
    logits = make_logits(3).detach().to(dtype)
    logits[2, 1, 4] = mask
    message = r"only classes that all experts mask, but some expert masks class 4 of sample 2 "
    with pytest.raises(ArgumentError, match=message):
        functional.pairwise_kl(logits)
    assert functional.kl_from_mean(logits).isfinite().all()  # the mean masks it, too
    with pytest.raises(ArgumentError, match="only classes that the reference masks, but some"):
        functional.distillation_kl(logits, torch.zeros(BATCH, logits.shape[2], dtype=dtype))
    logits[2, :, 4] = mask
    assert functional.pairwise_kl(logits).isfinite().all()


def test_teacher_that_masks_a_class_the_student_knows() -> None:
    student = torch.tensor([[[1.0, 2.0, 3.0]]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.0, -torch.inf]])
    value = functional.kl_from_reference(student, teacher)
    q = teacher.softmax(-1)[0, :2]
    log_p = student.detach().log_softmax(-1)[0, 0, :2]
    torch.testing.assert_close(value.detach(), (q * (q.log() - log_p)).sum()[None])
    value.backward()
    torch.testing.assert_close(
        student.grad[0], student.detach()[0].softmax(-1) - teacher.softmax(-1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = make_logits(3).detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = functional.pairwise_kl(logits, 0.9)
    assert value.dtype == torch.float32
    assert value.equal(functional.pairwise_kl(logits.float(), 0.9))
    value.sum().backward()
    assert logits.grad.dtype == dtype


def test_psi_has_mean_one_and_follows_the_counts() -> None:
    counts = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    psi = functional.class_balance(counts, gamma=0.05)
    expected = [0.05 * n / 37 + 0.95 for n in (100, 10, 1)]
    torch.testing.assert_close(psi, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(psi.mean(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("form", ["paper", "official"])
def test_most_frequent_class_has_the_base_temperature(form) -> None:
    counts = torch.tensor([5.0, 100.0, 10.0])
    temperature = functional.class_temperatures(counts, eta=1.3, gamma=0.1, form=form)
    assert temperature.argmax() == 1
    torch.testing.assert_close(temperature.max(), torch.tensor(1.3))


@pytest.mark.parametrize("form", ["paper", "official"])
def test_uniform_counts_give_one_temperature(form) -> None:
    temperature = functional.class_temperatures(
        torch.full((4,), 7.0), eta=1.0, gamma=0.05, form=form
    )
    torch.testing.assert_close(temperature, torch.ones(4))


def test_official_temperatures_equal_the_reference(losses) -> None:
    ours = functional.class_temperatures(
        losses["class_counts"].double(), eta=1.0, gamma=0.05, form="official"
    )
    torch.testing.assert_close(ours.float(), losses["diversity_temperature_after_drw"])


def test_one_hot_targets_look_up_what_indices_look_up() -> None:
    temperature, target = torch.linspace(0.7, 1.0, 5), torch.tensor([4, 0, 2])
    hard = functional.sample_temperatures(temperature, target)
    assert hard.equal(temperature[target])
    one_hot = torch.nn.functional.one_hot(target, 5).float()
    assert functional.sample_temperatures(temperature, one_hot).equal(hard)
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    expected = 0.3 * hard + 0.7 * hard.flip(0)
    torch.testing.assert_close(functional.sample_temperatures(temperature, mixed), expected)


def test_teacher_of_other_shape_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"`teacher_logits`.*\[6, 7\].*\[6, 8\]"):
        functional.distillation_kl(make_logits(3), torch.zeros(6, 8))


@pytest.mark.parametrize("rows", [1, 4])  # 4 leaves a last slice of 2
def test_large_batches_in_slices_equal_the_whole(rows: int, monkeypatch) -> None:
    logits, teacher = make_logits(3), make_logits(1)[:, 0].detach()
    per_class = torch.linspace(0.6, 1.0, CLASSES, dtype=torch.float64)
    terms = [
        lambda: functional.pairwise_kl(logits, temperatures()),
        lambda: functional.pairwise_kl(logits, 0.8, detach_others=False),
        lambda: functional.kl_from_mean(logits, per_class),
        lambda: functional.distillation_kl(logits, teacher),
    ]
    whole = [term() for term in terms]
    calls: list[int] = []
    compare = functional.compare

    def counted(experts: Tensor, *others: Tensor) -> _numerics.Comparison:
        calls.append(len(experts))
        return compare(experts, *others)

    monkeypatch.setattr(functional, "compare", counted)
    monkeypatch.setattr(_numerics, "_SLICE_BYTES", rows * logits[0].numel() * 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for term, expected in zip(terms, whole, strict=True):
        calls.clear()
        assert_same(term(), expected, logits)
        assert calls == {1: [1] * BATCH, 4: [4, 2]}[rows]


@pytest.mark.parametrize("divergence", [functional.pairwise_kl, functional.kl_from_mean])
def test_peak_memory_is_at_most_six_copies_of_the_logits(divergence) -> None:
    logits = torch.randn(64, 4, 500, requires_grad=True)
    with profile(profile_memory=True) as profiler:
        divergence(
            logits, torch.rand(64 if divergence is functional.pairwise_kl else 500) + 0.5
        ).mean().backward()
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    copies = 1 + peak / (logits.numel() * logits.element_size())  # one is the logits themselves
    assert 2 < copies <= 6.1


def test_a_reference_of_another_shape_is_refused() -> None:
    with pytest.raises(ArgumentError, match="reference_logits"):
        functional.kl_from_reference(torch.randn(4, 2, 3), torch.randn(1, 3))


def test_weights_of_the_routing_loss_may_be_small() -> None:
    gates, targets = torch.randn(4, 2), torch.rand(4, 2) < 0.5
    assert functional.routing_loss(gates, targets, 0.5, 0.5).isfinite()


@pytest.mark.parametrize(
    "targets",
    [torch.ones(4, 2), torch.ones(4, dtype=torch.bool), [[True, False]] * 4],
)
def test_targets_of_the_routing_loss_are_a_boolean_matrix(targets) -> None:
    with pytest.raises(ArgumentError, match="targets"):
        functional.routing_loss(torch.randn(4, 2), targets)


def test_class_balance_of_a_list_is_float32_and_of_a_tensor_in_its_precision() -> None:
    assert functional.class_balance([3, 2, 1], 0.1).dtype == torch.float32
    assert functional.class_balance(torch.tensor([3.0, 2, 1]).double(), 0.1).dtype == torch.float64


def test_a_temperature_of_exactly_zero_is_refused() -> None:
    with pytest.raises(ArgumentError, match="must be below 1"):
        functional.class_temperatures([30, 10], eta=1.0, gamma=1.0, form="paper")


def test_a_teacher_in_half_precision_is_compared_in_float32() -> None:
    logits, teacher = make_logits(3).float(), make_logits(1)[:, 0].half()
    torch.testing.assert_close(
        functional.distillation_kl(logits, teacher),
        functional.distillation_kl(logits, teacher.float()),
        rtol=1e-6,
        atol=0,
    )


BAD_TEMPERATURES = (-0.5, 0.0, float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("bad", BAD_TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_of_temperatures_is_positive_and_finite(bad: float, dtype: torch.dtype) -> None:
    """Below zero the divergence has the wrong sign of every logit, and a number all the same."""
    logits, good = torch.randn(3, 2, 4), torch.ones(4, dtype=dtype)
    by_class = good.index_fill(0, torch.tensor([2]), bad)
    calls = (
        lambda: functional.pairwise_kl(logits, by_class[:3]),
        lambda: functional.pairwise_kl(logits, by_class[2]),
        lambda: functional.kl_from_mean(logits, by_class),
        lambda: functional.kl_from_reference(logits, logits[:, 0], by_class),
        lambda: functional.sample_temperatures(by_class, torch.tensor([0, 1, 3])),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match="`temperature` to hold positive finite numbers"):
            call()
    functional.pairwise_kl(logits, good[:3])
    functional.sample_temperatures(good[:3], torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("form", ["paper", "official"])
def test_values_are_not_asked_for_where_there_are_none(form: Literal["paper", "official"]) -> None:
    loss = DiversityLoss([5, 3, 2], form=form)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.randn(4, 3, 3, requires_grad=True)
        loss(logits, torch.zeros(4, dtype=torch.long)).backward()
        assert logits.grad is not None
    gathered = torch.vmap(functional.sample_temperatures)(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [1, 1]])
    )
    assert gathered.tolist() == [[1.0, 2.0], [4.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_means_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    experts = torch.randn(50, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    means = functional.running_means(experts)
    assert means.dtype == dtype
    for count in range(1, 7):
        exact = experts[:, :count].double().mean(1)
        assert (means[:, count - 1] - exact).abs().max() <= (
            exact.abs().max() * torch.finfo(dtype).eps / 2 * 1.01
        )
        assert torch.equal(means[:, count - 1], functional.mean_logits(experts[:, :count]))
    large = torch.full((1, 3, 2), 6e4, dtype=dtype)
    assert functional.running_means(large).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 3, 0)])
def test_no_experts_and_no_classes_are_refused(shape: tuple[int, int, int]) -> None:
    """The mean of no experts is NaN, and their divergence a zero that nobody computed."""
    none, teacher = torch.zeros(shape), torch.zeros(shape[0], shape[2])
    calls = (
        lambda: functional.mean_logits(none),
        lambda: functional.running_means(none),
        lambda: functional.pairwise_kl(none),
        lambda: functional.kl_from_mean(none),
        lambda: functional.kl_from_reference(none, teacher),
        lambda: functional.distillation_kl(none, teacher),
        lambda: functional.routing_targets(none, torch.zeros(2, dtype=torch.long)),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match=r"at least one expert and class|two experts"):
            call()
    assert functional.pairwise_kl(torch.zeros(0, 3, 5)).shape == (0,)


def test_what_is_merely_true_does_not_detach_others() -> None:
    with pytest.raises(ArgumentError, match="`detach_others` to be True or False"):
        functional.pairwise_kl(torch.zeros(2, 3, 5), detach_others="False")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_temperatures_of_half_precision_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    half = torch.tensor([1.9, 1.3, 0.7, 0.51, 1.07]).to(dtype)
    assert functional.kl_from_mean(logits, half).equal(
        functional.kl_from_mean(logits, half.float())
    )
    mixed = torch.tensor([[0.3, 0.1, 0.2, 0.15, 0.25]]).to(dtype)
    found = functional.sample_temperatures(half, mixed)
    assert found.equal(functional.sample_temperatures(half.float(), mixed.float()))
    indexed = functional.sample_temperatures(half, torch.tensor([2]))
    assert indexed.dtype == torch.float32
