"""What holds for any input: order, shifts, scale, signs, sums, and equal ways of handing over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ride_plugin import (
    ConfidenceRouter,
    DistillationLoss,
    DiversityLoss,
    ExpertOutput,
    ExpertRouter,
    RIDELoss,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    TemperatureSchedule,
    expert_logits,
    experts_loss,
)
from ride_plugin import functional as RF
from ride_plugin.longtail import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss
from ride_plugin.routing import RouterInputs, routing_report

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
DIVERGENCES: dict[str, Callable[[Tensor, Tensor | float], Tensor]] = {
    "pairwise": RF.pairwise_kl,
    "pairwise, others free": lambda z, t: RF.pairwise_kl(z, t, detach_others=False),
    "from the mean": RF.kl_from_mean,
}
CLASSIFIERS: dict[str, Callable[[Tensor], nn.Module]] = {
    "balanced softmax": BalancedSoftmaxLoss,
    "focal": lambda counts: FocalLoss(),
    "LDAM": lambda counts: LDAMLoss(counts, scale=4.0),
    "logit-adjusted": LogitAdjustedLoss,
}


def draw(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, E, C] in float64, a target [B], and class counts [C]."""
    generator = torch.Generator().manual_seed(seed)
    batch, experts, classes = torch.randint(2, 6, (3,), generator=generator).tolist()
    logits = scale * torch.randn(batch, experts, classes, generator=generator, dtype=torch.double)
    target = torch.randint(0, classes, (batch,), generator=generator)
    return logits, target, torch.randint(1, 300, (classes,), generator=generator)


def order(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@few
@given(seeds, st.sampled_from(sorted(DIVERGENCES)), st.floats(0.3, 5))
def test_divergences_do_not_depend_on_any_order(seed: int, name: str, temperature: float) -> None:
    logits, _, _ = draw(seed)
    value = DIVERGENCES[name](logits, temperature)
    close(DIVERGENCES[name](logits[:, order(seed, logits.shape[1])], temperature), value)
    close(DIVERGENCES[name](logits[..., order(seed, logits.shape[2])], temperature), value)
    rows = order(seed, len(logits))
    close(DIVERGENCES[name](logits[rows], temperature), value[rows])


@few
@given(seeds, st.sampled_from(sorted(DIVERGENCES)), st.floats(0.3, 5), st.floats(-50, 50))
def test_divergences_are_not_negative_and_ignore_a_shift_of_all_classes(
    seed: int, name: str, temperature: float, shift: float
) -> None:
    logits, _, _ = draw(seed)
    value = DIVERGENCES[name](logits, temperature)
    assert (value >= -1e-12).all()
    each = shift * torch.arange(logits.shape[1])[None, :, None]
    close(DIVERGENCES[name](logits + each, temperature), value)
    assert DIVERGENCES[name](logits[:, :1].expand_as(logits), temperature).abs().max() < 1e-12


@few
@given(seeds, st.floats(0.3, 5), st.floats(0.3, 5))
def test_dividing_logits_is_raising_the_temperature(
    seed: int, temperature: float, by: float
) -> None:
    logits, target, _ = draw(seed)
    close(RF.pairwise_kl(logits / by, temperature), RF.pairwise_kl(logits, temperature * by))
    squared = by**2  # these two carry the temperature's square
    from_mean = RF.kl_from_mean(logits, temperature * by)
    close(squared * RF.kl_from_mean(logits / by, temperature), from_mean)
    teacher = logits.flip(0).mean(1)
    taught = RF.distillation_kl(logits, teacher, temperature * by)
    close(squared * RF.distillation_kl(logits / by, teacher / by, temperature), taught)
    one = torch.full((logits.shape[2],), temperature, dtype=torch.double)
    per_sample = RF.sample_temperatures(one, target)
    close(RF.pairwise_kl(logits, per_sample), RF.pairwise_kl(logits, temperature))


@few
@given(seeds, st.sampled_from(["paper", "official"]), st.integers(0, 300))
def test_the_diversity_loss_follows_a_new_numbering_of_the_classes(
    seed: int, form: str, epoch: int
) -> None:
    logits, target, counts = draw(seed)
    classes = order(seed, len(counts))
    new = torch.empty_like(classes)
    new[classes] = torch.arange(len(classes))  # class c is called new[c]
    here = DiversityLoss(counts, start_epoch=3, form=form)
    there = DiversityLoss(counts[classes], start_epoch=3, form=form)
    for loss in (here, there):
        for _ in range(min(epoch, 6)):
            loss.step()
    value = here(logits, target)
    assert value <= 0  # more diverse is better
    torch.testing.assert_close(there(logits[..., classes], new[target]), value)


@few
@given(seeds, st.sampled_from(sorted(CLASSIFIERS)), st.sampled_from(["sum", "mean"]))
def test_criteria_follow_a_new_numbering_of_classes_and_any_order_of_experts_and_rows(
    seed: int, name: str, reduction: str
) -> None:
    logits, target, counts = draw(seed)
    if name == "LDAM":
        logits = 4 * logits.tanh()  # cosines times the scale
    classes = order(seed, len(counts))
    new = torch.empty_like(classes)
    new[classes] = torch.arange(len(classes))
    value = experts_loss(CLASSIFIERS[name](counts), logits, target, reduction=reduction)
    rows, experts = order(seed, len(logits)), order(seed + 1, logits.shape[1])
    renamed = CLASSIFIERS[name](counts[classes])
    moved = logits[rows][:, experts][..., classes]
    again = experts_loss(renamed, moved, new[target[rows]], reduction=reduction)
    torch.testing.assert_close(again, value)
    each = [CLASSIFIERS[name](counts)(logits[:, k], target) for k in range(logits.shape[1])]
    total = torch.stack(each).sum() if reduction == "sum" else torch.stack(each).mean()
    torch.testing.assert_close(value, total)


@few
@given(seeds, st.floats(-20, 20))
def test_criteria_ignore_a_shift_of_all_classes(seed: int, shift: float) -> None:
    logits, target, counts = draw(seed)
    for name in ("balanced softmax", "focal", "logit-adjusted"):
        criterion = CLASSIFIERS[name](counts)
        torch.testing.assert_close(
            criterion(logits[:, 0] + shift, target), criterion(logits[:, 0], target)
        )


@few
@given(seeds)
def test_carried_logits_a_pair_and_the_raw_tensor_are_one_and_the_same(seed: int) -> None:
    _, target, counts = draw(seed)
    class_counts = counts.tolist()

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 8), nn.Linear(8, len(class_counts))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    torch.manual_seed(seed)
    model = RIDEWrapper(Heads(), 2, fork_at="head").eval()
    x = torch.randn(len(target), 5)
    carried = model(x)
    raw = expert_logits(carried)
    pair = ExpertOutput(raw.mean(1), raw)
    diversity, distillation = DiversityLoss(class_counts), DistillationLoss()
    teacher = raw.flip(1).detach()
    for output in (pair, raw):
        assert torch.equal(expert_logits(output), raw)
        for value in (
            lambda out: experts_loss(F.cross_entropy, out, target),
            lambda out: diversity(out, target),
            lambda out: distillation(out, teacher),
            lambda out: RoutingLoss()(torch.zeros(len(target), 1), out, target),
        ):
            assert torch.equal(value(output), value(carried))


@few
@given(seeds)
def test_targets_of_routing_say_where_a_later_mean_is_right_and_an_earlier_wrong(seed: int) -> None:
    logits, target, _ = draw(seed)
    experts = logits.shape[1]
    right = torch.stack([logits[:, : k + 1].mean(1).argmax(1) == target for k in range(experts)], 1)
    got = RF.routing_targets(logits, target)
    for b in range(len(target)):
        for k in range(experts - 1):
            later = bool(right[b, k + 1 :].any())
            assert bool(got[b, k]) == (later and not bool(right[b, k]))


@few
@given(seeds, st.integers(2, 5))
def test_shares_of_a_report_sum_to_one(seed: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = torch.randint(1, num_experts + 1, (40,), generator=generator)
    target = torch.randint(0, 4, (40,), generator=generator)
    report = routing_report(used, target, [300, 80, 40, 5], num_experts=num_experts)
    shares = torch.tensor(
        [report.overall, *(s for s in (report.many, report.medium, report.few) if s)]
    )
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)))
    by_hand = [(used == k).float().mean().item() for k in range(1, num_experts + 1)]
    assert report.overall == pytest.approx(by_hand)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = (
            nn.Conv2d(3, 4, 3),
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> RIDEWrapper:
    torch.manual_seed(0)
    return wrapped(3).eval()


@few
@given(seeds, st.integers(1, 7), st.floats(0.01, 0.99), st.booleans())
def test_routed_rows_are_the_dense_ones_whatever_their_order(
    model: RIDEWrapper, seed: int, batch: int, threshold: float, learned: bool
) -> None:
    torch.manual_seed(seed)
    router = ExpertRouter.for_model(model, top_k=3) if learned else ConfidenceRouter()
    serve = RoutingInference(model, router, threshold)
    x, rows = torch.randn(batch, 3, 8, 8), order(seed, batch)
    logits, used = serve(x, return_routing=True)
    dense, dense_used = serve.dense(x, return_routing=True)
    assert torch.equal(used, dense_used)
    torch.testing.assert_close(logits, dense)
    again, used_again = serve(x[rows], return_routing=True)
    assert torch.equal(used_again, used[rows])
    torch.testing.assert_close(again, logits[rows])
    experts = expert_logits(model(x))
    by_hand = torch.stack([experts[i, :n].mean(0) for i, n in enumerate(used.tolist())])
    torch.testing.assert_close(logits, by_hand)


def wrapped(num_experts: int) -> RIDEWrapper:
    example = torch.randn(2, 3, 8, 8)
    return RIDEWrapper(Backbone(), num_experts, fork_at="late", example_input=example)


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "wrapper": lambda: RIDEWrapper(
        Backbone(), 2, fork_at="late", example_input=torch.zeros(2, 3, 8, 8)
    ),
    "router": lambda: ExpertRouter(6, 3, num_classes=5, top_k=3),
    "diversity": lambda: DiversityLoss([50, 20, 5], start_epoch=2),
    "RIDE": lambda: RIDELoss(nn.CrossEntropyLoss(), DiversityLoss([50, 20, 5], start_epoch=2)),
    "schedule": lambda: TemperatureSchedule([50, 20, 5], start_epoch=2),
    "LDAM": lambda: LDAMLoss([50, 20, 5]),
    "balanced softmax": lambda: BalancedSoftmaxLoss([50, 20, 5]),
    "logit-adjusted": lambda: LogitAdjustedLoss([50, 20, 5]),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_every_state_dict_comes_back_from_a_file(name: str, tmp_path) -> None:
    torch.manual_seed(1)
    module = STATEFUL[name]()
    for _ in range(4 if hasattr(module, "step") else 0):
        module.step()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    torch.save(module.state_dict(), tmp_path / "state.pth")
    other = STATEFUL[name]()
    other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for kept, again in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert kept[0] == again[0]
        torch.testing.assert_close(again[1], kept[1], rtol=0, atol=0)
    if hasattr(module, "step"):
        logits, target = torch.randn(4, 2, 3), torch.tensor([0, 1, 2, 2])
        for one in (module, other):
            one.step()
        if isinstance(module, DiversityLoss | RIDELoss):
            assert torch.equal(module(logits, target), other(logits, target))
        else:
            assert torch.equal(module.temperature, other.temperature)


@few
@given(seeds, st.integers(0, 2))
def test_one_nan_anywhere_is_refused_by_the_router(seed: int, expert: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = ExpertRouter(6, 3, num_classes=5, top_k=3)
    logits, features = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 3, 6)
    router(RouterInputs(logits, features))
    logits[int(torch.randint(0, 4, (), generator=generator)), expert, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        router(RouterInputs(logits, features))
