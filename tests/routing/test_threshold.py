"""Calibration against what inference then does, and the routing report."""

import copy
import math
import warnings

import pytest
import torch

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    cost_report,
)
from ride_plugin._checks import _tensors
from ride_plugin.routing import LongTailedCalibrationWarning
from ride_plugin.routing._exit import exceeds
from ride_plugin.routing._threshold import _sweep
from tests.handmade import small_model


@pytest.fixture(scope="module")
def data():
    """Labels that the ensemble gets right more often than the first expert does."""
    torch.manual_seed(1)
    model = small_model()
    with torch.no_grad():
        for expert in model.experts:
            expert.fc.weight.mul_(5)
    router = ExpertRouter.for_model(model)
    x = torch.randn(200, 3, 8, 8)
    logits, features = model.router_inputs(x)
    noisy = logits.mean(1) + 0.2 * torch.randn(200, 5)
    order = noisy.argmax(1).argsort(stable=True)
    with torch.no_grad():
        router.output.bias.sub_(router((logits, features)).quantile(0.5))
    return model, router, x[order], noisy.argmax(1)[order]


def batches(x, y, size=64):
    return list(zip(x.split(size), y.split(size), strict=True))


def calibrated(data, **target):
    model, router, x, y = data
    serve = RoutingInference(model, router)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LongTailedCalibrationWarning)
        return serve, serve.calibrate(batches(x, y), **target)


def measured(serve, data):
    _, _, x, y = data
    logits, used = serve(x, return_routing=True)
    return used.double().mean().item(), (logits.argmax(1) == y).double().mean().item()


def test_every_point_of_the_curve_is_what_inference_gives(data):
    serve, result = calibrated(data, max_experts=2.0)
    costs = torch.tensor(cost_report(serve.model, router=serve.router).flops_by_experts).double()
    curve = result.curve
    assert len(curve.thresholds) > 50
    for i in range(0, len(curve.thresholds), 7):
        serve.set_threshold(float(curve.thresholds[i]))
        mean_experts, accuracy = measured(serve, data)
        used = serve(data[2], return_routing=True).num_experts_used
        assert curve.mean_experts[i].item() == pytest.approx(mean_experts)
        assert curve.accuracy[i].item() == pytest.approx(accuracy)
        assert curve.flops[i].item() == pytest.approx(costs[used - 1].mean().item())


def test_the_curve_runs_from_all_experts_to_one(data):
    _, result = calibrated(data, max_experts=2.0)
    for curve in (result.curve, *result.baselines.values()):
        assert (curve.thresholds[0], curve.thresholds[-1]) == (0, 1)
        assert (curve.mean_experts[0], curve.mean_experts[-1]) == (3, 1)
        assert (curve.mean_experts.diff() <= 0).all()
        assert (curve.flops.diff() <= 0).all()


def test_mean_number_of_experts_is_kept_to_and_the_threshold_is_set(data):
    serve, result = calibrated(data, max_experts=1.8)
    assert serve.threshold.tolist() == pytest.approx([result.threshold] * 2)
    mean_experts, accuracy = measured(serve, data)
    assert 1 < mean_experts <= 1.8
    within = result.curve.mean_experts <= 1.8
    assert accuracy == pytest.approx(result.curve.accuracy[within].max().item())


def test_saturated_gates_are_calibrated_as_finely_as_others(data):
    model, router, x, y = data
    steep = copy.deepcopy(router)
    with torch.no_grad():  # the same order of samples, with logits around 25
        steep.output.bias.add_(25)
    results = []
    for one in (router, steep):
        serve = RoutingInference(model, one)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LongTailedCalibrationWarning)
            results.append(serve.calibrate(batches(x, y), max_experts=1.8))
        got = serve(x, return_routing=True).num_experts_used.double().mean().item()
        assert got == pytest.approx(results[-1].curve.mean_experts[results[-1].index].item())
    plain, saturated = (result.curve.mean_experts for result in results)
    assert len(saturated) > 0.9 * len(plain)
    assert saturated.diff().abs().max() < 0.2


def test_flops_are_kept_to(data):
    costs = cost_report(data[0], router=data[1]).flops_by_experts
    budget = (costs[0] + costs[1]) / 2
    _, result = calibrated(data, max_flops=budget)
    assert costs[0] < result.curve.flops[result.index] <= budget


def test_accuracy_drop_is_kept_to_at_the_least_cost(data):
    serve, result = calibrated(data, max_accuracy_drop=0.005)
    curve = result.curve
    _, accuracy = measured(serve, data)
    assert accuracy >= curve.accuracy[0].item() - 0.005 - 1e-9
    cheaper = curve.flops < curve.flops[result.index]
    assert cheaper.any()
    assert (curve.accuracy[cheaper] < curve.accuracy[0] - 0.005).all()


def test_the_model_runs_once_over_the_loader(data):
    model, _, x, y = data
    before = model.trunk_runs
    calibrated(data, max_experts=2.0)
    assert model.trunk_runs - before == len(batches(x, y)) + 2  # two more to count FLOPs


def test_baselines_equal_a_calibration_of_their_own(data):
    model, _, x, y = data
    _, result = calibrated(data, max_experts=2.0)
    assert set(result.baselines) == {"max_probability", "margin"}
    for kind, curve in result.baselines.items():
        serve = RoutingInference(model, ConfidenceRouter(kind), float(curve.thresholds[40]))
        logits, used = serve(x, return_routing=True)
        assert curve.mean_experts[40].item() == pytest.approx(used.double().mean().item())
        hits = (logits.argmax(1) == y).double().mean().item()
        assert curve.accuracy[40].item() == pytest.approx(hits)


def test_the_comparison_prints(data):
    _, result = calibrated(data, max_experts=2.0)
    text = str(result)
    assert text.startswith("200 samples, max_experts=2; ")
    for name in ("router", "max_probability", "margin", "all experts"):
        assert f"\n{name} " in text


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_inputs_may_be_arguments_by_position_or_name(data, wrap):
    model, router, x, y = data
    loader = [(wrap(a), b) for a, b in batches(x, y)]
    serve = RoutingInference(model, router)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LongTailedCalibrationWarning)
        result = serve.calibrate(loader, max_experts=2.0)
    assert result.threshold == calibrated(data, max_experts=2.0)[1].threshold


def test_long_tailed_labels_warn_and_balanced_ones_do_not(data):
    model, router, x, _ = data
    serve = RoutingInference(model, router)
    tailed = torch.tensor([0] * 110 + [1] * 80 + [2] * 10)
    with pytest.warns(LongTailedCalibrationWarning, match="11 times the samples"):
        serve.calibrate(batches(x, tailed), max_experts=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve.calibrate(batches(x, torch.arange(200) % 5), max_experts=2.0)


@pytest.mark.parametrize(
    ("loader", "target", "message"),
    [
        ([], {"max_experts": 2}, "at least one sample, but it is empty"),
        (iter(()), {"max_experts": 2}, "at least one sample, but it is empty"),
        (None, {}, "exactly one of the arguments.*but got none"),
        (None, {"max_experts": 2, "max_flops": 5}, r"\['max_experts', 'max_flops'\]"),
        (None, {"max_experts": 0.5}, "`max_experts` to be at least 1"),
        (None, {"max_flops": 10}, "`max_flops` to be at least"),
        (None, {"max_accuracy_drop": -0.1}, "`max_accuracy_drop` to be a finite number >= 0"),
        (None, {"max_accuracy_drop": 5}, "<= 1, but got 5"),
        ([torch.zeros(2, 3, 8, 8)], {"max_experts": 2}, "yield pairs"),
        ([(torch.zeros(2), [0, 1])], {"max_experts": 2}, r"tuple of 2: \(Tensor, list\)"),
        ([[torch.zeros(2)] * 3], {"max_experts": 2}, r"list of 3: \(Tensor, Tensor, Tensor\)"),
        ([("a", torch.zeros(2).long())], {"max_experts": 2}, "but got x of str"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2))], {"max_experts": 2}, "class indices"),
        ([(torch.tensor([0, 1]), torch.zeros(2, 3, 8, 8))], {"max_experts": 2}, "in this order"),
        ([(torch.zeros(2, 3, 8, 8), torch.eye(5)[:2])], {"max_experts": 2}, r"y\.argmax\(1\)"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, -1]))], {"max_experts": 2}, "from -1 to 0"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 5]))], {"max_experts": 2}, "from 0 to 5"),
        (
            [(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1).long())],
            {"max_experts": 2},
            r"`loader` to be.*class indices \[2\], but got a tensor of shape \[2, 1\].*flatten",
        ),
        (
            [(torch.zeros(2, 3, 8, 8), torch.tensor([True, False]))],
            {"max_experts": 2},
            "`loader` to be.*dtype torch.bool",
        ),
        (
            [(torch.zeros(2, 3, 8, 8), torch.tensor([0, -100]))],
            {"max_experts": 2},
            "`loader` to hold class indices.*from -100",
        ),
        (None, {"max_experts": "2"}, "`max_experts` to be a finite number"),
        (None, {"max_experts": True}, "`max_experts` to be a finite number"),
        (None, {"max_flops": float("nan")}, "`max_flops` to be a finite number"),
    ],
)
def test_bad_arguments_are_named(data, loader, target, message):
    model, router, x, _ = data
    serve = RoutingInference(model, router)
    pairs = batches(x, torch.arange(200) % 5) if loader is None else loader
    with pytest.raises(ArgumentError, match=message):
        serve.calibrate(pairs, **target)
    assert serve.threshold.tolist() == [0.5, 0.5]


def test_the_best_point_within_a_budget_by_experts_or_by_flops(data):
    _, result = calibrated(data, max_experts=2.0)
    for curve in (result.curve, *result.baselines.values()):
        for name, cost in (("max_experts", curve.mean_experts), ("max_flops", curve.flops)):
            budget = float(cost.quantile(0.5))
            best = curve.best_within(**{name: budget})
            within = [i for i in range(len(cost)) if cost[i] <= budget]
            top = max(curve.accuracy[i] for i in within)
            assert curve.accuracy[best] == top
            assert cost[best] == min(cost[i] for i in within if curve.accuracy[i] == top)
        with pytest.raises(ArgumentError, match="`max_experts` and `max_flops`, but got none"):
            curve.best_within()
        with pytest.raises(ArgumentError, match="`max_flops` to be at least"):
            curve.best_within(max_flops=1.0)


def test_progress_is_told_the_samples_of_each_batch(data):
    seen = []
    calibrated(data, max_experts=2.0, progress=seen.append)
    assert seen == [64, 64, 64, 8]
    with pytest.raises(ArgumentError, match="`progress` to be callable"):
        calibrated(data, max_experts=2.0, progress=True)


@pytest.mark.parametrize(("more", "warns"), [(0, False), (1, True)])
def test_labels_count_as_long_tailed_above_the_ratio_rarest_single_label_included(more, warns):
    from ride_plugin.routing._threshold import LONG_TAIL_RATIO, _warn_if_long_tailed

    labels = torch.tensor([0] * (int(LONG_TAIL_RATIO) + more) + [1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_if_long_tailed(labels)
    assert bool(caught) is warns


def test_thresholds_close_to_one_are_told_apart(data):
    curve = calibrated(data, max_experts=2.0)[1].curve
    assert curve.threshold_logits.dtype == torch.float32
    assert curve.thresholds.dtype == torch.float64


def test_logits_that_are_no_numbers_are_not_calibrated_on(data):
    model, x = copy.deepcopy(data[0]), data[2]
    with torch.no_grad():
        model.experts[2].fc.bias[1] = torch.nan
    serve = RoutingInference(model, ConfidenceRouter())
    with pytest.raises(ArgumentError, match="NaN"):
        serve.calibrate(batches(x, data[3]), max_experts=2.0)


def test_the_sweep_is_a_loop_over_samples_experts_and_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(60, 3, generator=generator).mul(2).round().div(2)  # many equal ones
    gates[0] = torch.tensor([-math.inf, 1.0, 1.0])
    gates[1] = torch.tensor([math.inf, -math.inf, 1.0])
    gates[2] = torch.tensor([1.0, math.nan, 1.0])
    right = torch.rand(60, 4, generator=generator) < 0.5
    row_flops = torch.tensor([[10, 17, 23, 40], [5, 6, 8, 9]])[torch.arange(60) % 2]
    curve = _sweep(gates, right, row_flops, 19.0)
    assert torch.equal(curve.relative_flops, curve.flops / 19)
    for limit, *point in zip(
        curve.threshold_logits, curve.mean_experts, curve.flops, curve.accuracy, strict=True
    ):
        used = []
        for row in gates:
            count = 1
            while count < 4 and bool(exceeds(row[count - 1], limit)):
                count += 1
            used.append(count)
        hits = [bool(row[count - 1]) for row, count in zip(right, used, strict=True)]
        flops = [int(row[count - 1]) for row, count in zip(row_flops, used, strict=True)]
        expected = [sum(values) / 60 for values in (used, flops, hits)]
        assert [float(value) for value in point] == expected


def test_relative_cost_is_that_of_all_experts_without_a_router(data):
    _, result = calibrated(data, max_experts=2.0)
    whole = cost_report(data[0]).flops
    for curve in (result.curve, *result.baselines.values()):
        torch.testing.assert_close(curve.relative_flops, curve.flops / whole)


def test_thresholds_lie_half_way_between_gates_from_the_lowest_to_the_highest(data):
    model, router, x, _ = data
    gates = router(model.router_inputs(x)).double().flatten().unique()
    curve = calibrated(data, max_experts=2.0)[1].curve
    ends, between = curve.threshold_logits[[0, -1]], curve.threshold_logits[1:-1]
    assert ends.tolist() == [-torch.inf, torch.inf]
    assert len(between) == 100  # of the 399 that there are
    middle = ((gates[1:] + gates[:-1]) / 2).float()
    assert (between[0], between[-1]) == (middle[0], middle[-1])
    assert torch.isin(between, middle).all()


class Undecided(torch.nn.Module):
    """A router that says the same of every row, so that no threshold lies between its gates."""

    def gate(self, index, mean_logits, features):
        return torch.zeros(len(mean_logits))


def test_gates_that_are_all_equal_leave_all_experts_or_one(data):
    model, _, x, y = data
    result = RoutingInference(model, Undecided()).calibrate([(x[:1], y[:1])], max_experts=3.0)
    assert result.curve.threshold_logits.tolist() == [-torch.inf, torch.inf]
    assert result.curve.mean_experts.tolist() == [3, 1]


def test_a_budget_that_a_point_meets_exactly_includes_it(data):
    curve = calibrated(data, max_experts=2.0)[1].curve
    for index in (0, len(curve.flops) // 2, len(curve.flops) - 1):
        for name, cost in (("max_experts", curve.mean_experts), ("max_flops", curve.flops)):
            best = curve.best_within(**{name: float(cost[index])})
            assert curve.accuracy[best] >= curve.accuracy[index]


def test_no_drop_at_all_is_kept_to_at_the_least_cost(data):
    _, result = calibrated(data, max_accuracy_drop=0)
    curve = result.curve
    as_good = curve.accuracy >= curve.accuracy[0]
    assert as_good[result.index]
    assert curve.flops[result.index] == curve.flops[as_good].min()


def test_baselines_have_gates_that_cost_nothing(data):
    costs = cost_report(data[0]).flops_by_experts
    for curve in calibrated(data, max_experts=2.0)[1].baselines.values():
        assert (curve.flops[0], curve.flops[-1]) == (costs[-1], costs[0])


def rows_of(result):
    return [(line[:16].strip(), *line[16:].split()) for line in str(result).splitlines()[2:]]


def a_row(name, curve, index):
    values = [
        f"{curve.threshold_logits[index]:.3f}",
        f"{curve.mean_experts[index]:.3f}",
        f"{curve.relative_flops[index]:.2f}",
        f"{curve.accuracy[index]:.4f}",
    ]
    return (name, *values)


@pytest.mark.parametrize(
    "target", [{"max_experts": 1.8}, {"max_flops": None}, {"max_accuracy_drop": 0.02}]
)
def test_the_comparison_is_of_the_best_of_each_gate_within_what_was_asked(data, target):
    if "max_flops" in target:
        costs = cost_report(data[0], router=data[1]).flops_by_experts
        target = {"max_flops": (costs[0] + costs[1]) / 2}
    _, result = calibrated(data, **target)
    ((name, value),) = target.items()
    expected = [a_row("router", result.curve, result.index)]
    for kind, curve in result.baselines.items():
        points = zip(curve.mean_experts, curve.flops, curve.accuracy, strict=True)
        points = [(*map(float, point), i) for i, point in enumerate(points)]
        if name == "max_accuracy_drop":
            good = [p for p in points if p[2] >= points[0][2] - value - 1e-12]
            best = min(good, key=lambda p: p[1])
        else:
            within = [p for p in points if p[name == "max_flops"] <= value]
            best = min(within, key=lambda p: (-p[2], p[name == "max_flops"]))
        expected.append(a_row(kind, curve, best[3]))
    expected.append(a_row("all experts", result.curve, 0))
    assert rows_of(result) == expected
    assert f"{name}={value:g}" in str(result).splitlines()[0]


@pytest.mark.parametrize("kind", ["margin", "max_probability"])
def test_the_row_of_a_confidence_exit_has_its_name_and_comes_once(data, kind):
    model, _, x, y = data
    serve = RoutingInference(model, ConfidenceRouter(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LongTailedCalibrationWarning)
        result = serve.calibrate(batches(x, y), max_experts=1.8)
    (other,) = set(result.baselines) - {kind}
    rows = rows_of(result)
    assert [row[0] for row in rows] == [kind, other, "all experts"]
    assert rows[0] == a_row(kind, result.curve, result.index)


def test_empty_batches_are_passed_over_and_batches_of_one_count(data):
    model, _, x, y = data
    loader = [(x[:0], y[:0]), (x[:1], y[:1]), (x[:0], y[:0]), (x[1:4], y[1:4])]
    result = RoutingInference(model, ConfidenceRouter()).calibrate(loader, max_experts=2.0)
    assert result.num_samples == 4


class Settled(torch.nn.Module):
    """A router that is certain: its gate's logit is -inf."""

    def gate(self, index, mean_logits, features):
        return torch.full((len(mean_logits),), -torch.inf)


def test_threshold_zero_runs_all_experts_whatever_the_gate_says(data):
    model, _, x, _ = data
    serve = RoutingInference(model, Settled())
    y = torch.arange(len(x)) % 5
    assert serve.calibrate([(x, y)], max_experts=3.0).curve.mean_experts[0] == 3
    serve.set_threshold(0.0)
    assert (serve(x, return_routing=True).num_experts_used == 3).all()


def test_classes_without_a_sample_do_not_count_as_rare():
    from ride_plugin.routing._threshold import _warn_if_long_tailed

    _warn_if_long_tailed(torch.tensor([0, 2, 2, 5]))  # warnings are errors here


class Sequences(torch.nn.Module):
    """Its cost grows with the length of its sequences."""

    def __init__(self):
        super().__init__()
        self.stem, self.late = torch.nn.Linear(6, 8), torch.nn.Linear(8, 12)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.late(self.stem(x).relu()).relu().mean(1))


def of_lengths(*lengths):
    return [(torch.randn(8, length, 6), torch.arange(8) % 5) for length in lengths]


def test_each_row_costs_what_its_shape_costs():
    torch.manual_seed(0)
    model = RIDEWrapper(Sequences(), 3, fork_at="late", example_input=torch.randn(2, 4, 6)).eval()
    serve = RoutingInference(model, ExpertRouter.for_model(model))
    loader = of_lengths(2, 64, 16, 64)
    reports = [cost_report(model, example_input=x, router=serve.router) for x, _ in loader]
    result = serve.calibrate(loader, max_experts=2.0)
    curve = result.curve
    for i in range(0, len(curve.thresholds), 5):
        serve.threshold_logits.fill_(curve.threshold_logits[i])
        spent = [
            report.flops_by_experts[used - 1]
            for report, (x, _) in zip(reports, loader, strict=True)
            for used in serve(x, return_routing=True).num_experts_used.tolist()
        ]
        assert float(curve.flops[i]) == sum(spent) / len(spent)
    whole = sum(report.flops for report in reports) / len(reports)
    for one in (curve, *result.baselines.values()):
        torch.testing.assert_close(one.relative_flops, one.flops / whole)
    backwards = serve.calibrate(loader[::-1], max_experts=2.0)
    assert torch.equal(backwards.curve.flops, curve.flops)


def test_the_cost_of_a_shape_is_counted_once():
    model = small_model()
    serve = RoutingInference(model, ConfidenceRouter())
    before = model.trunk_runs
    sizes = (8, 8, 10, 8, 10)
    loader = [(torch.randn(5 + k, 3, s, s), torch.arange(5 + k) % 5) for k, s in enumerate(sizes)]
    serve.calibrate(loader, max_experts=2.0)
    assert model.trunk_runs - before == len(loader) + 2 * len(set(sizes))


class Deep(torch.nn.Module):
    """Runs its expert's layer as often as it is told, by a number or by a list with one."""

    def __init__(self):
        super().__init__()
        self.stem, self.late = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x, depth):
        x = self.stem(x).relu()
        for _ in range(depth if isinstance(depth, int) else depth[0]):
            x = self.late(x).relu()
        return self.head(x)


@pytest.mark.parametrize("kind", [int, lambda depth: [depth]], ids=["number", "list"])
def test_calls_of_one_shape_with_other_arguments_cost_what_each_costs(kind):
    x, y = torch.randn(10, 6), torch.arange(10) % 5
    model = RIDEWrapper(Deep(), 3, fork_at="late", example_input=(x[:2], kind(1))).eval()
    serve = RoutingInference(model, ConfidenceRouter())
    loader = [({"x": x, "depth": kind(depth)}, y) for depth in (1, 3)]
    costs = [cost_report(model, example_input=given).flops for given, _ in loader]
    assert costs == [2 * 6 * 8 + 3 * 2 * (8 * 8 * depth + 8 * 5) for depth in (1, 3)]
    for pairs in (loader, loader[::-1]):
        curve = serve.calibrate(pairs, max_experts=3.0).curve
        assert float(curve.flops[0]) == sum(costs) / 2


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.stem = torch.nn.Embedding(7, 6), torch.nn.Linear(6, 8)
        self.late, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(self.late(self.stem(self.words(ids)).relu()).relu().mean(1))


@pytest.mark.parametrize("backbone", [Sequences, Words])
def test_a_stored_state_costs_what_its_batch_does(backbone):
    x = torch.randn(12, 4, 6) if backbone is Sequences else torch.randint(7, (12, 4))
    y = torch.arange(12) % 5
    model = RIDEWrapper(backbone(), 3, fork_at="late", example_input=x[:2]).eval()
    serve = RoutingInference(model, ExpertRouter.for_model(model))
    with torch.no_grad():
        state = model.run_trunk(x)
    expected = serve.calibrate([(x, y)], max_experts=2.0).curve
    whole = serve.calibrate([(state, y)], max_experts=2.0).curve
    parts = torch.arange(12).split(5)
    split = serve.calibrate([(state.select(rows), y[rows]) for rows in parts], max_experts=2.0)
    for curve in (whole, split.curve):
        torch.testing.assert_close(curve.flops, expected.flops)
        torch.testing.assert_close(curve.relative_flops, expected.relative_flops)


@pytest.fixture
def elsewhere(monkeypatch):
    """As with a model on an accelerator: only what was brought to the CPU may be read."""
    copied, cpu = [], torch.Tensor.cpu

    def brought(tensor):
        copied.append(cpu(tensor))
        return copied[-1]

    monkeypatch.setattr(torch.Tensor, "cpu", brought)
    monkeypatch.setattr(_tensors, "may_read", lambda one: any(one is t for t in copied))


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [(-1, 0.0, "from -1 to"), (5, 0.0, "to 5"), (0, math.nan, "NaN and"), (0, math.inf, "NaN and")],
)
@pytest.mark.usefixtures("elsewhere")
def test_labels_and_logits_are_looked_at_wherever_the_model_is(label, value, message):
    model = small_model()
    x, y = torch.randn(10, 3, 8, 8), torch.arange(10) % 5
    y[3] = label
    with torch.no_grad():
        model.experts[2].fc.bias[1] += value
    serve = RoutingInference(model, ConfidenceRouter())
    with pytest.raises(ArgumentError, match=message):
        serve.calibrate([(x, y)], max_experts=2.0)


def test_batches_go_to_where_the_model_is():
    serve = RoutingInference(small_model(), ConfidenceRouter())
    serve.model.to("meta")
    seen = []
    serve.model.router_inputs = lambda x: seen.append(x.device) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        serve.calibrate([(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())], max_experts=2.0)
    assert seen == [torch.device("meta")]
