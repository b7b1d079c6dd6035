"""The loss users call: forms of input, both phases, and the authors' numbers."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ride_plugin import (
    ArgumentError,
    DiversityLoss,
    ExpertOutput,
    MissingExpertLogitsError,
    TemperatureSchedule,
    experts_loss,
)
from ride_plugin._output import attach_expert_logits
from tests import oracles

COUNTS = [50, 20, 5, 2]
FORMS = ["paper", "official"]


def batch(num_experts: int = 3) -> tuple[Tensor, Tensor]:
    logits = torch.randn(6, num_experts, 4, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([0, 1, 2, 3, 0, 2])


@pytest.mark.parametrize(
    ("form", "detach_others"), [("official", True), ("paper", True), ("paper", False)]
)
def test_vmap_gives_the_gradients_of_each_sample(form, detach_others) -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS, form=form, detach_others=detach_others).double()
    gradient = torch.func.grad(lambda z, y: loss(z[None], y[None]))
    got = torch.func.vmap(gradient)(logits.detach(), target)
    loss(logits, target).backward()
    torch.testing.assert_close(got, len(target) * logits.grad)


@pytest.mark.parametrize("detach_others", [True, False])
@pytest.mark.parametrize("start_epoch", [0, 1])
def test_paper_form_is_minus_weight_times_mean_divergence(detach_others, start_epoch) -> None:
    logits, target = batch()
    loss = DiversityLoss(
        COUNTS, weight=0.3, start_epoch=start_epoch, form="paper", detach_others=detach_others
    ).double()
    temperature = loss.schedule.temperature[target]
    assert (temperature == 1).all() == (start_epoch == 1)
    expected = -0.3 * oracles.pairwise_kl(logits, temperature, detach_others).mean()
    ours = loss(logits, target)
    torch.testing.assert_close(ours, expected)
    ours_grad, expected_grad = (torch.autograd.grad(x, logits)[0] for x in (ours, expected))
    torch.testing.assert_close(ours_grad, expected_grad)


@pytest.mark.parametrize("phase", ["before", "after"])
def test_official_form_with_ldam_equals_the_reference(losses, phase: str) -> None:
    logits = losses["expert_logits"].requires_grad_()
    weight = losses["drw_class_weights"] if phase == "after" else None
    diversity = DiversityLoss(losses["class_counts"], weight=0.45, form="official", start_epoch=160)
    for _ in range(160 if phase == "after" else 159):
        diversity.step()

    def ldam(expert: Tensor, target: Tensor) -> Tensor:
        return oracles.ldam(expert, target, losses["class_counts"], weight)

    target = losses["target"].long()
    loss = experts_loss(ldam, logits, target) + diversity(logits, target)
    loss.backward()
    torch.testing.assert_close(
        loss, losses[f"ride_ldam_{phase}_drw_loss"], rtol=1e-5, atol=0, check_dtype=False
    )
    reference = losses[f"ride_ldam_{phase}_drw_grad"]
    assert (logits.grad[: len(reference)] - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_output_gives_the_same_loss(form) -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS, form=form)
    raw = loss(logits, target)
    mean = logits.mean(1)
    assert raw.dim() == 0
    assert loss(attach_expert_logits(mean, logits), target).equal(raw)
    assert loss(ExpertOutput(mean, logits), target).equal(raw)


def test_bare_logits_are_refused() -> None:
    with pytest.raises(MissingExpertLogitsError, match=r"expert logits \[B, E, C\]"):
        DiversityLoss(COUNTS)(torch.zeros(6, 4), batch()[1])


@pytest.mark.parametrize("form", FORMS)
def test_one_hot_targets_equal_indices(form) -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS, form=form)
    one_hot = nn.functional.one_hot(target, 4).double()
    torch.testing.assert_close(loss(logits, one_hot), loss(logits, target))


def test_mixed_targets_use_the_expected_temperature() -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS, weight=1.0, form="paper").double()
    one_hot = nn.functional.one_hot(target, 4).double()
    mixed = 0.4 * one_hot + 0.6 * one_hot.flip(0)
    temperature = loss.schedule.temperature[target]
    temperature = 0.4 * temperature + 0.6 * temperature.flip(0)
    expected = -oracles.pairwise_kl(logits, temperature, True).mean()
    torch.testing.assert_close(loss(logits, mixed), expected)


@pytest.mark.parametrize("form", FORMS)
def test_single_expert_gives_exactly_zero(form) -> None:
    logits, target = batch(num_experts=1)
    loss = DiversityLoss(COUNTS, form=form)(logits.float(), target)
    loss.backward()
    assert loss == 0
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_more_disagreement_lowers_the_loss(form) -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS, form=form)
    mean = logits.mean(1, keepdim=True)
    near, far = loss(mean + 0.5 * (logits - mean), target), loss(logits, target)
    assert far < near < 0


def test_autocast_computes_in_float32() -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS)
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(low, target)
        one_hot = loss(low, nn.functional.one_hot(target, 4).float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(low.float(), target), rtol=0, atol=0)
    torch.testing.assert_close(one_hot, value)


def test_follows_to_float64_and_device() -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS).to(torch.float64)
    assert loss(logits, target).dtype == torch.float64
    assert loss.schedule.temperature.dtype == torch.float64
    assert DiversityLoss(COUNTS).to("meta").schedule.temperature.device.type == "meta"


def test_state_dict_holds_the_epoch_and_restores_it() -> None:
    logits, target = batch()
    trained, resumed = (DiversityLoss(COUNTS, start_epoch=2) for _ in range(2))
    before = trained(logits, target)
    trained.step()
    trained.step()
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.schedule.last_epoch == 2
    assert resumed(logits, target).equal(trained(logits, target))
    assert not before.equal(trained(logits, target))


def test_own_schedule_is_used_and_stepped() -> None:
    schedule = TemperatureSchedule(COUNTS, gamma=0.1, start_epoch=1)
    loss = DiversityLoss(COUNTS, temperature=schedule)
    loss.step()
    assert loss.schedule is schedule
    assert schedule.last_epoch == 1
    copied = copy.deepcopy(loss)
    copied.step()
    assert schedule.last_epoch == 1


# The compiler itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_and_once_while_temperatures_change(form) -> None:
    logits, target = batch()
    loss = DiversityLoss(COUNTS, form=form, start_epoch=1)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            values.append(compiled(logits, target))
            expected = loss(logits, target)
            torch.testing.assert_close(values[-1], expected)
            ours, eager = (torch.autograd.grad(x, logits)[0] for x in (values[-1], expected))
            torch.testing.assert_close(ours, eager)
            loss.step()
    assert not values[0].equal(values[1])


class _CountKernels(TorchDispatchMode):
    """Count the operations that compute: neither views, detaching nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "detach" in func.__name__ or "empty" in func.__name__):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_operations_are_few_flat_in_experts_and_read_nothing_back(form) -> None:
    numbers = []
    for num_experts in (2, 8):
        # Without data, as on an accelerator: reading a value back would raise.
        logits, target = (x.detach().to("meta") for x in batch(num_experts))
        loss = DiversityLoss(COUNTS, form=form).to("meta")
        with _CountKernels() as kernels:
            loss(logits.requires_grad_(), target).backward()
        numbers.append(len(kernels.names))
    assert numbers[0] == numbers[1]
    assert 20 < numbers[0] <= 40


@pytest.mark.parametrize("target", [[0, 1, 4, 0, 0, 0], [0, -1, 2, 0, 0, 0]])
def test_index_out_of_range_is_named(target: list[int]) -> None:
    with pytest.raises(ArgumentError, match="`target` to hold class indices from 0 to 3, but got"):
        DiversityLoss(COUNTS, form="paper")(batch()[0], torch.tensor(target))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(5, dtype=torch.long), r"indices \[6\].*of shape \[5\] and dtype torch.int64"),
        (torch.zeros(6, 4, dtype=torch.long), r"of shape \[6, 4\] and dtype torch.int64"),
        (torch.zeros(6, dtype=torch.bool), "torch.bool"),
        (torch.zeros(6), r"probabilities \[6, 4\], but got a tensor of shape \[6\]"),
        (torch.ones(6, 4), "sum to one in each row, but got sums from 4 to 4"),
        (torch.tensor([[2.0, -1.0, 0, 0]]).repeat(6, 1), "values down to -1"),
        ([0, 1, 2, 3, 0, 1], r"but got \[0, 1"),
    ],
)
def test_target_of_the_wrong_form_is_named(target, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"Expected argument `target`.*{message}"):
        DiversityLoss(COUNTS, form="paper")(batch()[0], target)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 3, 5), r"`class_counts` .* each of 5 classes.*\[6, 3, 5\].* it has 4"),
        ((0, 3, 4), r"`output` .* at least one sample.*\[0, 3, 4\]"),
    ],
)
def test_logits_that_do_not_fit_the_counts_are_named(shape, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        DiversityLoss(COUNTS)(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


def test_defaults_are_those_of_the_schedule_and_safe_to_add_to_any_loop() -> None:
    loss, schedule = DiversityLoss(COUNTS), TemperatureSchedule(COUNTS)
    assert repr(loss.schedule) == repr(schedule)
    assert (loss.form, schedule.form) == ("official", "official")
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 9.0, 0, 0]]]).requires_grad_()
    loss(logits, torch.tensor([0])).backward()
    assert logits.grad.abs().sum(-1).max() <= 2 * loss.weight  # bounded, however confident


def test_negative_weight_is_refused_with_the_sign_explained() -> None:
    with pytest.raises(ArgumentError, match=r"`weight`.*-0\.45.*minus sign built in"):
        DiversityLoss(COUNTS, weight=-0.45)
    loss = DiversityLoss(COUNTS, weight=0.45)
    with pytest.raises(ArgumentError, match=r"`weight`.*-0\.2.*minus sign built in"):
        loss.weight = -0.2  # while training
    assert loss.weight == 0.45


def test_own_schedule_and_its_arguments_do_not_mix() -> None:
    schedule = TemperatureSchedule(COUNTS)
    for name, value in (("gamma", 0.02), ("gamma", 0.05), ("eta", 1.0), ("start_epoch", 0)):
        with pytest.raises(ArgumentError, match=f"`{name}` to be left alone when `temperature`"):
            DiversityLoss(COUNTS, **{name: value}, temperature=schedule)
    with pytest.raises(ArgumentError, match="`temperature` to be a TemperatureSchedule, but got 2"):
        DiversityLoss(COUNTS, temperature=2)
    with pytest.raises(ArgumentError, match="schedule for 4 classes with form='paper'"):
        DiversityLoss(COUNTS, form="paper", temperature=schedule)
    with pytest.raises(ArgumentError, match=r"schedule for 2 classes.*got one for 4"):
        DiversityLoss([1, 2], temperature=schedule)


def test_a_fifth_of_the_divergence_counts_by_default() -> None:
    logits, target = torch.randn(4, 3, 5), torch.tensor([0, 1, 2, 3])
    counts = [40, 20, 9, 4, 2]
    whole = DiversityLoss(counts, weight=1.0)(logits, target)
    torch.testing.assert_close(DiversityLoss(counts)(logits, target), 0.2 * whole)
    assert DiversityLoss(counts, weight=0)(logits, target) == 0


def test_settings_that_would_change_nothing_are_refused() -> None:
    with pytest.raises(
        ArgumentError, match="`detach_others` to be left alone with form='official'"
    ):
        DiversityLoss(COUNTS, detach_others=False)
    loss = DiversityLoss(COUNTS)
    loss.detach_others = False  # on the way to the paper's form, say
    with pytest.raises(ArgumentError, match="`detach_others` to be left alone"):
        loss(torch.randn(2, 3, len(COUNTS)), torch.zeros(2, dtype=torch.long))
    loss.form = "paper"
    assert loss(torch.randn(2, 3, len(COUNTS)), torch.zeros(2, dtype=torch.long)) <= 0
    schedule = TemperatureSchedule([2.0 * count for count in COUNTS])
    DiversityLoss(COUNTS, temperature=schedule)
    with pytest.raises(ArgumentError, match="`class_counts` to be those of the schedule"):
        DiversityLoss([*COUNTS[:-1], 10 * COUNTS[-1]], temperature=schedule)
