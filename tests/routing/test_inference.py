"""Routed inference against the dense selection, the authors' numbers, and its own promises."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ride_plugin import (
    ArgumentError,
    CheckpointError,
    ConfidenceRouter,
    ExpertRouter,
    MissingExpertLogitsError,
    RIDEWrapper,
    RoutingInference,
    experts_loss,
)
from ride_plugin.routing import RoutingOutput
from tests.handmade import resnet32_ride, small_model
from tests.reference import REFERENCE, SHARED, resnet32_arrays

OFFICIAL, CIFAR = REFERENCE / "official_ride_ea.pth", SHARED / "data" / "cifar100_lt.npz"


def conv_backbone():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def serving(model=None, threshold=0.5, seed=0):
    """A model and a router whose gates fall on both sides of one half."""
    torch.manual_seed(seed)
    model = small_model() if model is None else model
    with torch.no_grad():
        for expert in model.experts:
            for parameter in expert.parameters():
                parameter.mul_(3.0)
    router = ExpertRouter.for_model(model)
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        router.output.weight.mul_(10)
        router.output.bias.sub_(router(model.router_inputs(x)).quantile(0.5))
    return RoutingInference(model, router, threshold), x


def selected_by_hand(serve, x):
    """Everything computed for all rows, then chosen row by row with Python floats."""
    logits, features = serve.model.router_inputs(x)
    outputs, used = [], []
    for row in range(len(x)):
        count = 1
        while count < serve.model.num_experts:
            mean = logits[row : row + 1, :count].mean(1)
            gate = serve.router.gate(count - 1, mean, features[row : row + 1, count - 1])
            if not gate.sigmoid().item() > serve.threshold[count - 1].item():
                break
            count += 1
        outputs.append(logits[row, :count].mean(0))
        used.append(count)
    return torch.stack(outputs), torch.tensor(used)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["handmade", "wrapper"])
def test_routed_and_dense_equal_the_selection_row_by_row(kind, batch):
    model = RIDEWrapper(conv_backbone(), 3, example_input=torch.zeros(2, 3, 8, 8))
    serve, x = serving(model if kind == "wrapper" else None, threshold=(0.5, 0.4))
    x = x[-batch:]
    logits, used = selected_by_hand(serve, x)
    if batch == 64:
        assert used.unique().tolist() == [1, 2, 3]  # else the comparison says nothing
    for path in (serve, serve.dense):
        got = path(x, return_routing=True)
        assert isinstance(got, RoutingOutput)
        assert got.num_experts_used.dtype == torch.int64
        assert torch.equal(got.num_experts_used, used)
        torch.testing.assert_close(got.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(path(x), got.logits)


MODELS = {num_experts: small_model(num_experts).eval() for num_experts in (2, 3, 5)}


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.sampled_from(sorted(MODELS)),
    batch=st.integers(1, 12),
    quantiles=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_routed_equals_dense_for_random_routers_and_thresholds(num_experts, batch, quantiles, seed):
    serve, x = serving(copy.deepcopy(MODELS[num_experts]), seed=seed)
    serve.set_threshold(quantiles[: num_experts - 1])
    x = x[:batch]
    routed, dense = serve(x, return_routing=True), serve.dense(x, return_routing=True)
    assert torch.equal(routed.num_experts_used, dense.num_experts_used)
    torch.testing.assert_close(routed.logits, dense.logits, rtol=1e-4, atol=1e-4)


class FixedGate(nn.Module):
    """A gate that returns what it was given, whatever it reads."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def gate(self, index, mean_logits, features):
        return mean_logits.new_full((len(mean_logits),), self.value)


@pytest.mark.parametrize("value", [-torch.inf, -1e4, 0.0, 1e4, torch.inf])
def test_threshold_zero_runs_all_and_one_runs_one_however_saturated(value):
    model, x = small_model().eval(), torch.randn(6, 3, 8, 8)
    for threshold, count in ((0.0, 3), (1.0, 1)):
        serve = RoutingInference(model, FixedGate(value), threshold)
        for path in (serve, serve.dense):
            logits, used = path(x, return_routing=True)
            assert used.tolist() == [count] * 6
            expected = model.router_inputs(x).expert_logits[:, :count].mean(1)
            torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(RoutingInference(model, FixedGate(value), 0.0)(x), model(x))


def test_a_gate_on_the_threshold_does_not_go_on():
    serve = RoutingInference(small_model(), FixedGate(0.0), 0.5)
    assert serve(torch.randn(2, 3, 8, 8), return_routing=True).num_experts_used.tolist() == [1, 1]


def test_trunk_runs_once_and_experts_see_only_active_rows():
    serve, x = serving(threshold=(0.5, 0.4))
    model = serve.model
    model.trunk_runs, model.rows_of_expert = 0, [[], [], []]
    used = serve(x, return_routing=True).num_experts_used
    assert model.trunk_runs == 1
    assert model.rows_of_expert == [[64], [int((used > 1).sum())], [int((used > 2).sum())]]


@pytest.mark.parametrize(("value", "runs"), [(-9.0, [[5], [], []]), (9.0, [[5], [5], [5]])])
def test_nothing_runs_for_no_rows_and_nothing_is_gathered_for_all_rows(value, runs, monkeypatch):
    model = small_model().eval()

    def refuse(state, rows):
        raise AssertionError("gathered")

    monkeypatch.setattr("tests.handmade.HandmadeState.select", refuse)
    RoutingInference(model, FixedGate(value))(torch.randn(5, 3, 8, 8))
    assert model.rows_of_expert == runs


def test_at_most_one_nonzero_per_gate_and_no_item_off_the_cpu(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    serve, x = serving(threshold=(0.5, 0.4))
    serve.router = ConfidenceRouter()
    serve(x)
    for where in ("_tensors", "_values"):  # as elsewhere
        monkeypatch.setattr(f"ride_plugin._checks.{where}.may_read", lambda tensor: False)
    with Count():
        serve(x)
    assert Count.seen.count("nonzero") == 2
    assert "_local_scalar_dense" not in Count.seen


def test_an_empty_batch_gives_empty_logits():
    serve, x = serving()
    logits, used = serve(x[:0], return_routing=True)
    assert (tuple(logits.shape), tuple(used.shape)) == ((0, 5), (0,))


@pytest.mark.parametrize("path", ["forward", "dense"])
def test_a_model_in_training_mode_is_evaluated_and_left_as_it_was(path):
    serve, x = serving()
    expected = serve.eval()(x)
    serve.train()
    serve.model.experts[1].eval()
    modes = [module.training for module in serve.modules()]
    before = {key: value.clone() for key, value in serve.state_dict().items()}
    torch.testing.assert_close(getattr(serve, path)(x), expected, rtol=1e-5, atol=1e-5)
    assert [module.training for module in serve.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in serve.state_dict().items())


def test_no_gradient_and_no_expert_logits_leave():
    serve, x = serving()
    logits = serve(x)
    assert not logits.requires_grad
    with pytest.raises(MissingExpertLogitsError, match="RoutingInference"):
        experts_loss(nn.CrossEntropyLoss(), logits, torch.zeros(64, dtype=torch.long))


def test_the_model_output_is_not_written_to():
    serve, x = serving(threshold=(0.5, 0.4))
    outputs = []
    run_expert = serve.model.run_expert

    def keep(index, state):
        result = run_expert(index, state)
        outputs.append((result[0], result[0].clone()))
        return result

    serve.model.run_expert = keep
    serve(x)
    assert all(torch.equal(now, then) for now, then in outputs)


def test_thresholds_change_in_place_and_are_saved():
    serve, _ = serving()
    address = serve.threshold_logits.data_ptr()
    serve.set_threshold((0.25, 0.75))
    assert serve.threshold_logits.data_ptr() == address
    other, _ = serving()
    other.load_state_dict(serve.state_dict())
    assert other.threshold.tolist() == pytest.approx([0.25, 0.75])
    changed = serve.threshold
    changed[1] = 0.5
    assert serve.threshold.tolist() == pytest.approx([0.25, 0.75])
    for value in (changed, [0.25, 0.5]):
        serve.set_threshold(1)
        serve.threshold = value
        assert serve.threshold.tolist() == pytest.approx([0.25, 0.5])
    assert serve.threshold_logits.data_ptr() == address
    assert "0.25" in repr(serve)


@pytest.mark.parametrize("kind", ["handmade", "wrapper"])
@pytest.mark.compiles
def test_dense_compiles_into_one_graph_that_new_thresholds_do_not_change(kind):
    model = RIDEWrapper(conv_backbone(), 3, example_input=torch.zeros(2, 3, 8, 8))
    serve, x = serving(model if kind == "wrapper" else None)
    serve.eval()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(serve.dense, backend=backend, fullgraph=True)
    for threshold in (0.5, 0.2, 0.9):
        serve.set_threshold(threshold)
        logits, used = compiled(x, return_routing=True)
        expected = serve.dense(x, return_routing=True)
        torch.testing.assert_close(logits, expected.logits)
        assert torch.equal(used, expected.num_experts_used)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.compiles
def test_a_model_in_training_mode_is_not_compiled():
    serve, x = serving()
    serve.train()
    compiled = torch.compile(serve.dense, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"Call `.eval\(\)` first"):
        compiled(x)
    torch._dynamo.reset()


def test_thresholds_keep_apart_gates_whose_float32_probabilities_are_one():
    model, x = small_model().eval(), torch.randn(2, 3, 8, 8)
    for limit, count in ((29.0, 3), (31.0, 1)):
        serve = RoutingInference(model, FixedGate(30.0))
        serve.set_threshold(torch.tensor(limit, dtype=torch.float64).sigmoid())
        assert serve(x, return_routing=True).num_experts_used.tolist() == [count] * 2


@pytest.mark.compiles
def test_dense_exports_with_a_free_batch_size():
    class Dense(nn.Module):
        def __init__(self, serve):
            super().__init__()
            self.serve = serve

        def forward(self, x):
            return tuple(self.serve.dense(x, return_routing=True))

    serve, x = serving()
    module = Dense(serve).eval()
    free = {"x": {0: torch.export.Dim("batch", min=2, max=1024)}}
    exported = torch.export.export(module, (x,), dynamic_shapes=free).module()
    for rows in (64, 7):
        logits, used = exported(x[:rows])
        torch.testing.assert_close(logits, serve.dense(x[:rows]))
        assert torch.equal(used, serve(x[:rows], return_routing=True).num_experts_used)


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [False, True])
def test_routing_is_not_exported_as_one_graph(strict):
    serve, x = serving()
    with pytest.raises(Exception, match=r"`serve.export_stages\(\)`.*`serve.dense\(x\)`") as raised:
        torch.export.export(serve.eval(), (x,), strict=strict)
    assert strict or raised.type is ArgumentError


@pytest.mark.compiles
def test_routing_can_be_compiled_and_served_while_something_is_exported(monkeypatch):
    serve, x = serving()
    expected = serve.eval()(x)
    torch.testing.assert_close(torch.compile(serve, backend="eager")(x), expected)
    torch._dynamo.reset()
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)  # by another thread
    torch.testing.assert_close(serve(x), expected)


@pytest.mark.reference
def test_the_authors_routed_numbers():
    arrays, state = resnet32_arrays()
    model, router = resnet32_ride(state)
    inputs = model.router_inputs(arrays["x"])
    close = {"rtol": 1e-5, "atol": 1e-5 * float(arrays["expert_logits"].abs().max())}
    torch.testing.assert_close(inputs.expert_logits, arrays["expert_logits"], **close)
    serve = RoutingInference(model, router)
    for path in (serve, serve.dense):
        logits, used = path(arrays["x"], return_routing=True)
        assert torch.equal(used, arrays["experts_used"])
        torch.testing.assert_close(logits, arrays["routed_logits"], **close)


@pytest.mark.reference
def test_the_authors_trained_network_routes_the_same_way():
    saved = torch.load(OFFICIAL, weights_only=True)
    model, router = resnet32_ride(saved["state_dict"])
    expected = np.load(REFERENCE / "official_ride_ea_outputs.npz")
    with np.load(CIFAR) as data:
        images = torch.from_numpy(data["test_images"][:128]).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])
    x = (images - mean[:, None, None]) / deviation[:, None, None]
    logits, used = RoutingInference(model, router)(x, return_routing=True)
    assert torch.equal(used, torch.from_numpy(expected["experts_used"][:128]))
    assert torch.equal(logits.argmax(1), torch.from_numpy(expected["routed_argmax"][:128]))
    reference = torch.from_numpy(expected["routed_logits_first64"])
    torch.testing.assert_close(logits[:64], reference, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: RoutingInference(nn.Linear(2, 2), ConfidenceRouter()), "to be a RIDEWrapper"),
        (lambda m: RoutingInference(m, nn.Linear(2, 2)), "`router` to be an ExpertRouter"),
        (
            lambda m: RoutingInference(m, AveragedModel(ExpertRouter.for_model(m))),
            r"but got AveragedModel\. Pass what it holds: `router\.module`",
        ),
        (
            lambda m: RoutingInference(AveragedModel(m), ConfidenceRouter()),
            r"but got AveragedModel\. Pass what it holds: `model\.module`",
        ),
        (lambda m: RoutingInference(m, ConfidenceRouter), r"Make one: .*`ConfidenceRouter\(\)`"),
        (
            lambda m: RoutingInference(m, ExpertRouter),
            r"Make one: `ExpertRouter.for_model\(model\)`",
        ),
        (lambda m: RoutingInference(small_model(1), ConfidenceRouter()), "nothing to route"),
        (
            lambda m: RoutingInference(m, ExpertRouter(12, 4, num_classes=5)),
            "the model's num_experts 3, but got 4",
        ),
        (
            lambda m: RoutingInference(m, ExpertRouter(9, 3, num_classes=5)),
            "the model's feature_dim 12, but got 9",
        ),
        (lambda m: RoutingInference(m, ConfidenceRouter(), 1.5), "probability from 0"),
        (lambda m: RoutingInference(m, ConfidenceRouter(), float("nan")), "probability from 0"),
        (lambda m: RoutingInference(m, ConfidenceRouter(), [0.5] * 3), "each of the 2 gates"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ArgumentError, match=message):
        build(small_model())


@pytest.mark.parametrize(
    "threshold",
    ["0.5", None, True, [0.5, "0.5"], {0.5}, 1j, [[0.5, 0.5]], torch.tensor([True, False])],
)
def test_what_is_no_probability_is_refused(threshold):
    with pytest.raises(ArgumentError, match="`threshold` to be"):
        RoutingInference(small_model(), ConfidenceRouter(), threshold)


@pytest.mark.parametrize(
    "threshold", [np.float32(0.25), torch.tensor(0.25), np.array([0.25, 0.25])]
)
def test_numbers_of_other_libraries_are_thresholds(threshold):
    serve = RoutingInference(small_model(), ConfidenceRouter(), threshold)
    assert serve.threshold.tolist() == pytest.approx([0.25, 0.25], abs=1e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize("kind", ["router", "confidence", "a gate that reads nothing"])
def test_logits_that_are_no_numbers_raise_whichever_expert_gives_them(kind, expert, value):
    serve, x = serving(threshold=0.0)
    if kind != "router":
        serve.router = ConfidenceRouter() if kind == "confidence" else FixedGate(1.0)
    with torch.no_grad():
        serve.model.experts[expert].fc.bias[0] = value
    with pytest.raises(ArgumentError, match=r"logits.*to be free of NaN"):
        serve(x)
    if kind != "a gate that reads nothing":
        with pytest.raises(ArgumentError, match=r"logits.*to be free of NaN"):
            serve.calibrate([(x, torch.arange(len(x)) % 5)], max_experts=2.0)


def test_a_gate_at_the_threshold_stays_and_logits_alone_come_back_by_default():
    class Undecided(ExpertRouter):
        def gate(self, index, mean_logits, features):
            return mean_logits.new_zeros(len(mean_logits))

    model = small_model()
    serve = RoutingInference(model, Undecided(12, 3, num_classes=5), 0.5)
    x = torch.randn(4, 3, 8, 8)
    assert serve(x, return_routing=True).num_experts_used.tolist() == [1, 1, 1, 1]
    assert type(serve(x)) is type(serve.dense(x)) is torch.Tensor


def test_a_threshold_close_to_one_is_not_rounded_to_one():
    serve = RoutingInference(small_model(), ConfidenceRouter())
    for threshold in (1 - 1e-9, [1 - 1e-9] * 2):
        serve.set_threshold(threshold)
        torch.testing.assert_close(serve.threshold_logits, torch.full((2,), 20.7233))


def test_one_threshold_that_is_no_probability_is_enough():
    serve = RoutingInference(small_model(), ConfidenceRouter())
    for wrong in ([0.5, 1.5], [-0.1, 0.5], [0.5, torch.nan]):
        with pytest.raises(ArgumentError, match="`threshold` to be a probability"):
            serve.set_threshold(wrong)
    assert serve.threshold.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "cast",
    [
        lambda serve: serve.half(),
        lambda serve: serve.bfloat16(),
        lambda serve: serve.to("cpu", torch.bfloat16),
        lambda serve: serve.bfloat16().float(),
        lambda serve: nn.Sequential(serve).half()[0],
        lambda serve: serve.double(),
    ],
)
def test_thresholds_survive_a_cast_of_the_model(cast):
    serve, _ = serving()
    serve.threshold_logits.copy_(torch.tensor([1.0001, 17.004]))
    served = cast(serve)
    assert torch.equal(served.threshold_logits, torch.tensor([1.0001, 17.004]))
    assert "threshold_logits" in served.state_dict()
    assert served.to("meta").threshold_logits.is_meta


class Sure(nn.Module):
    """Its gates lie close to a logit of 25, of which float32 makes a probability of 1."""

    def gate(self, index, mean_logits, features):
        return mean_logits.amax(1) + 25


def test_thresholds_close_to_one_can_be_read_and_set():
    torch.manual_seed(0)
    model, x = small_model(), torch.randn(64, 3, 8, 8)
    serve = RoutingInference(model, Sure())
    gates = model.router_inputs(x).expert_logits[:, 0].amax(1) + 25
    serve.threshold_logits.fill_(gates.quantile(0.5))
    expected = serve(x, return_routing=True).num_experts_used
    assert len(expected.unique()) > 1
    assert serve.threshold.dtype == torch.float64
    copied = RoutingInference(model, Sure(), threshold=serve.threshold.tolist())
    other = RoutingInference(model, Sure())
    other.set_threshold(serve.threshold)
    loaded = RoutingInference(model, Sure())
    loaded.load_state_dict(serve.state_dict())
    for one in (copied, other, loaded):
        torch.testing.assert_close(one.threshold_logits, serve.threshold_logits)
        assert torch.equal(one(x, return_routing=True).num_experts_used, expected)


def test_repr_tells_a_threshold_close_to_one_from_one():
    serve = RoutingInference(small_model(), ConfidenceRouter(), [1 / 3, 0.5])
    assert serve.extra_repr() == "threshold=[0.3333, 0.5]"
    serve.set_threshold([0.0, 1.0])
    assert serve.extra_repr() == "threshold=[0.0, 1.0]"
    serve.set_threshold([1 - 1e-9, 1e-9])
    shown = eval(serve.extra_repr().removeprefix("threshold="))
    assert shown[0] == pytest.approx(1 - 1e-9, abs=1e-14)
    assert shown[0] < 1
    assert shown[1] == pytest.approx(1e-9, rel=1e-5)


def test_a_compiled_model_is_served_as_it_was_before():
    model = RIDEWrapper(conv_backbone(), 2)
    serve = RoutingInference(torch.compile(model, backend="eager"), ConfidenceRouter())
    assert serve.model is model
    assert not any("_orig_mod" in name for name in serve.state_dict())


def test_what_was_made_in_inference_mode_can_be_changed_outside():
    model = small_model()
    with torch.inference_mode():
        serve = RoutingInference(model, ConfidenceRouter(), 0.3)
    serve.set_threshold(0.25)
    assert serve.threshold.tolist() == pytest.approx([0.25, 0.25])
    serve.calibrate([(torch.randn(10, 3, 8, 8), torch.arange(10) % 5)], max_experts=1.0)


def test_repr_needs_no_values():
    serve = RoutingInference(small_model(), ConfidenceRouter()).to("meta")
    assert "threshold=[...] on meta" in repr(serve)


def test_routing_output_can_be_rebuilt_from_one_iterable():
    output = RoutingInference(small_model(), ConfidenceRouter())(
        torch.randn(4, 3, 8, 8), return_routing=True
    )
    for again in (type(output)(part for part in output), type(output)(*output)):
        assert type(again) is type(output)
        assert all(a is b for a, b in zip(again, output, strict=True))


def test_states_of_other_parts_are_refused_with_the_way_to_load_them():
    model = RIDEWrapper(conv_backbone(), 3, example_input=torch.zeros(2, 3, 8, 8))
    router = ExpertRouter.for_model(model)
    serve = RoutingInference(model, router)
    for part, name in ((model, "model"), (router, "router")):
        for prefix, whole in (("", serve), ("module.", nn.DataParallel(serve))):
            state = {f"{prefix}{key}": value for key, value in part.state_dict().items()}
            with pytest.raises(CheckpointError, match=rf"`\.{prefix}{name}\.load_state_dict"):
                whole.load_state_dict(state, strict=False)
    for part, name in ((serve, "serve."), (router, "router.")):
        state = {f"{name}{key}": value for key, value in part.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"Remove the prefix `{name}`"):
            part.load_state_dict(state, strict=False)
    some = {key: value for key, value in serve.state_dict().items() if "router" in key}
    assert serve.load_state_dict(some, strict=False).unexpected_keys == []


@pytest.mark.parametrize("assign", [False, True])
def test_hooks_of_the_user_may_rename_entries_while_a_state_is_loaded(assign):
    def strip(module, state, prefix, *rest):
        for name in list(state):
            state[name.replace("module.", "")] = state.pop(name)

    model = RIDEWrapper(conv_backbone(), 3, example_input=torch.zeros(2, 3, 8, 8))
    router = ExpertRouter.for_model(model)
    serve = RoutingInference(model, router, 0.25)
    for part in (router, serve):
        state = {f"module.{key}": 2 * value for key, value in part.state_dict().items()}
        part.register_load_state_dict_pre_hook(strip)
        part.load_state_dict(state, assign=assign)
        for key, value in part.state_dict().items():
            assert torch.equal(value, state[f"module.{key}"])


def test_thresholds_are_handed_on_within_one_model_without_a_word():
    model = RIDEWrapper(conv_backbone(), 3, example_input=torch.zeros(2, 3, 8, 8))
    first, second = (RoutingInference(model, ConfidenceRouter(), t) for t in (0.25, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(first.state_dict())
    assert torch.equal(second.threshold_logits, first.threshold_logits)
    with pytest.warns(UserWarning, match="changes nothing"):
        second.load_state_dict(second.state_dict())


def test_another_model_or_router_has_to_fit_as_at_construction():
    serve, x = serving(threshold=0.0)
    before = serve(x)
    wrong = ExpertRouter(serve.model.feature_dim, 5, num_classes=5)
    with pytest.raises(ArgumentError, match="`router` to fit the model's num_experts 3, but got 5"):
        serve.router = wrong
    with pytest.raises(ArgumentError, match="argument `model` to be a RIDEWrapper, or"):
        serve.model = nn.Linear(2, 2)
    serve.router = ConfidenceRouter()
    backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ArgumentError, match=r"`model` to serve 3 experts, for which .* model of 2"):
        serve.model = RIDEWrapper(backbone, 2, fork_at="2")
    torch.testing.assert_close(serve(x), before)  # nothing was set
    serve.model = copy.deepcopy(serve.model)
    serve.router = FixedGate(1.0)
    torch.testing.assert_close(copy.deepcopy(serve)(x), before)
