"""The router and its loss against loops, the authors' numbers, and bad input."""

import pytest
import torch
from torch.nn import functional as F

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ExpertRouter,
    MissingExpertLogitsError,
    RIDEWrapper,
    RoutingLoss,
    count_flops,
)
from ride_plugin.functional import routing_loss, routing_targets
from ride_plugin.routing import RouterInputs
from ride_plugin.routing._router import _describe
from tests.handmade import resnet32_ride, small_model
from tests.reference import resnet32_arrays


def inputs(batch=6, num_experts=3, num_classes=10, feature_dim=7, dtype=torch.float64):
    logits = torch.randn(batch, num_experts, num_classes, dtype=dtype)
    return RouterInputs(logits, torch.randn(batch, num_experts, feature_dim, dtype=dtype))


def loop_gates(router, expert_logits, expert_features):
    """The gates written out sample by sample."""
    rows = []
    for logits, features in zip(expert_logits, expert_features, strict=True):
        row = []
        for i in range(router.num_experts - 1):
            mean = sum(logits[j] for j in range(i + 1)) / (i + 1)
            top = torch.tensor(sorted(mean.tolist(), reverse=True)[: router.top_k]).to(mean)
            norm = sum(value * value for value in features[i].tolist()) ** 0.5
            hidden = router.hidden[i].weight @ (features[i] / norm) + router.hidden[i].bias
            z = torch.cat([top, hidden.clamp(min=0)])
            row.append(router.output.weight[0] @ z + router.output.bias[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def loop_targets(expert_logits, target):
    batch, num_experts, _ = expert_logits.shape
    out = torch.zeros(batch, num_experts - 1, dtype=torch.bool)
    for b in range(batch):
        right = []
        for i in range(num_experts):
            mean = sum(expert_logits[b, j] for j in range(i + 1)) / (i + 1)
            right.append(int(mean.argmax()) == int(target[b]))
        for i in range(num_experts - 1):
            out[b, i] = not right[i] and any(right[i + 1 :])
    return out


@pytest.mark.parametrize(("num_experts", "num_classes"), [(2, 10), (3, 40), (5, 3)])
def test_the_papers_gates_equal_loops(num_experts, num_classes):
    data = inputs(num_experts=num_experts, num_classes=num_classes)
    router = ExpertRouter(
        7, num_experts, num_classes=num_classes, top_k=4, hidden_dim=5, inputs="paper"
    ).double()
    torch.testing.assert_close(router(data), loop_gates(router, *data))


def loop_predictions(router, logits):
    """The default gates, sample by sample, from the docstring's equation."""
    batch, num_experts, classes = logits.shape
    described = torch.zeros(batch, num_experts - 1, router.top_k + 3, dtype=torch.float64)
    meant = torch.zeros(batch, num_experts - 1, 8, dtype=torch.float64)
    for b in range(batch):
        for i in range(num_experts - 1):
            z = logits[b, : i + 1].mean(0)
            p = z.exp() / z.exp().sum()
            order = sorted(range(classes), key=lambda c, z=z: -z[c].item())[: router.top_k]
            statistics = [z[c] - z.mean() for c in order]
            second = p[order[1]] if router.top_k > 1 else 1 - p[order[0]]
            statistics += [p[order[0]], p[order[0]] - second, -(p * p.log()).sum()]
            described[b, i] = torch.stack(statistics)
            meant[b, i] = sum(p[c] * router.classes.weight[c] for c in order)
    mean, variance = described.mean(0), described.var(0, correction=0)
    read = torch.cat(((described - mean) / (variance + 1e-6).sqrt(), meant), dim=2)
    columns = []
    for i in range(num_experts - 1):
        hidden = router.hidden[i](read[:, i]).relu()
        margin = described[:, i, router.top_k + 1, None]
        columns.append(router.output(torch.cat((margin, hidden), dim=1)))
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize(("num_experts", "num_classes"), [(2, 10), (3, 40), (5, 4)])
def test_gates_equal_loops(num_experts, num_classes):
    data = inputs(num_experts=num_experts, num_classes=num_classes)
    router = ExpertRouter(7, num_experts, num_classes=num_classes, top_k=4, hidden_dim=5).double()
    torch.nn.init.normal_(router.output.weight)  # as trained
    with torch.no_grad():
        expected = loop_predictions(router, data.expert_logits)
        torch.testing.assert_close(router(data), expected)
        torch.testing.assert_close(router.eval()(data), expected)


@pytest.mark.parametrize("top_k", [1, 30])
def test_a_new_router_exits_by_the_margin(top_k):
    data = inputs(batch=50, num_experts=3, num_classes=10)
    router = ExpertRouter(7, 3, num_classes=10, top_k=top_k).double()
    gates, margin = router(data).detach(), ConfidenceRouter("margin")
    for i in range(2):
        first = data.expert_logits[:, : i + 1].mean(1)
        if top_k == 1:  # with one class to look at, the rest counts as the second
            largest = first.softmax(1).amax(1)
            torch.testing.assert_close(gates[:, i], 6 * (0.5 - (2 * largest - 1)))
        else:
            known = margin.gate(i, first, data.expert_features[:, i])
            assert torch.equal(gates[:, i].argsort(), known.argsort())
            assert (
                (gates[:, i] > 0) == (first.softmax(1).topk(2).values.diff() > -0.5)[:, 0]
            ).all()


def test_inputs_are_standardised_over_all_samples_seen_however_they_are_cut():
    data = inputs(num_experts=3, num_classes=10)
    whole, cut = (ExpertRouter(7, 3, num_classes=10).double() for _ in range(2))
    whole(data)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, None)):
        cut(RouterInputs(data.expert_logits[rows], data.expert_features[rows]))
    assert cut.samples_seen == whole.samples_seen == len(data.expert_logits)
    torch.testing.assert_close(cut.input_mean, whole.input_mean)
    torch.testing.assert_close(cut.input_variance, whole.input_variance)


def test_only_training_changes_what_inputs_are_standardised_by():
    data, router = inputs(), ExpertRouter(7, 3, num_classes=10).double()
    router.eval()(data)
    router.train().gate(0, data.expert_logits[:, 0], data.expert_features[:, 0])
    assert router.samples_seen == 0
    other = ExpertRouter(7, 3, num_classes=10).double()
    router(data)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.eval()(data), router.eval()(data))


def test_masked_classes_and_constant_inputs_stay_finite_with_finite_gradients():
    router = ExpertRouter(7, 3, num_classes=10)
    logits = torch.randn(4, 3, 10)
    logits[:, :, 3:] = -torch.inf
    for given in (logits, torch.zeros(4, 3, 10), 1e4 * torch.randn(4, 3, 10)):
        gate_logits = router((given, torch.zeros(4, 3, 7)))
        gate_logits.sum().backward()
        assert gate_logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


def test_what_a_gate_computes_does_not_grow_with_the_classes():
    few, many = (
        count_flops(Gate(ExpertRouter(7, 2, num_classes=n)), torch.randn(1, n)) for n in (50, 8142)
    )
    assert few == many


class Gate(torch.nn.Module):
    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, mean_logits):
        return self.router.gate(0, mean_logits, torch.zeros(len(mean_logits), 7))


def test_the_default_gate_learns_which_classes_gain():
    torch.manual_seed(0)  # whether more experts help depends on the predicted class alone
    logits = torch.randn(2000, 2, 10)
    target = torch.where(
        logits[:, 0].argmax(1) < 5, logits.mean(1).argmax(1), logits[:, 0].argmax(1)
    )
    targets = routing_targets(logits, target)
    router = ExpertRouter(7, 2, num_classes=10)
    optimizer, criterion = torch.optim.Adam(router.parameters(), 1e-2), RoutingLoss(1.0)
    for _ in range(300):
        loss = criterion(router((logits, torch.zeros(2000, 2, 7))), logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gates = router.eval()((logits, torch.zeros(2000, 2, 7)))[:, 0]
    frequent = logits[:, 0].argmax(1) < 5
    assert targets[~frequent].sum() == 0
    assert gates[~frequent].mean() < gates[frequent & targets[:, 0]].mean() - 3


def test_classes_are_weighted_by_one_over_their_count_up_to_a_cap():
    counts, target = [1000.0, 100.0, 1.0], torch.tensor([0, 0, 1, 2])
    logits, gates = torch.randn(4, 3, 3), torch.randn(4, 2)
    mean = 3 / 1101  # of one over the count, over the training samples
    plain = [min(1 / count, 20 * mean) for count in counts]
    scale = 1101 / sum(weight * count for weight, count in zip(plain, counts, strict=True))
    weights = [plain[label] * scale for label in target.tolist()]
    targets = routing_targets(logits, target)
    expected = torch.stack(
        [
            weight * routing_loss(gates[i : i + 1], targets[i : i + 1], 3.0, 2.0)
            for i, weight in enumerate(weights)
        ]
    ).mean()
    criterion = RoutingLoss(3.0, 2.0, class_counts=counts)
    torch.testing.assert_close(criterion(gates, logits, target), expected)
    mixed = torch.nn.functional.one_hot(target, 3).float()
    torch.testing.assert_close(criterion(gates, logits, mixed), expected)
    assert plain[2] == 20 * mean  # else the cap is not tested
    with pytest.raises(ArgumentError, match="to have 3 classes"):
        criterion(gates, torch.randn(4, 3, 5), target)


def test_an_unknown_layout_is_named():
    with pytest.raises(ArgumentError, match="`inputs` to be one of 'predictions', 'paper'"):
        ExpertRouter(7, 3, num_classes=10, inputs="features")


def test_gate_gives_the_column_of_forward():
    data = inputs(num_experts=4)
    router = ExpertRouter(7, 4, num_classes=10).double()
    together = router(data)
    for i in range(3):
        alone = router.gate(i, data.expert_logits[:, : i + 1].mean(1), data.expert_features[:, i])
        torch.testing.assert_close(alone, together[:, i])


def test_features_that_are_complex_numbers_are_read_by_no_default_router():
    logits, features = inputs(dtype=torch.float32)
    router = ExpertRouter(7, 3, num_classes=10)
    expected = router((logits, features))
    torch.testing.assert_close(router((logits, torch.complex(features, features))), expected)
    paper = ExpertRouter(7, 3, num_classes=10, inputs="paper")
    with pytest.raises(ArgumentError, match=r"complex64.*the default router reads the logits"):
        paper((logits, torch.complex(features, features)))


def test_the_last_expert_does_not_reach_any_gate():
    data = inputs()
    router = ExpertRouter(7, 3, num_classes=10).double().eval()
    changed = RouterInputs(data.expert_logits.clone(), data.expert_features.clone())
    changed.expert_logits[:, 2] += 5
    changed.expert_features[:, 2] += 5
    assert torch.equal(router(data), router(changed))
    changed.expert_logits[:, 1] += torch.arange(10.0)
    assert not torch.equal(router(data), router(changed))


def test_few_classes_shrink_top_k():
    assert ExpertRouter(7, 2, num_classes=3).top_k == 3
    assert ExpertRouter(7, 2, num_classes=100).top_k == 30


def test_all_zero_features_stay_finite_with_finite_gradients():
    router = ExpertRouter(7, 3, num_classes=10, inputs="paper")
    gate_logits = router((torch.zeros(4, 3, 10), torch.zeros(4, 3, 7)))
    gate_logits.sum().backward()
    assert gate_logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


def test_masked_classes_count_as_zero():
    data = inputs()
    data.expert_logits[:, :, 3:] = -torch.inf
    router = ExpertRouter(7, 3, num_classes=10, top_k=5, inputs="paper").double()
    zeros = torch.cat([data.expert_logits[:, :2, :3].cumsum(1), torch.zeros(6, 2, 2)], dim=2)
    expected = []
    for i in range(2):
        top = torch.cat(
            [zeros[:, i, :3].sort(descending=True).values / (i + 1), zeros[:, i, 3:]], 1
        )
        hidden = router.hidden[i](F.normalize(data.expert_features[:, i], dim=1)).relu()
        expected.append(router.output(torch.cat([top, hidden], 1)).squeeze(1))
    torch.testing.assert_close(router(data), torch.stack(expected, 1))


def test_half_precision_features_do_not_overflow_when_normalised():
    data = inputs(dtype=torch.float32)
    features = (data.expert_features * 1e4).half()
    router = ExpertRouter(7, 3, num_classes=10, inputs="paper")
    with torch.autocast("cpu", torch.bfloat16):
        gate_logits = router((data.expert_logits.half(), features))
    exact = router((data.expert_logits.half().float(), features.float()))
    assert gate_logits.dtype == torch.float32
    torch.testing.assert_close(gate_logits, exact)


def test_half_precision_router_runs():
    router = ExpertRouter(7, 3, num_classes=10).bfloat16()
    assert router(inputs(dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_router_in_half_precision_takes_in_samples_as_one_in_float32(dtype):
    """Each batch adds little to a mean of many, and a router that is cast was trained before."""
    exact, half = (ExpertRouter(7, 3, num_classes=10).train() for _ in range(2))
    half.load_state_dict(exact.state_dict())
    half.to(dtype)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        logits = 4 * torch.randn(8, 3, 10, generator=generator) + step / 10
        features = torch.randn(8, 3, 7, generator=generator)
        exact((logits.to(dtype), features))
        half((logits.to(dtype), features.to(dtype)))
    assert half.hidden[0].weight.dtype == dtype
    torch.testing.assert_close(half.input_mean, exact.input_mean)
    torch.testing.assert_close(half.input_variance, exact.input_variance)


@pytest.mark.parametrize("num_experts", [2, 3, 6])
def test_targets_equal_loops(num_experts):
    logits, target = torch.randn(200, num_experts, 4), torch.randint(4, (200,))
    targets = routing_targets(logits, target)
    assert torch.equal(targets, loop_targets(logits, target))
    assert 0 < targets.float().mean() < 1


def test_soft_targets_count_as_their_most_probable_class():
    logits, target = torch.randn(50, 3, 4), torch.randint(4, (50,))
    soft = 0.9 * F.one_hot(target, 4) + 0.025
    assert torch.equal(routing_targets(logits, soft), routing_targets(logits, target))


def test_loss_equals_loops():
    gate_logits = torch.randn(9, 2, dtype=torch.float64)
    logits, target = torch.randn(9, 3, 4), torch.randint(4, (9,))
    expected = 0.0
    for g, y in zip(gate_logits.flatten(), loop_targets(logits, target).flatten(), strict=True):
        p = 1 / (1 + torch.exp(-g))
        expected += -7 * torch.log(p) if y else -0.5 * torch.log(1 - p)
    loss = RoutingLoss(7.0, 0.5)(gate_logits, logits, target)
    torch.testing.assert_close(loss, expected / 18)


def test_loss_reads_the_logits_from_every_form_of_output():
    logits, target = torch.randn(9, 3, 7), torch.randint(7, (9,))
    gate_logits = torch.randn(9, 2)
    criterion = RoutingLoss()
    # Features of the same shape: the loss must not mistake them for logits.
    pair = RouterInputs(logits, torch.randn(9, 3, 7))
    assert torch.equal(criterion(gate_logits, pair, target), criterion(gate_logits, logits, target))
    with pytest.raises(MissingExpertLogitsError, match="bare logits"):
        criterion(gate_logits, logits.mean(1), target)


def test_gradcheck():
    gate_logits = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 2) > 0.5
    assert torch.autograd.gradcheck(lambda g: routing_loss(g, targets), (gate_logits,))


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_gates_give_finite_loss_and_gradient(extreme):
    gate_logits = torch.full((2, 2), extreme, requires_grad=True)
    loss = routing_loss(gate_logits, torch.tensor([[True, False], [False, True]]))
    loss.backward()
    assert loss.isfinite()
    assert gate_logits.grad.isfinite().all()


@pytest.mark.reference
def test_the_authors_numbers():
    arrays, state = resnet32_arrays()
    _, router = resnet32_ride(state)
    router.double()
    data = RouterInputs(arrays["expert_logits"].double(), arrays["expert_features"].double())
    loss = RoutingLoss()(router(data), data, arrays["target"])
    torch.testing.assert_close(loss.float(), arrays["routing_loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    grads = {
        "expert_help_pred_hidden_fcs.0": router.hidden[0],
        "expert_help_pred_hidden_fcs.1": router.hidden[1],
        "expert_help_pred_fc": router.output,
    }
    for name, layer in grads.items():
        for kind in ("weight", "bias"):
            expected = arrays[f"routing_grad/{name}.{kind}"]
            got = getattr(layer, kind).grad.float()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("kind", ["handmade", "wrapper"])
def test_stage_two_trains_the_router_only(kind):
    model = small_model()
    if kind == "wrapper":
        backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 12, 3), torch.nn.BatchNorm2d(12), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 5),
        )  # fmt: skip
        model = RIDEWrapper(backbone, 3, example_input=torch.zeros(2, 3, 8, 8))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    router = ExpertRouter.for_model(model)
    criterion, optimizer = RoutingLoss(), torch.optim.Adam(router.parameters(), lr=1e-2)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(5, (64,))
    losses = []
    cached = model.router_inputs(x)
    for _ in range(80):
        loss = criterion(router(cached), cached, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_confidence_gates_equal_one_minus_confidence():
    logits = torch.randn(50, 6, dtype=torch.float64) * 3
    p = logits.softmax(1).sort(descending=True).values
    for kind, confidence in (("max_probability", p[:, 0]), ("margin", p[:, 0] - p[:, 1])):
        gate = ConfidenceRouter(kind).gate(0, logits, torch.empty(50, 0))
        torch.testing.assert_close(gate.sigmoid(), 1 - confidence)


def test_confidence_tells_very_confident_rows_apart():
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [0.0, 0.0]])
    for kind in ("max_probability", "margin"):
        gate = ConfidenceRouter(kind).gate(0, logits, torch.empty(3, 0))
        assert gate[1] < gate[0] < gate[2]
        assert not gate.isnan().any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExpertRouter(7, 1, num_classes=4), "nothing to route"),
        (lambda: ExpertRouter(0, 3, num_classes=4), "`feature_dim` to be an integer >= 1"),
        (lambda: ExpertRouter(7, 3, num_classes=4, top_k=0), "`top_k` to be an integer >= 1"),
        (lambda: RoutingLoss(pos_weight=-1), "`pos_weight` to be a finite"),
        (lambda: RoutingLoss(neg_weight=float("nan")), "`neg_weight` to be a finite"),
        (lambda: ConfidenceRouter("entropy"), "`kind` to be one of"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


@pytest.mark.parametrize(
    ("logits", "features", "message"),
    [
        (
            torch.zeros(4, 2, 10),
            torch.zeros(4, 3, 7),
            r"`expert_logits` to be a floating-point tensor \[B, 3, 10\]",
        ),
        (
            torch.zeros(4, 3, 10),
            torch.zeros(4, 3, 8),
            r"`expert_features` to be a floating-point tensor \[B, 3, 7\]",
        ),
        (torch.zeros(4, 3, 10), torch.zeros(5, 3, 7), "the same batch"),
        (torch.full((4, 3, 10), torch.nan), torch.zeros(4, 3, 7), "experts' logits to be free"),
        (torch.zeros(4, 3, 10), torch.full((4, 3, 7), torch.nan), "experts' features to be free"),
    ],
)
def test_bad_inputs_are_named(logits, features, message):
    with pytest.raises(ArgumentError, match=message):
        ExpertRouter(7, 3, num_classes=10)((logits, features))


def test_a_diverged_router_is_named():
    router = ExpertRouter(7, 3, num_classes=10)
    torch.nn.init.constant_(router.output.bias, torch.nan)
    with pytest.raises(ArgumentError, match="router's parameters"):
        router(inputs(dtype=torch.float32))


def test_a_tensor_instead_of_a_pair_is_named():
    with pytest.raises(ArgumentError, match="router_inputs"):
        ExpertRouter(7, 3, num_classes=10)(torch.zeros(4, 3, 10))


def nan_of(expert, value=torch.nan):
    """Logits of three experts, one of whose values is no number."""
    logits = torch.zeros(4, 3, 5)
    logits[2, expert, 1] = value
    return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_the_router_refuses_what_is_no_number_in_any_expert(expert, value):
    with pytest.raises(ArgumentError, match="free of NaN"):
        ExpertRouter(7, 3, num_classes=5)((nan_of(expert, value), torch.zeros(4, 3, 7)))
    features = torch.zeros(4, 3, 7)
    features[1, expert, 0] = value
    with pytest.raises(ArgumentError, match="free of NaN"):
        ExpertRouter(7, 3, num_classes=5)((torch.zeros(4, 3, 5), features))


@pytest.mark.parametrize(
    ("gate_logits", "logits", "target", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3, 5), torch.zeros(4).long(), "`gate_logits` to be"),
        (
            torch.zeros(4, 2),
            torch.zeros(4, 3, 5),
            torch.full((4,), 5),
            "from 0 to 4, but got values from 5",
        ),
        (
            torch.zeros(4, 2),
            torch.zeros(4, 3, 5),
            torch.full((4,), -1),
            "from 0 to 4, but got values from -1",
        ),
        (torch.zeros(4, 2), torch.zeros(4, 3, 5), torch.zeros(3).long(), "`target`"),
        (torch.zeros(4, 0), torch.zeros(4, 1, 5), torch.zeros(4).long(), "at least two experts"),
        (torch.zeros(0, 2), torch.zeros(0, 3, 5), torch.zeros(0).long(), "at least one sample"),
        (torch.full((4, 2), torch.nan), torch.zeros(4, 3, 5), torch.zeros(4).long(), "free of NaN"),
        (torch.zeros(4, 2), nan_of(2), torch.zeros(4).long(), "free of NaN"),
    ],
)
def test_bad_loss_arguments_are_named(gate_logits, logits, target, message):
    with pytest.raises(ArgumentError, match=message):
        RoutingLoss()(gate_logits, logits, target)


def test_the_router_is_built_where_the_model_is_or_for_sizes_alone():
    model = small_model()
    assert ExpertRouter.for_model(model).output.weight.device.type == "cpu"
    assert ExpertRouter.for_model(model.to("meta")).output.weight.device.type == "meta"

    class Sizes:
        feature_dim, num_experts, num_classes = 12, 3, 5

    assert ExpertRouter.for_model(Sizes(), top_k=2).num_experts == 3


def test_weights_of_the_routing_loss_may_be_zero_or_small():
    gates, output = torch.randn(4, 2), torch.randn(4, 3, 5)
    target = torch.tensor([0, 1, 2, 3])
    for weights in ((0, 1), (1, 0), (0.5, 0.5)):
        assert RoutingLoss(*weights)(gates, output, target).isfinite()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gates_that_read_few_logits_equal_loops(top_k):
    data = inputs(num_experts=3, num_classes=6)
    router = ExpertRouter(7, 3, num_classes=6, top_k=top_k).double()
    with torch.no_grad():
        torch.testing.assert_close(router(data), loop_predictions(router, data.expert_logits))


def test_of_one_logit_the_margin_is_over_all_other_classes_together():
    z = torch.randn(4, 6, dtype=torch.float64)
    p = z.softmax(1)
    best = p.amax(1)
    expected = [z.amax(1) - z.mean(1), best, best - (1 - best), -(p * p.log()).sum(1)]
    torch.testing.assert_close(_describe(z, 1)[0], torch.stack(expected, dim=1))


def test_masked_classes_count_neither_in_the_mean_nor_in_the_statistics():
    """A network of fewer classes, the others masked, reads what the smaller network reads."""
    small = torch.randn(5, 2, 3, dtype=torch.float64)
    for classes in (3, 1):  # of one class alone its logit is the mean
        padded = torch.full((5, 2, 6), -torch.inf, dtype=torch.float64)
        padded[:, :, :classes] = small[:, :, :classes]
        top, likely, where = _describe(padded[:, 0], 3)
        assert torch.equal(where[:, 0], small[:, 0, :classes].argmax(1))
        mean = small[:, 0, :classes].mean(1)
        torch.testing.assert_close(top[:, 0], small[:, 0, :classes].amax(1) - mean)
        assert (top[:, classes:3] == 0).all()
        assert (likely[:, classes:] == 0).all()


def test_a_router_that_has_seen_nothing_reads_its_inputs_as_they_are():
    router = ExpertRouter(7, 3, num_classes=500)
    assert torch.equal(router.input_mean, torch.zeros(2, 33))
    assert torch.equal(router.input_variance, torch.ones(2, 33))
    assert router.samples_seen == 0
    assert 0.25 < float(router.classes.weight.detach().std()) < 0.35


def test_a_gate_names_what_is_no_number():
    for reading in ("predictions", "paper"):
        router = ExpertRouter(7, 3, num_classes=10, inputs=reading)
        good, features = torch.zeros(4, 10), torch.zeros(4, 7)
        bad = good.clone()
        bad[2, 3] = torch.nan
        with pytest.raises(ArgumentError, match="experts' logits to be free"):
            router.gate(0, bad, features)
        if reading == "paper":
            with pytest.raises(ArgumentError, match="experts' features to be free"):
                router.gate(0, good, features + torch.inf)


def test_stored_inputs_may_come_back_as_a_list():
    data, router = inputs(), ExpertRouter(7, 3, num_classes=10).double().eval()
    assert torch.equal(router(list(data)), router(data))
    for wrong in ((*data, data[0]), data[:1]):
        with pytest.raises(ArgumentError, match="`inputs` to be"):
            router(tuple(wrong))


def test_weights_of_mixed_labels_keep_their_digits_under_autocast():
    counts = [500, 50, 20, 5]
    criterion, gates = RoutingLoss(class_counts=counts), torch.randn(6, 1)
    logits, target = torch.randn(6, 2, 4), torch.rand(6, 4).softmax(1)
    expected = criterion(gates, logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(criterion(gates, logits, target), expected, rtol=0, atol=0)


def test_the_smallest_sizes_and_the_defaults():
    for reading, width in (("predictions", 32), ("paper", 16)):
        router = ExpertRouter(1, 2, num_classes=2, inputs=reading, top_k=1, hidden_dim=1)
        assert router((torch.randn(3, 2, 2), torch.randn(3, 2, 1))).shape == (3, 1)
        assert ExpertRouter(7, 3, num_classes=40, inputs=reading).hidden[1].out_features == width
        assert ExpertRouter(7, 3, num_classes=40, inputs=reading).top_k == 30


@pytest.mark.parametrize("reading", ["predictions", "paper"])
def test_gates_keep_their_digits_under_autocast(reading):
    data = inputs(dtype=torch.float32)
    router = ExpertRouter(7, 3, num_classes=10, inputs=reading).eval()
    expected = router(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(data), expected)


@pytest.mark.parametrize("reading", ["predictions", "paper"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_router_may_be_of_another_precision_than_what_it_reads(reading, dtype):
    data, router = inputs(dtype=dtype), ExpertRouter(7, 3, num_classes=10, inputs=reading).eval()
    same = router(tuple(value.float() for value in data))
    torch.testing.assert_close(router(data), same)
    assert router(data).dtype == torch.float32


class Rounded(torch.nn.Linear):
    """A linear layer that has rounded its weight, as quantized ones have: of float32 only."""

    def __init__(self, layer, hidden):
        super().__init__(layer.in_features, layer.out_features)
        scale = layer.weight.detach().abs().max() / 127
        rounded = (layer.weight.detach() / scale).round().to(torch.int8)
        self.scale, self.kept, self.bias = scale, rounded, layer.bias
        del self.weight
        self.weight = (lambda: rounded) if hidden else torch.nn.Parameter(rounded, False)

    def forward(self, x):
        assert x.dtype == torch.float32
        return torch.nn.functional.linear(x, self.kept * self.scale, self.bias)


@pytest.mark.parametrize("reading", ["predictions", "paper"])
@pytest.mark.parametrize("hidden", [False, True])
def test_gates_run_in_layers_that_something_has_quantized(reading, hidden):
    data, router = inputs(), ExpertRouter(7, 3, num_classes=10, inputs=reading).eval()
    expected = router(data)
    for index, layer in enumerate(router.hidden):
        router.hidden[index] = Rounded(layer, hidden)
    router.output = Rounded(router.output, hidden)
    torch.testing.assert_close(router(data), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["max_probability", "margin"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_confidence_of_what_is_no_number_is_refused(kind, value):
    logits = torch.randn(4, 5)
    assert ConfidenceRouter(kind).gate(0, logits, logits).isfinite().all()
    logits[2, 1] = value
    with pytest.raises(ArgumentError, match="`mean_logits` to be free of NaN"):
        ConfidenceRouter(kind).gate(0, logits, logits)


def test_gates_behind_a_sigmoid_are_refused() -> None:
    gates, logits = torch.randn(5, 2, requires_grad=True), torch.randn(5, 3, 4)
    target = torch.tensor([0, 1, 2, 3, 0])
    assert RoutingLoss()(gates, logits, target).requires_grad
    for given in (gates.sigmoid(), torch.nn.functional.logsigmoid(gates)):
        with pytest.raises(ArgumentError, match=r"`gate_logits`.*the result of a sigmoid"):
            RoutingLoss()(given, logits, target)


@pytest.mark.parametrize("size", [1e18, 1e23, 1e36])
def test_finite_logits_of_any_size_leave_the_router_finite(size):
    torch.manual_seed(0)
    router = ExpertRouter(4, 3, num_classes=5)
    logits = size * torch.randn(8, 3, 5)
    for _ in range(2):
        assert router((logits, torch.randn(8, 3, 4))).isfinite().all()
    assert all(value.isfinite().all() for value in router.state_dict().values())
