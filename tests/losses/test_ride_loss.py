"""One criterion in place of a training code's own: both modes, any criterion, epochs, state."""

import copy
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
    RIDEWrapper,
    expert_logits,
    experts_loss,
)
from ride_plugin.longtail import (
    BalancedSoftmaxLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
)
from ride_plugin.losses import TemperatureSchedule

from ..backbones import mlp

COUNTS = [50, 20, 5, 2]
TARGET = torch.tensor([0, 1, 2, 3, 0, 2])


def output() -> ExpertOutput:
    experts = torch.randn(6, 3, 4, requires_grad=True)
    return ExpertOutput(experts.mean(1), experts)


CRITERIA = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MultiMarginLoss(),
    F.cross_entropy,
    lambda logits, target: F.nll_loss(F.log_softmax(logits, 1), target),
    LDAMLoss(COUNTS),
    BalancedSoftmaxLoss(COUNTS),
    FocalLoss(),
]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_with_gradients_it_is_the_loss_of_every_expert_and_the_diversity(criterion) -> None:
    out = output()
    loss = RIDELoss(criterion, COUNTS)(out, TARGET)
    one_by_one = [criterion(out.expert_logits[:, i], TARGET) for i in range(3)]
    prior = (torch.tensor(COUNTS) / sum(COUNTS)).log()
    seen = out.expert_logits + prior * isinstance(criterion, BalancedSoftmaxLoss)
    samples = len(TARGET) if getattr(criterion, "reduction", "mean") == "sum" else 1
    expected = sum(one_by_one) + samples * DiversityLoss(COUNTS)(seen, TARGET)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, out.expert_logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_loss_for_each_sample_has_the_mean_of_the_scalar(reduction: str, form: str) -> None:
    out, weight = output(), torch.rand(len(TARGET))

    def loss_of(samples: str, criterion: type[nn.Module] = nn.CrossEntropyLoss) -> RIDELoss:
        diversity = DiversityLoss(COUNTS, form=form)
        return RIDELoss(criterion(reduction=samples), diversity, reduction=reduction)

    each = loss_of("none")(out, TARGET)
    assert each.shape == TARGET.shape
    torch.testing.assert_close(each.mean(), loss_of("mean")(out, TARGET))
    torch.testing.assert_close(each.sum(), loss_of("sum")(out, TARGET))
    # Weights of samples weigh the diversity term as well: row by row, it is one sample's loss.
    alone = [
        loss_of("mean")(out.expert_logits[k : k + 1], TARGET[k : k + 1]) for k in range(len(TARGET))
    ]
    torch.testing.assert_close(each, torch.stack(alone))
    torch.testing.assert_close((weight * each).sum(), (weight * torch.stack(alone)).sum())
    loss = loss_of("none")
    loss(out, TARGET)
    plain = F.cross_entropy(out.expert_logits.flatten(0, 1), TARGET.repeat_interleave(3))
    torch.testing.assert_close(loss.mean_loss, plain.detach())
    with torch.no_grad():
        expected = F.cross_entropy(out.logits, TARGET, reduction="none")
        torch.testing.assert_close(loss(out, TARGET), expected)
        several = RIDELoss([nn.CrossEntropyLoss(reduction="none")] * 3, COUNTS)
        torch.testing.assert_close(several(out, TARGET), expected)


def test_libraries_read_and_set_the_criterions_reduction() -> None:
    loss = RIDELoss(nn.CrossEntropyLoss(), COUNTS, reduction="sum")
    assert loss.reduction == "mean"
    loss.reduction = "none"
    assert loss(output(), TARGET).shape == TARGET.shape
    loss.reduction = "mean"
    assert loss(output(), TARGET).dim() == 0
    function = RIDELoss(F.cross_entropy, COUNTS)
    assert function.reduction == "mean"
    function.reduction = "mean"
    with pytest.raises(ArgumentError, match=r"`reduction` to be left as it is.*got 'none'"):
        function.reduction = "none"


class NoModule:
    """A criterion as some libraries have it: any object that can be called."""

    activation = staticmethod(torch.softmax)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


def test_what_a_criterion_that_is_no_module_offers_is_passed_on() -> None:
    loss = RIDELoss(NoModule(), COUNTS)
    assert loss.activation is torch.softmax
    with pytest.raises(AttributeError, match="nothing"):
        _ = loss.nothing
    assert not hasattr(RIDELoss([NoModule()] * 3, COUNTS), "activation")
    assert copy.deepcopy(loss).activation is torch.softmax


@pytest.mark.parametrize("criterion", CRITERIA)
def test_without_gradients_it_is_the_criterion_of_the_plain_logits(criterion) -> None:
    out = output()
    plain = criterion(out.logits, TARGET).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = RIDELoss(criterion, COUNTS)
            for form in (out, tuple(out), out.logits, out.expert_logits):
                torch.testing.assert_close(loss(form, TARGET), plain)
            assert loss.mean_loss is None


def test_mean_divides_the_whole_loss_by_the_number_of_experts() -> None:
    out = output()
    whole = RIDELoss(nn.CrossEntropyLoss(), COUNTS)(out, TARGET)
    mean = RIDELoss(nn.CrossEntropyLoss(), COUNTS, reduction="mean")(out, TARGET)
    torch.testing.assert_close(mean, whole / 3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_number_for_logs_is_on_the_scale_of_validation(reduction) -> None:
    experts = torch.randn(6, 1, 4, requires_grad=True).expand(6, 3, 4)  # three times the same
    loss = RIDELoss(nn.CrossEntropyLoss(), COUNTS, reduction=reduction)
    loss(experts, TARGET)
    assert not loss.mean_loss.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(loss.mean_loss, loss(experts.mean(1), TARGET))


def test_missing_expert_logits_are_refused_with_gradients_only() -> None:
    bare = torch.randn(6, 4, requires_grad=True)
    loss = RIDELoss(nn.CrossEntropyLoss(), COUNTS)
    with pytest.raises(MissingExpertLogitsError, match="return_experts"):
        loss(bare, TARGET)
    with torch.no_grad():
        loss(bare, TARGET)


@pytest.mark.filterwarnings("ignore:The criterion .* keeps a state")
def test_further_arguments_reach_the_criterion() -> None:
    seen = []

    def criterion(logits: Tensor, target: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append((args, kwargs))
        return F.cross_entropy(logits, target)

    for one in (criterion, [criterion] * 3):
        loss = RIDELoss(one, DiversityLoss(COUNTS, weight=0))
        loss(output(), TARGET, 7, epoch=2)
        with torch.no_grad():
            loss(output(), TARGET, 7, epoch=2)
    assert seen == [((7,), {"epoch": 2})] * (3 + 1 + 3 + 3)


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_a_criterion_for_each_expert(container) -> None:
    criteria = [LogitAdjustedLoss(COUNTS, tau) for tau in (0.0, 1.0, 2.0)]
    loss, out = RIDELoss(container(criteria), COUNTS), output()
    prior = (torch.tensor(COUNTS) / sum(COUNTS)).log()
    seen = expert_logits(out) + torch.tensor([0.0, 1.0, 2.0])[:, None] * prior
    expected = experts_loss(criteria, out, TARGET) + DiversityLoss(COUNTS)(seen, TARGET)
    torch.testing.assert_close(loss(out, TARGET), expected)
    with torch.no_grad():
        of_mean = torch.stack([one(out.logits, TARGET) for one in criteria]).mean()
        torch.testing.assert_close(loss(out, TARGET), of_mean)
    assert loss.double().criterion[1].adjustment.dtype == torch.float64  # they move along
    functions = RIDELoss(container([F.cross_entropy] * 3), COUNTS) if container is list else loss
    functions(out, TARGET)


def test_targets_that_only_the_criterion_understands() -> None:
    several = (torch.rand(6, 4) > 0.5).float()
    loss, out = RIDELoss(nn.BCEWithLogitsLoss(), COUNTS), output()
    expected = sum(
        F.binary_cross_entropy_with_logits(z, several) for z in out.expert_logits.unbind(1)
    )
    with pytest.warns(UserWarning, match="Rows of `target` do not sum to one") as caught:
        found = loss(out, several)
    assert caught[0].filename == __file__
    torch.testing.assert_close(found, expected + loss.diversity(out, several))
    with pytest.raises(ArgumentError, match=r"`target`.*sum to one"):
        RIDELoss(BalancedSoftmaxLoss(COUNTS), COUNTS)(out, several)
    with pytest.raises(ArgumentError, match="`target` to be that of 6 samples"):
        loss(out, several[:4])


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), F.cross_entropy])
@pytest.mark.parametrize(
    "target", [(torch.rand(6, 4) > 0.5).float(), F.one_hot(TARGET, 4) * torch.rand(6, 1)]
)
def test_soft_targets_of_any_sum_are_those_of_cross_entropy_with_one_warning(
    criterion, target: Tensor
) -> None:
    loss, out = RIDELoss(criterion, COUNTS), output()
    expected = sum(F.cross_entropy(z, target) for z in out.expert_logits.unbind(1))
    torch.testing.assert_close(experts_loss(criterion, out, target), expected)
    with pytest.warns(UserWarning, match="Rows of `target` do not sum to one") as caught:
        found = loss(out, target)
    assert len(caught) == 1
    torch.testing.assert_close(found, expected + loss.diversity(out, target))
    loss(out, target)  # warnings are errors here
    with pytest.raises(ArgumentError, match=r"`target`.*sum to one"):  # for a mean temperature
        DiversityLoss(COUNTS, form="paper")(out, target)


def test_targets_that_are_no_tensor_reach_the_criterion() -> None:
    def of_pair(logits: Tensor, pair: tuple[Tensor, Tensor, float]) -> Tensor:
        first, second, share = pair
        return share * F.cross_entropy(logits, first) + (1 - share) * F.cross_entropy(
            logits, second
        )

    output = torch.randn(4, 3, 5, requires_grad=True)
    first, second = torch.randint(5, (2, 4))
    criterion = RIDELoss(F.cross_entropy, [10] * 5)
    expected = 0.3 * criterion(output, first) + 0.7 * criterion(output, second)
    found = RIDELoss(of_pair, [10] * 5)(output, (first, second, 0.3))
    torch.testing.assert_close(found, expected)


def test_mixup_helpers_that_call_the_criterion_twice() -> None:
    def mixup_criterion(criterion, pred, y_a: Tensor, y_b: Tensor, lam: float) -> Tensor:
        return lam * criterion(pred, y_a) + (1 - lam) * criterion(pred, y_b)

    loss, out = RIDELoss(nn.CrossEntropyLoss(), COUNTS), output()
    mixed = 0.3 * F.one_hot(TARGET, 4) + 0.7 * F.one_hot(TARGET.flip(0), 4)
    twice = mixup_criterion(loss, out, TARGET, TARGET.flip(0), 0.3)
    torch.testing.assert_close(twice, loss(out, mixed))


def test_step_ends_the_epoch_for_every_schedule_once() -> None:
    criterion = LDAMLoss(COUNTS)
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
    temperature = TemperatureSchedule(COUNTS, start_epoch=1)
    loss = RIDELoss(criterion, DiversityLoss(COUNTS, temperature=temperature), schedules=[drw])
    active = []
    for _ in range(3):
        active.append((temperature.is_active, drw.is_active, criterion.weight[0].item() != 1))
        loss.step()
    assert active == [(False, False, False), (True, False, False), (True, True, True)]
    assert (temperature.last_epoch, drw.last_epoch) == (3, 3)
    other = copy.deepcopy(loss)
    other.load_state_dict(RIDELoss(criterion, DiversityLoss(COUNTS), schedules=[drw]).state_dict())


def test_one_state_dict_of_tensors_resumes_everything() -> None:
    def make() -> RIDELoss:
        criterion = nn.CrossEntropyLoss(weight=torch.ones(4))
        drw = DeferredReweighting(criterion, COUNTS, start_epoch=1)
        return RIDELoss(criterion, DiversityLoss(COUNTS, start_epoch=2), schedules=[drw])

    trained, out = make(), output()
    for _ in range(2):
        trained.step()
    state = trained.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    resumed = make()
    resumed.load_state_dict(state)
    assert resumed(out, TARGET).equal(trained(out, TARGET))
    assert not make()(out, TARGET).equal(trained(out, TARGET))
    resumed.step()
    assert resumed.diversity.schedule.last_epoch == 3


def test_a_copy_steps_its_own_criterion() -> None:
    criterion = LDAMLoss(COUNTS)
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    loss = RIDELoss(criterion, COUNTS, schedules=[drw])
    other = copy.deepcopy(loss)
    other.step()
    assert criterion.weight.tolist() == [1.0] * 4
    assert other.criterion.weight.tolist() != [1.0] * 4


def test_the_loop_of_a_plain_model_stays_as_it_is() -> None:
    backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    model = RIDEWrapper(backbone.append(nn.Linear(8, 4)), num_experts=3)  # RIDE
    criterion = RIDELoss(nn.CrossEntropyLoss(), COUNTS)  # RIDE
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x = torch.randn(6, 6)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = criterion(model.eval()(x), TARGET)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        for rows in torch.arange(6).split(3):  # gradient accumulation
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(x[rows]), TARGET[rows]) / 2
            scaler.scale(loss).backward()
        scaler.step(optimizer)
    assert all(not before[name].equal(value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert criterion(model.eval()(x), TARGET) < first
        assert model(x).shape == expert_logits(model(x)).shape[::2]


def test_validation_compiles_whole_with_a_criterion_for_each_expert() -> None:
    torch._dynamo.reset()
    loss = RIDELoss([F.cross_entropy] * 3, COUNTS)
    logits = output().logits.detach()
    with torch.no_grad():
        compiled = torch.compile(loss, backend="eager", fullgraph=True)(logits, TARGET)
        torch.testing.assert_close(compiled, F.cross_entropy(logits, TARGET))


# The compiler itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_and_without_recompiling() -> None:
    torch._dynamo.reset()
    loss = RIDELoss(nn.CrossEntropyLoss(), DiversityLoss(COUNTS, start_epoch=1))
    out = output().expert_logits
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(out, TARGET), loss(out, TARGET))
            loss.step()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(
            ((bad, COUNTS), "criterion")
            for bad in (None, 3, "ce", [F.cross_entropy, None], object(), nn.CrossEntropyLoss)
        ),
        ((RIDELoss(F.cross_entropy, COUNTS), COUNTS), "criterion"),
        *(((F.cross_entropy, bad), "diversity") for bad in (None, "a", 0.2, [5], {"a": 1})),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, named) -> None:
    with pytest.raises(ArgumentError, match=f"`{named}`"):
        RIDELoss(*arguments)


@pytest.mark.parametrize(
    "options",
    [{"reduction": "none"}, {"reduction": None}, {"schedules": 3}, {"schedules": [nn.ReLU()]}],
)
def test_options_of_another_kind_are_refused(options) -> None:
    with pytest.raises(ArgumentError, match=f"`{next(iter(options))}`"):
        RIDELoss(F.cross_entropy, COUNTS, **options)


def test_outputs_of_another_kind_are_refused_without_gradients_too() -> None:
    with torch.no_grad(), pytest.raises(ArgumentError, match="`output`"):
        RIDELoss(F.cross_entropy, COUNTS)("logits", TARGET)


class OfAnEpoch(nn.Module):
    """A criterion that its training loop tells the epoch, as many repositories have it."""

    epoch = 0

    def update(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target) * self.epoch


def test_what_the_loop_asks_of_its_criterion_is_answered_by_it() -> None:
    criterion = RIDELoss(OfAnEpoch(), COUNTS)
    criterion.update(3)
    assert criterion.epoch == 3
    assert copy.deepcopy(criterion).epoch == 3
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        criterion.absent  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'update'"):
        RIDELoss(F.cross_entropy, COUNTS).update(3)


def test_validation_takes_a_pair_only_if_it_holds_expert_logits() -> None:
    loss, out = RIDELoss(F.cross_entropy, COUNTS), output()
    features = torch.randn(6, 4)  # as wide as the logits, so that nothing else tells them apart
    with torch.no_grad():
        expected = F.cross_entropy(out.logits, TARGET)
        for form in (out, tuple(out), list(out), (out.expert_logits, torch.randn(6, 3, 9))):
            torch.testing.assert_close(loss(form, TARGET), expected)
        for pair in ((features, out.logits), (out.logits, features)):
            with pytest.raises(ArgumentError, match="`output`"):
                loss(pair, TARGET)


def test_validation_in_half_precision_is_computed_in_float32() -> None:
    loss, half = RIDELoss(F.cross_entropy, COUNTS), output().logits.detach().bfloat16()
    with torch.no_grad():
        value = loss(half, TARGET)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, F.cross_entropy(half.float(), TARGET))


def test_compiled_code_keeps_no_number_for_logs() -> None:
    loss, out = RIDELoss(nn.CrossEntropyLoss(), COUNTS), output().expert_logits
    torch.compile(loss, backend="eager", fullgraph=True)(out, TARGET)
    assert loss.mean_loss is None
    loss(out, TARGET)
    assert loss.mean_loss is not None


def test_modules_and_functions_may_be_mixed() -> None:
    criteria = [nn.CrossEntropyLoss(), F.cross_entropy, F.cross_entropy]
    mixed, alike = RIDELoss(criteria, COUNTS), RIDELoss(F.cross_entropy, COUNTS)
    out = output()
    torch.testing.assert_close(mixed(out, TARGET), alike(out, TARGET))


class OwnNames(nn.Module):
    """A criterion of a training code, called by its own names and with more than two arguments."""

    def forward(self, output_logits: Tensor, labels: Tensor, extra_info: float = 0.0) -> Tensor:
        return F.cross_entropy(output_logits, labels) + extra_info


@pytest.mark.parametrize(
    ("criterion", "names"),
    [
        (nn.CrossEntropyLoss(), ("input", "target")),
        (F.cross_entropy, ("input", "target")),
        (OwnNames(), ("output_logits", "labels")),
        (OwnNames(), ("output", "labels")),
        ([OwnNames(), OwnNames(), OwnNames()], ("output_logits", "target")),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_it_is_called_by_the_names_of_the_criterion(criterion, names, gradients: bool) -> None:
    out, loss = output(), RIDELoss(criterion, COUNTS)
    more = {"extra_info": 0.5} if "labels" in names or isinstance(criterion, list) else {}
    with torch.set_grad_enabled(gradients):
        expected = loss(out, TARGET, **more)
        torch.testing.assert_close(
            loss(**dict(zip(names, (out, TARGET), strict=True)), **more), expected
        )
        torch.testing.assert_close(loss(out, **{names[1]: TARGET}, **more), expected)


@pytest.mark.parametrize(
    "given", [{}, {"output": 0}, {"labels": TARGET}, {"logits": 0, "labels": 0}]
)
def test_a_missing_output_or_target_is_named_in_both_tongues(given) -> None:
    with pytest.raises(ArgumentError, match=r"`output` and `target`.*`output_logits` and `labels`"):
        RIDELoss(OwnNames(), COUNTS)(**given)


def test_what_neither_has_is_missing_from_this_loss() -> None:
    for criterion in (F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(AttributeError, match="'RIDELoss' object has no attribute 'update'"):
            RIDELoss(criterion, COUNTS).update(3)


@pytest.mark.parametrize("several", [False, True])
def test_a_criterion_that_moves_in_its_own_way_is_moved(several) -> None:
    class KeepsAPlainTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.margins = torch.ones(4)

        def to(self, *args, **kwargs):
            self.margins = self.margins.to(*args, **kwargs)
            return super().to(*args, **kwargs)

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(logits - self.margins, target)

    criteria = [KeepsAPlainTensor() for _ in range(3)]
    loss = RIDELoss(criteria if several else criteria[0], COUNTS)
    assert loss.to(torch.float64) is loss
    assert all(one.margins.dtype == torch.float64 for one in criteria[: 3 if several else 1])


class _WithoutSignature:
    """Like some functions written in C, of which Python cannot tell the arguments."""

    __signature__ = "none"

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target)


def test_keywords_of_a_criterion_without_a_signature_are_refused_with_the_remedy() -> None:
    criterion = RIDELoss(_WithoutSignature(), [3, 2, 1])
    output, target = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ArgumentError, match="Pass both by position"):
        criterion(logits=output, labels=target)
    assert torch.equal(criterion(output=output, target=target), criterion(output, target))


def test_targets_of_several_classes_for_a_sample_are_warned_of_once() -> None:
    criterion = RIDELoss(nn.BCEWithLogitsLoss(), [9, 5, 3])
    logits = torch.randn(4, 2, 3, requires_grad=True)
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with pytest.warns(UserWarning, match="Rows of `target` do not sum to one"):
        criterion(logits, several)
    criterion(logits, several)  # warnings are errors here
    RIDELoss(nn.BCEWithLogitsLoss(), DiversityLoss([9, 5, 3], weight=0))(logits, several)
    mixed = torch.tensor([[0.7, 0.3, 0.0]]).expand(4, 3)
    RIDELoss(nn.BCEWithLogitsLoss(), [9, 5, 3])(logits, mixed)


class Scaled:
    """A criterion that is no module and follows attributes that are set from outside."""

    scale = 1.0

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target) * self.scale


def test_what_a_loop_sets_on_its_criterion_reaches_the_criterion() -> None:
    logits, target = torch.randn(6, 2, 3, requires_grad=True), torch.arange(6) % 3
    weights = torch.tensor([0.2, 0.8, 2.0])
    loss = RIDELoss(nn.CrossEntropyLoss(), [9, 5, 3])
    loss.weight = weights  # as deferred re-weighting often does
    expected = RIDELoss(nn.CrossEntropyLoss(weight=weights), [9, 5, 3])(logits, target)
    torch.testing.assert_close(loss(logits, target), expected)
    torch.testing.assert_close(loss.weight, weights)
    assert "weight" not in vars(loss)

    plain = RIDELoss(Scaled(), DiversityLoss([9, 5, 3], weight=0))
    before = plain(logits, target)
    plain.scale = 3.0
    torch.testing.assert_close(plain(logits, target), 3 * before)

    several = RIDELoss([nn.CrossEntropyLoss(), nn.CrossEntropyLoss()], [9, 5, 3])
    several.weight = weights
    torch.testing.assert_close(several(logits, target), expected)
    several.note, several.over_experts = "mine", "mean"
    assert several.note == "mine"
    assert not any(hasattr(one, "note") for one in several.criterion)
    torch.testing.assert_close(several(logits, target), expected / 2)


@pytest.mark.parametrize(
    ("criterion", "named"),
    [
        (partial(F.cross_entropy, reduction="sum"), {}),
        (F.cross_entropy, {"reduction": "sum"}),
        (nn.CrossEntropyLoss(reduction="sum"), {}),
    ],
)
def test_the_term_is_a_sum_wherever_the_criterion_says_that_it_sums(criterion, named) -> None:
    experts = torch.randn(6, 3, 4, requires_grad=True)
    loss = RIDELoss(criterion, COUNTS)(experts, TARGET, **named)
    term = loss - sum(F.cross_entropy(experts[:, i], TARGET, reduction="sum") for i in range(3))
    torch.testing.assert_close(term, 6 * DiversityLoss(COUNTS)(experts, TARGET))


def test_a_criterion_that_the_loop_stepped_is_stepped_once_an_epoch() -> None:
    class Annealed(nn.CrossEntropyLoss):
        epochs = 0

        def step(self) -> None:
            self.epochs += 1

    one = Annealed()
    loss = RIDELoss([one, one, one], COUNTS)
    loss.step()
    assert (one.epochs, loss.diversity.schedule.last_epoch) == (1, 1)
    drw = DeferredReweighting(nn.CrossEntropyLoss(weight=torch.ones(4)), COUNTS, start_epoch=3)
    RIDELoss(drw.criterion, COUNTS, schedules=[drw]).step()
    assert drw.last_epoch == 1


@pytest.mark.parametrize("steps_it", [True, False])
def test_a_schedule_inside_the_criterion_is_stepped_once_an_epoch(steps_it: bool) -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ldam, self.epochs = LDAMLoss(COUNTS), 0
            self.drw = DeferredReweighting(self.ldam, COUNTS, start_epoch=160)

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return self.ldam(logits, target)

        def step(self) -> None:
            self.epochs += 1
            if steps_it:
                self.drw.step()

    criterion = Criterion()
    for schedules in ([], [criterion.drw]):
        criterion.drw.last_epoch = criterion.epochs = 0
        loss = RIDELoss(criterion, COUNTS, schedules=schedules)
        for _ in range(90):
            loss.step()
        assert (criterion.drw.last_epoch, criterion.epochs) == (90, 90)
        assert criterion.ldam.weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_of_any_whole_numbers_are_taken_with_gradients_and_without(dtype) -> None:
    loss, experts = RIDELoss(nn.CrossEntropyLoss(), COUNTS), torch.randn(6, 3, 4)
    expected = F.cross_entropy(experts.mean(1), TARGET)
    with torch.no_grad():
        torch.testing.assert_close(loss(experts.mean(1), TARGET.to(dtype)), expected)
    assert loss(experts.requires_grad_(), TARGET.to(dtype)).isfinite()


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.rand(4)),
        LDAMLoss(COUNTS, weight=[1.1, 1.2, 1.3, 1.4]),
        FocalLoss(weight=torch.rand(4)),
        LogitAdjustedLoss(COUNTS, tau=0.7),
        BalancedSoftmaxLoss(COUNTS),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_that_holds_it_leaves_the_loss_its_digits(criterion, dtype) -> None:
    loss = RIDELoss(copy.deepcopy(criterion), COUNTS)
    experts = 20 * torch.rand(6, 3, 4).to(dtype)
    before = loss(experts.detach().requires_grad_(), TARGET)
    nn.ModuleList([loss]).to(dtype)
    assert torch.equal(loss(experts.detach().requires_grad_(), TARGET), before)
    assert {buffer.dtype for buffer in loss.buffers()} <= {torch.float32, torch.int64}


def test_a_criterion_that_is_no_module_is_moved_as_well() -> None:
    class Plain:
        moved = None

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(logits, target)

        def to(self, device: str) -> None:
            self.moved = device

    loss = RIDELoss(Plain(), COUNTS).to("cpu")
    assert loss.criterion.moved == "cpu"


def test_ignored_rows_are_part_of_the_term_until_they_are_left_out() -> None:
    criterion, out = RIDELoss(nn.CrossEntropyLoss(), COUNTS), output()
    target = TARGET.where(TARGET > 0, -100)
    alone, known = experts_loss(F.cross_entropy, out, target), target >= 0
    torch.testing.assert_close(criterion(out, target), alone + criterion.diversity(out, TARGET))
    left = expert_logits(out)[known]
    expected = alone + criterion.diversity(left, target[known])
    torch.testing.assert_close(criterion(left, target[known]), expected)
    with pytest.raises(ArgumentError, match="drop samples without a label"):
        RIDELoss(nn.CrossEntropyLoss(), DiversityLoss(COUNTS, form="paper"))(out, target)


def in_evaluation(model: RIDEWrapper, criterion: RIDELoss, x: Tensor) -> Tensor:
    return criterion(model.eval()(x), torch.arange(4))


@pytest.mark.parametrize("return_experts", [False, True, "training"])
def test_a_test_loop_with_gradients_is_told_once(return_experts) -> None:
    model = RIDEWrapper(mlp(), 2, return_experts=return_experts)
    criterion, x = RIDELoss(F.cross_entropy, [4, 3, 2, 1, 1, 1, 1]), torch.randn(4, 20)
    in_evaluation(model, criterion, x).backward()  # it may train in evaluation mode
    criterion(model.train()(x), torch.arange(4)).backward()
    in_evaluation(model, criterion, x.clone().requires_grad_()).backward()  # an attack
    with torch.no_grad():
        in_evaluation(model, criterion, x)
    with pytest.warns(UserWarning, match=r"evaluation mode.*torch\.no_grad") as told:
        in_evaluation(model, criterion, x)
    assert [one.filename for one in told] == [__file__]
    in_evaluation(model, criterion, x)


@pytest.mark.parametrize(
    ("diversity", "message"),
    [
        ([50, 20, 5, 0], r"`diversity` .* 0 for class 3"),
        ([[4]], "`diversity` to be one-dimensional"),
        (None, "`diversity` to be class counts, .* or a DiversityLoss, but got None"),
        (DiversityLoss, "`diversity` to be class counts"),
        (nn.CrossEntropyLoss(), "`diversity` to be class counts, .* got CrossEntropyLoss"),
        (TemperatureSchedule(COUNTS), "`diversity` to be class counts"),
    ],
)
def test_what_is_wrong_with_the_second_argument_is_said(diversity, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        RIDELoss(nn.CrossEntropyLoss(), diversity)


def test_counts_of_another_number_of_classes_are_named_and_not_the_output() -> None:
    with pytest.raises(ArgumentError, match=r"`class_counts` .* 4 classes, .*\[6, 3, 4\].* has 3"):
        RIDELoss(nn.CrossEntropyLoss(), COUNTS[:3])(output(), TARGET)
    with pytest.raises(ArgumentError, match="counts of 3 classes: pass the model's own"):
        RIDELoss(BalancedSoftmaxLoss(COUNTS[:3]), COUNTS)(output(), TARGET)
    with pytest.raises(ArgumentError, match="Use it as it is, or pass the criterion"):
        RIDELoss(RIDELoss(nn.CrossEntropyLoss(), COUNTS), COUNTS)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), BalancedSoftmaxLoss(COUNTS)])
def test_gradients_of_each_sample_by_vmap_are_those_of_one_after_the_other(criterion) -> None:
    loss, model = RIDELoss(criterion, COUNTS), RIDEWrapper(mlp(), 3, num_classes=4)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    x = torch.randn(6, *model.example_input(1)[0][0].shape[1:])

    def of_one(weights, x, y):
        return loss(torch.func.functional_call(model, weights, (x[None],)), y[None])

    gradient = torch.func.grad(of_one)
    got = torch.func.vmap(gradient, in_dims=(None, 0, 0))(weights, x, TARGET)
    expected = [gradient(weights, *pair) for pair in zip(x, TARGET, strict=True)]
    for name in weights:
        torch.testing.assert_close(got[name], torch.stack([each[name] for each in expected]))


def weighted() -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(weight=torch.ones(4))


def test_a_schedule_of_another_criterion_is_told() -> None:
    criterion = weighted()
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
    copies = [copy.deepcopy(criterion) for _ in range(3)]
    for other in (copies, copies[0]):
        with pytest.warns(UserWarning, match="among `schedules` was made for a criterion that is"):
            RIDELoss(other, COUNTS, schedules=[drw])
    each = [DeferredReweighting(one, COUNTS, start_epoch=2) for one in copies]
    loss = RIDELoss(copies, COUNTS, schedules=each)
    loss.step()
    loss.step()
    assert all(one.weight.equal(each[0].weight) for one in copies)
    copy.deepcopy(loss)


def test_a_schedule_of_a_criterion_inside_of_another_is_not_told() -> None:
    class Holds(nn.Module):
        def __init__(self, inner: nn.Module, weight: Tensor | None) -> None:
            super().__init__()
            self.inner = inner if weight is None else None
            self.class_weights = weight

    criterion = weighted()
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=2)
    for one in (criterion, Holds(criterion, None), Holds(criterion, criterion.weight)):
        RIDELoss(one, COUNTS, schedules=[drw])
    RIDELoss(lambda logits, target: criterion(logits, target), COUNTS, schedules=[drw])
