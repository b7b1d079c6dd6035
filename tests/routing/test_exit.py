"""The one walk: every way of serving gives the bits of a walk written in plain Python."""

import copy
from dataclasses import dataclass

import pytest
import torch

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
)
from ride_plugin.functional import running_means
from ride_plugin.routing import RoutingQueue, StagedRunner
from ride_plugin.routing._exit import exceeds
from tests.handmade import HandmadeState, Moody, small_model


@dataclass(frozen=True)
class JoinableState(HandmadeState):
    def select(self, rows):
        return JoinableState(self.features.index_select(0, rows))

    @staticmethod
    def cat(states):
        return JoinableState(torch.cat([state.features for state in states]))


def serving(num_experts=4, seed=0):
    """A model, a router whose gates fall on both sides of their thresholds, and a batch."""
    torch.manual_seed(seed)
    model = small_model(num_experts).eval()
    model.run_trunk = lambda x: JoinableState(model.trunk(x))
    for expert in model.experts:
        expert.requires_grad_(False).fc.weight.mul_(5)
    router = ExpertRouter.for_model(model).requires_grad_(False)
    x = torch.randn(48, 3, 8, 8)
    gates = router(model.router_inputs(x)).double()
    return RoutingInference(model, router, gates.quantile(0.4, dim=0).sigmoid()), x


@torch.no_grad()
def naive(serve, x):
    """Row by row in dictionaries and lists; experts run on the rows that are left, in order."""
    model = serve.model
    features = model.trunk(x)
    left, totals, output, used = list(range(len(x))), {}, {}, {}
    for index in range(model.num_experts):
        logits, pooled = model.experts[index](features[left])
        for place, row in enumerate(left):
            totals[row] = totals[row] + logits[place] if index else logits[place]
            output[row] = totals[row] / (index + 1)
            used[row] = index + 1
        if index == model.num_experts - 1:
            break
        gates = serve.router.gate(index, torch.stack([output[row] for row in left]), pooled)
        limit = serve.threshold_logits[index].item()
        left = [row for row, gate in zip(left, gates.tolist(), strict=True) if gate > limit]
        if not left:
            break
    rows = range(len(x))
    return torch.stack([output[row] for row in rows]), torch.tensor([used[row] for row in rows])


def runner_of(serve):
    """The stages as plain functions of tensors, as another runtime would offer them."""
    stages = {"trunk": serve.model.trunk}
    for index, expert in enumerate(serve.model.experts):
        stages[f"expert_{index}"] = expert
    for index in range(serve.model.num_experts - 1):
        stages[f"gate_{index}"] = lambda mean, features, index=index: serve.stages.goes_on(
            index, mean, features
        )
    return StagedRunner(stages)


@pytest.mark.parametrize("seed", range(3))
def test_inference_queue_and_runner_give_the_bits_of_the_naive_walk(seed):
    serve, x = serving(seed=seed)
    logits, used = naive(serve, x)
    assert used.unique().tolist() == [1, 2, 3, 4]  # else the comparison says nothing
    queue = RoutingQueue(serve, batch_size=64, max_wait=0)  # finishes each batch by itself
    ticket = queue.submit(x)
    for name, output in (
        ("inference", serve(x, return_routing=True)),
        ("queue", queue.results()[ticket]),
        ("runner", runner_of(serve)(x, return_routing=True)),
    ):
        assert torch.equal(output.num_experts_used, used), name
        assert torch.equal(output.logits, logits), name


def test_running_means_have_the_bits_of_a_walk_on_which_every_row_goes_on():
    serve, x = serving()
    means = running_means(serve.model.router_inputs(x).expert_logits)
    for count in (1, 2, 3, 4):
        serve.threshold_logits.fill_(-torch.inf)
        serve.threshold_logits[count - 1 :] = torch.inf
        output = serve(x, return_routing=True)
        assert output.num_experts_used.tolist() == [count] * len(x)
        assert torch.equal(means[:, count - 1], output.logits)
        assert torch.equal(serve.dense(x), output.logits)


def test_calibration_walks_as_inference_does():
    serve, x = serving()
    labels = torch.arange(len(x)) % 5
    curve = serve.calibrate([(x, labels)], max_experts=3.0).curve
    for index in range(0, len(curve.threshold_logits), 9):
        serve.threshold_logits.fill_(curve.threshold_logits[index])
        logits, used = naive(serve, x)
        assert curve.mean_experts[index] == used.double().mean()
        assert curve.accuracy[index] == (logits.argmax(1) == labels).double().mean()


class ByHand(torch.nn.Module):
    """A router that a user wrote."""

    def __init__(self, gate):
        super().__init__()
        self.by_hand = gate

    def gate(self, index, mean_logits, features):
        return self.by_hand(mean_logits[:, 0])


GATES = {
    "a column": lambda z: z[:, None],
    "of other rows": lambda z: torch.ones(2),
    "a number": lambda z: 1.0,
    "one for all": lambda z: z.sum(),
    "integers": lambda z: z.long(),
    "decisions": lambda z: z > 0,
    "NaN": lambda z: torch.where(torch.arange(len(z)) == 1, torch.nan, z),
}


@pytest.mark.parametrize("kind", GATES)
def test_what_a_gate_cannot_say_is_refused_wherever_a_router_is_used(kind):
    serve, x = serving()
    model = serve.model
    serve = RoutingInference(model, ByHand(GATES[kind]))
    queue = RoutingQueue(serve)
    for call in (
        lambda: serve(x),
        lambda: serve.dense(x),
        lambda: queue.submit(x),
        lambda: runner_of(serve)(x),
        lambda: serve.calibrate([(x, torch.arange(len(x)) % 5)], max_experts=2.0),
    ):
        with pytest.raises(ArgumentError, match="`router`"):
            call()


def test_a_gate_that_is_infinitely_sure_decides():
    serve, x = serving()
    for sure, used in ((torch.inf, 4), (-torch.inf, 1)):
        certain = RoutingInference(serve.model, ByHand(lambda z, sure=sure: z * 0 + sure))
        assert (certain(x, return_routing=True).num_experts_used == used).all()


def test_logits_that_are_no_numbers_are_refused_whatever_the_router_reads():
    serve, x = serving()
    serve = RoutingInference(serve.model, ByHand(lambda z: torch.ones(len(z))))
    with pytest.raises(ArgumentError, match="experts' logits to be free of NaN"):
        serve(x * torch.nan)
    serve.model.experts[2].fc.bias.data[1] = torch.nan
    with pytest.raises(ArgumentError, match="experts' logits to be free of NaN"):
        serve(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("parts", ["model", "router", "both", "whole"])
def test_calibration_is_what_inference_does_in_every_precision(dtype, parts):
    serve, x = serving()
    if parts in ("model", "both"):
        serve.model.to(dtype)
    if parts in ("router", "both"):
        serve.router.to(dtype)
    if parts == "whole":
        serve.to(dtype)
    assert serve.threshold_logits.dtype == torch.float32
    x = x.to(next(serve.model.parameters()).dtype)
    labels = torch.arange(len(x)) % 5
    curve = serve.calibrate([(x, labels)], max_experts=2.0).curve
    for index in range(len(curve.threshold_logits)):
        serve.threshold_logits.fill_(curve.threshold_logits[index])
        # Every row of one batch: in half precision the bits of a row depend on its company.
        logits, used = serve.dense(x, return_routing=True)
        assert curve.mean_experts[index] == used.double().mean()
        assert curve.accuracy[index] == (logits.argmax(1) == labels).double().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_limit_between_two_neighbours_tells_them_apart(dtype):
    gates = torch.tensor([1.0, 1.0]).to(dtype)
    gates[1] += torch.finfo(dtype).eps
    for share in (0.1, 0.5, 0.9):
        limit = torch.lerp(gates[0].float(), gates[1].float(), share)
        assert exceeds(gates, limit).tolist() == [False, True]
    for limit, goes_on in ((-torch.inf, True), (torch.inf, False)):
        extremes = torch.tensor([-torch.inf, 0.0, torch.inf]).to(dtype)
        assert exceeds(extremes, torch.tensor(limit)).tolist() == [goes_on] * 3


def by_queue(serve, x):
    queue = RoutingQueue(serve, batch_size=64, max_wait=9)
    ticket = queue.submit(x)
    return queue.flush()[ticket]


@pytest.mark.parametrize(
    "run",
    [
        lambda serve, x: serve(x, return_routing=True),
        lambda serve, x: serve.dense(x, return_routing=True),
        by_queue,
    ],
)
def test_a_router_decides_in_evaluation_mode_and_is_left_as_it_was(run):
    served, x = serving()
    router = Moody(5)
    with torch.no_grad():
        router.linear.weight.mul_(10)
    serve = RoutingInference(served.model, router)
    logits, used = naive(RoutingInference(served.model, copy.deepcopy(router).eval()), x)
    assert len(used.unique()) > 1
    before = {key: value.clone() for key, value in serve.state_dict().items()}
    serve.train()
    output = run(serve, x)
    assert torch.equal(output.num_experts_used, used)
    assert torch.equal(output.logits, logits)
    assert all(module.training for module in router.modules())
    labels = torch.arange(len(x)) % 5
    curves = [serve.calibrate([(x, labels)], max_experts=2.0).curve for _ in range(2)]
    assert torch.equal(curves[0].mean_experts, curves[1].mean_experts)
    assert all(
        torch.equal(value, before[key])
        for key, value in serve.state_dict().items()
        if key != "threshold_logits"
    )
    assert all(module.training for module in router.modules())


class Plain:
    """A router that is no module."""

    def gate(self, index, mean_logits, features):
        return mean_logits.amax(1)


def test_a_router_that_is_no_module_serves_and_is_calibrated():
    served, x = serving()
    first = served.model.router_inputs(x).expert_logits[:, 0].amax(1).double()
    serve = RoutingInference(served.model, Plain(), float(first.quantile(0.5).sigmoid()))
    logits, used = naive(serve, x)
    assert len(used.unique()) > 1
    for output in (
        serve(x, return_routing=True),
        serve.dense(x, return_routing=True),
        by_queue(serve, x),
    ):
        assert torch.equal(output.num_experts_used, used)
        assert torch.equal(output.logits, logits)
    result = serve.calibrate([(x, torch.arange(len(x)) % 5)], max_experts=2.0)
    assert result.curve.mean_experts[result.index] <= 2


@pytest.mark.compiles
def test_a_router_in_training_mode_is_not_compiled():
    served, x = serving()
    serve = RoutingInference(served.model, Moody(5)).eval()
    compiled = torch.compile(serve.dense, backend="eager", fullgraph=True)
    expected = serve.dense(x)
    torch.testing.assert_close(compiled(x), expected)
    serve.router.train()
    with pytest.raises(Exception, match="router to be in evaluation mode"):
        compiled(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_experts", [2, 3, 4])
def test_threshold_zero_gives_the_bits_of_the_model_itself(dtype, num_experts):
    serve, x = serving(num_experts)
    serve.to(dtype).set_threshold(0.0)
    x = x.to(dtype)
    expected = serve.model(x)
    for output in (
        serve(x, return_routing=True),
        serve.dense(x, return_routing=True),
        runner_of(serve)(x, return_routing=True),
        by_queue(serve, x),
    ):
        assert output.num_experts_used.tolist() == [num_experts] * len(x)
        assert output.logits.dtype == dtype
        assert torch.equal(output.logits, expected)


class PlacedFirst(torch.nn.Module):
    """Adds one position, for all rows, to each of them; it is the first argument."""

    def __init__(self):
        super().__init__()
        self.early, self.late = torch.nn.Linear(8, 16), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, position, x):
        return self.head(self.late((self.early(x) + position).relu()).relu())


@pytest.mark.parametrize("rows", [1, 2])
def test_a_first_tensor_without_the_batch_is_refused_with_the_way_round(rows):
    x, position = torch.randn(10, 8), torch.randn(1, 16)
    model = RIDEWrapper(PlacedFirst(), 2, fork_at="late", example_input=(position, x[:rows])).eval()
    serve = RoutingInference(model, ConfidenceRouter(), 0.3)
    for call in (serve, RoutingQueue(serve).submit):
        with pytest.raises(ArgumentError, match="it has 1 and the logits have 10"):
            call(position, x)

    named = {"x": x[:2], "position": position}
    model = RIDEWrapper(PlacedFirst(), 2, fork_at="late", example_input=named).eval()
    serve = RoutingInference(model, ConfidenceRouter(), 0.3)
    torch.testing.assert_close(serve(position=position, x=x), serve.dense(position=position, x=x))
