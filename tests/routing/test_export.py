"""Exported stages against routed inference, row by row; the dense path in another runtime."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ExpertRouter,
    RIDEError,
    RIDEWrapper,
    RoutingInference,
    _compiler,
)
from ride_plugin.routing import StagedRunner, fuse_stages
from tests.handmade import small_model

pytestmark = pytest.mark.exports


class Tokens(nn.Module):
    """A sequence model whose experts read a value without a batch dimension, and rows second."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.position = nn.Linear(8, 8)
        self.late = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).transpose(0, 1).contiguous()
        offset = self.position(torch.linspace(0, 1, 8))
        x = self.late(x + 1).relu() + offset
        return self.head(x.mean(0))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


KINDS = {
    "convolutional": (convolutional, (3, 8, 8), None),
    "tokens": (Tokens, (4, 6), "late"),
}


@cache
def serving(kind):
    torch.manual_seed(0)
    build, size, fork_at = KINDS[kind]
    model = RIDEWrapper(build(), 3, fork_at=fork_at, example_input=torch.randn(2, *size))
    router = ExpertRouter.for_model(model)
    x = torch.randn(64, *size)
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.mul_(3.0)
        gates = router(model.router_inputs(x)).double().quantile(0.5, dim=0).sigmoid()
    return RoutingInference(model, router, gates), x


@cache
def exported(kind):
    serve, _ = serving(kind)
    serve.train()
    before = [module.training for module in serve.modules()]
    stages = serve.export_stages()
    assert [module.training for module in serve.modules()] == before
    assert serve.router.training
    return stages


def assert_equal_row_by_row(runner, serve, x):
    got, expected = runner(x, return_routing=True), serve(x, return_routing=True)
    assert torch.equal(got.num_experts_used, expected.num_experts_used)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runner(x), got.logits)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_stages_stored_and_loaded_equal_routed_inference_at_every_batch_size(kind, tmp_path):
    serve, x = serving(kind)
    loaded = {}
    for name, program in exported(kind).items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
        loaded[name] = torch.export.load(tmp_path / f"{name}.pt2")
    runner = StagedRunner(loaded)
    assert serve(x, return_routing=True).num_experts_used.unique().tolist() == [1, 2, 3]
    for batch in (1, 2, 7, 64):
        assert_equal_row_by_row(runner, serve, x[-batch:])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_functions_stand_in_for_programs_and_may_return_lists(kind):
    serve, x = serving(kind)
    called = []

    def function(name, program):
        module = program.module()

        def stage(*tensors):
            called.append((name, len(tensors[0])))
            result = module(*tensors)
            return [result] if isinstance(result, torch.Tensor) else list(result)

        return stage

    runner = StagedRunner({name: function(name, p) for name, p in exported(kind).items()})
    assert_equal_row_by_row(runner, serve, x)
    used = serve(x, return_routing=True).num_experts_used
    assert called[: len(called) // 2] == [
        ("trunk", 64), ("expert_0", 64), ("gate_0", 64),
        ("expert_1", int((used > 1).sum())), ("gate_1", int((used > 1).sum())),
        ("expert_2", int((used > 2).sum())),
    ]  # fmt: skip


def test_each_program_holds_its_own_parameters_only():
    serve, _ = serving("convolutional")
    stages = exported("convolutional")
    sizes = {
        name: sum(value.numel() for value in program.state_dict.values())
        for name, program in stages.items()
    }
    whole = sum(value.numel() for value in serve.model.state_dict().values())
    assert sorted(stages) == ["expert_0", "expert_1", "expert_2", "gate_0", "gate_1", "trunk"]
    assert sizes["trunk"] + sum(sizes[f"expert_{i}"] for i in range(3)) == whole
    assert sizes["trunk"] == sum(v.numel() for v in serve.model.trunk.state_dict().values())


def test_thresholds_are_exported_as_they_stand():
    serve, x = serving("convolutional")
    runner, before = StagedRunner(exported("convolutional")), serve.threshold_logits.clone()
    expected = runner(x)
    serve.set_threshold(0.0)
    assert torch.equal(runner(x), expected)
    serve.threshold_logits.copy_(before)


def test_a_missing_stage_and_a_foreign_model_are_refused():
    with pytest.raises(ArgumentError, match="'expert_0', 'trunk'"):
        StagedRunner({})
    with pytest.raises(ArgumentError, match=r"stages\['gate_0'\].* but got str"):
        StagedRunner({**exported("convolutional"), "gate_0": "gate_0.pt2"})
    model = small_model()
    with pytest.raises(ArgumentError, match="but got HandmadeModel"):
        RoutingInference(model, ExpertRouter.for_model(model)).export_stages()


class Around(nn.Module):
    """Answers with what the module inside knows, as an adapter's model does."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)


def test_a_module_around_the_wrapped_model_is_looked_into():
    serve, x = serving("convolutional")
    around = RoutingInference(Around(serve.model), serve.router, serve.threshold.tolist())
    assert_equal_row_by_row(StagedRunner(around.export_stages()), serve, x)


class Placed(nn.Module):
    """Adds one position, for all rows, to each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x, position):
        return self.head(self.late((self.early(x) + position).relu()).relu())


def test_keyword_arguments_may_be_in_another_order_than_in_the_models_example():
    x, position = torch.randn(10, 8), torch.randn(1, 16)
    example = {"x": x[:2], "position": position}
    model = RIDEWrapper(Placed(), 2, fork_at="late", example_input=example)
    serve = RoutingInference(model, ExpertRouter.for_model(model), 0.0)
    runner = StagedRunner(serve.export_stages({"position": position, "x": x}))
    expected = serve(x, position)
    torch.testing.assert_close(runner(position=position, x=x), expected)
    torch.testing.assert_close(runner(x=x, position=position), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_exported(dtype):
    torch.manual_seed(0)
    model = RIDEWrapper(convolutional(), 2, example_input=torch.randn(2, 3, 8, 8)).eval().to(dtype)
    serve, x = RoutingInference(model, ExpertRouter.for_model(model)), torch.randn(5, 3, 8, 8)
    runner = StagedRunner(serve.export_stages())
    torch.testing.assert_close(runner(x.to(dtype)), serve(x.to(dtype)))


class Dense(nn.Module):
    def __init__(self, serve):
        super().__init__()
        self.serve = serve

    def forward(self, x):
        return tuple(self.serve.dense(x, return_routing=True))


def test_the_dense_path_gives_the_same_in_onnxruntime():
    runtime = pytest.importorskip("onnxruntime")
    serve, x = serving("convolutional")
    free = {"x": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        Dense(serve).eval(), (x[:2],), dynamo=True, dynamic_shapes=free, verbose=False
    )
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()
    for batch in (1, 3, 64):
        logits, used = session.run(None, {entry.name: x[-batch:].numpy()})
        expected = serve(x[-batch:], return_routing=True)
        torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)
        assert used.tolist() == expected.num_experts_used.tolist()


class Scaled(nn.Module):
    """Takes a second input that is the same for all rows."""

    def __init__(self):
        super().__init__()
        self.early, self.late, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        return self.head(self.late(self.early(x * scale).relu()).relu())


def test_an_input_without_rows_keeps_its_size():
    torch.manual_seed(0)
    scale = torch.linspace(1, 2, 6)
    model = RIDEWrapper(Scaled(), 2, fork_at="late", example_input=(torch.randn(2, 6), scale))
    serve = RoutingInference(model, ExpertRouter.for_model(model))
    runner = StagedRunner(serve.export_stages())
    for batch in (1, 5):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(runner(x, scale), serve(x, scale))


class Frames(nn.Module):
    """Folds the frames of a sample into the batch, so that each row of it has two inside."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)  # which tells rows from channels
        self.early, self.late, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.norm(self.late(self.early(x.flatten(0, 1)).relu())).relu()
        return self.head(y.view(-1, 2, 8).mean(1))


def test_frames_folded_into_the_batch_are_handed_over_row_by_row():
    torch.manual_seed(0)
    model = RIDEWrapper(Frames(), 2, fork_at="late", example_input=torch.randn(2, 2, 6))
    router, x = ExpertRouter.for_model(model).eval(), torch.randn(16, 2, 6)
    gates = router(model.router_inputs(x)).detach().double()
    serve = RoutingInference(model, router, gates.quantile(0.5, dim=0).sigmoid())
    runner = StagedRunner(serve.export_stages())
    for batch in (16, 3):
        assert_equal_row_by_row(runner, serve, x[:batch])
    assert serve(x, return_routing=True).num_experts_used.unique().tolist() == [1, 2]


class CountsRows(nn.Module):
    """A transformer that asks for the number of rows in the part that is forked, too."""

    def __init__(self, count):
        super().__init__()
        self.count = count
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.early, self.late = (
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.early(self.patches(x).flatten(2).transpose(1, 2))
        x = self.late(torch.cat([self.token.expand(self.count(x), -1, -1), x], dim=1))
        return self.head(x[:, 0])


def served_that_counts(count):
    backbone = CountsRows(count)
    model = RIDEWrapper(backbone, 2, fork_at="late", example_input=torch.randn(2, 3, 16, 16))
    return RoutingInference(model.eval(), ExpertRouter.for_model(model))


@pytest.mark.parametrize("count", [len, lambda x: x.shape[0]], ids=["len(x)", "x.shape[0]"])
def test_stages_that_ask_for_the_number_of_rows_take_any_number(count):
    serve = served_that_counts(count)
    runner = StagedRunner(serve.export_stages())
    for rows in (1, 2, 5):
        x = torch.randn(rows, 3, 16, 16)
        torch.testing.assert_close(runner(x), serve(x))


def test_a_stage_that_fixes_its_number_of_rows_is_refused_by_name():
    serve = served_that_counts(lambda x: int(str(int(x.shape[0]))))
    with pytest.raises(ArgumentError, match=r"`(trunk|expert_0)`.*x\.shape\[0\].*RoutingInference"):
        serve.export_stages()


def test_stages_and_model_share_no_weights():
    torch.manual_seed(0)
    model = RIDEWrapper(convolutional(), 2, example_input=torch.randn(2, 3, 8, 8))
    serve = RoutingInference(model, ExpertRouter.for_model(model), 0.0)
    wanted = {name: p.requires_grad for name, p in serve.named_parameters()}
    before = copy.deepcopy(serve.state_dict())
    programs, x = serve.export_stages(), torch.randn(5, 3, 8, 8)
    fused = fuse_stages(programs)
    expected = serve(x)
    for stage in fused.values():
        for tensor in (*stage.parameters(), *stage.buffers()):
            tensor.detach().zero_()
    # What is done to fused stages reaches neither the programs nor the model.
    torch.testing.assert_close(StagedRunner(programs)(x), expected)
    assert {name: p.requires_grad for name, p in serve.named_parameters()} == wanted
    assert all(torch.equal(value, before[name]) for name, value in serve.state_dict().items())
    fused = fuse_stages(programs)
    with torch.no_grad():
        for value in (*serve.parameters(), *serve.buffers()):
            value.zero_()
    for stages in (programs, fused, fuse_stages(programs)):
        torch.testing.assert_close(StagedRunner(stages)(x), expected, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """One parameter under two names, on both sides of no cut."""

    def __init__(self):
        super().__init__()
        self.early, self.late, self.again = (nn.Linear(6, 6) for _ in range(3))
        self.again.weight = self.late.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.again(self.late(self.early(x).relu()).relu()))


def test_a_weight_under_two_names_is_one_in_the_stages():
    model = RIDEWrapper(Tied(), 2, fork_at="late", example_input=torch.randn(2, 6))
    serve, x = RoutingInference(model, ExpertRouter.for_model(model), 0.0), torch.randn(5, 6)
    with torch.inference_mode():
        programs = serve.export_stages()
        fused = fuse_stages(programs)
    named = {n: p for n, p in programs["expert_0"].state_dict.items() if n.endswith("weight")}
    assert len({id(p) for p in named.values()}) == len(named) - 1
    assert len({id(p) for p in fused["expert_0"].parameters()}) == 5
    for stage in fused.values():  # those of inference mode could not be written
        stage.load_state_dict(stage.state_dict())
    torch.testing.assert_close(StagedRunner(fused)(x), serve(x))


def test_programs_refuse_inputs_unlike_the_exported_ones():
    runner, x = StagedRunner(exported("convolutional")), torch.randn(2, 3, 8, 8)
    for bad in (torch.randn(2, 3, 9, 9), x[0], x[..., None], x.double(), x.to(torch.uint8)):
        with pytest.raises(ArgumentError, match=r"float32 \[\w+, 3, 8, 8\].*`example_input`"):
            runner(bad)
    scale, other = torch.linspace(1, 2, 6), torch.linspace(1, 2, 5)
    model = RIDEWrapper(Scaled(), 2, fork_at="late", example_input=(torch.randn(2, 6), scale))
    runner = StagedRunner(
        copy.deepcopy(RoutingInference(model, ConfidenceRouter()).export_stages())
    )
    for tensors in ((torch.randn(3, 6), other), (torch.randn(3, 5), scale)):
        with pytest.raises(ArgumentError, match=r"\[\w+, 6\], float32 \[6\], as they were"):
            runner(*tensors)


def test_autocast_changes_nothing_at_the_export_or_at_a_call():
    serve, x = serving("convolutional")
    with torch.autocast("cpu", torch.bfloat16):
        under = serve.export_stages()
    expected = StagedRunner(exported("convolutional"))(x)
    for stages in (under, exported("convolutional"), fuse_stages(under)):
        runner = StagedRunner(stages)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                got = runner(x)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class AsksWhoRunsIt(nn.Module):
    """Takes another way where a question is answered with yes."""

    def __init__(self, asks, also=lambda x: x + 0):
        super().__init__()
        self.asks, self.also = asks, also
        self.early, self.late, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.early(x)
        x = self.also(x) if self.asks() else x.relu()
        return self.head(self.late(x).relu())


def served_that_asks(*arguments):
    torch.manual_seed(0)
    backbone = AsksWhoRunsIt(*arguments)
    model = RIDEWrapper(backbone, 2, fork_at="late", example_input=torch.randn(2, 6))
    return RoutingInference(model.eval(), ConfidenceRouter(), 0.0), torch.randn(5, 6)


def test_stages_are_those_of_the_path_that_is_taken_when_a_forward_is_exported():
    def other(x):
        return torch.where(~(x > 0) & (x < 1), 1 - x[:, :] / 2, torch.ones(8)).relu()

    serve, x = served_that_asks(torch.compiler.is_exporting, other)
    runner = StagedRunner(serve.export_stages())
    assert not torch.compiler.is_exporting()
    with _compiler.as_exported():
        expected = serve(x)
    torch.testing.assert_close(runner(x), expected)
    assert (runner(x) - serve(x)).abs().max() > 0.01


OTHERS = {
    "an operation more": (lambda x: (x + 0).relu(), r"another path is taken there.*`serve.dense"),
    "another one": (lambda x: x + 0, "came to `add` where the trunk ran `relu`"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_path_under_the_tracer_alone_is_told(kind):
    also, message = OTHERS[kind]
    serve, _ = served_that_asks(torch.compiler.is_compiling, also)
    with pytest.raises(RIDEError, match=message):
        serve.export_stages()


def test_what_a_forward_raises_under_the_tracer_is_the_reason():
    def refuse(x):
        raise RuntimeError("not in a graph")

    serve, _ = served_that_asks(torch.compiler.is_compiling, refuse)
    with pytest.raises(ArgumentError, match=r"refuses `trunk`: .*RuntimeError.*not in a graph"):
        serve.export_stages()


class WithNumber(nn.Module):
    """Returns a number beside a tensor."""

    def __init__(self, number):
        super().__init__()
        self.number, self.layer = number, nn.Linear(6, 8)

    def forward(self, x, scale):
        return {"hidden": self.layer(x), "numbers": [self.number(x, scale), 2]}


class ReadsNumber(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.early, self.late, self.head = WithNumber(number), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        found = self.early(x, scale)
        hidden = self.late(found["hidden"]).relu() * found["numbers"][1]
        return self.head(hidden) * found["numbers"][0]


NUMBERS = {
    "a size": lambda x, scale: x.shape[-1],
    "of a size": lambda x, scale: 0.5 * x.size(1),
    "constant": lambda x, scale: True,
    "a value": lambda x, scale: float(scale),
    "an item": lambda x, scale: scale.item(),
    "a choice": lambda x, scale: bool(scale > 0),
    "a whole value": lambda x, scale: int(scale) + 1,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_trunk_modules_return_are_exported_where_they_are_always_the_same(kind):
    torch.manual_seed(0)
    example = torch.randn(2, 6), torch.tensor(1.5)
    model = RIDEWrapper(ReadsNumber(NUMBERS[kind]), 2, fork_at="late", example_input=example)
    serve = RoutingInference(model, ConfidenceRouter(), 0.0)
    if kind in ("a size", "of a size", "constant"):
        runner, call = StagedRunner(serve.export_stages()), (torch.randn(5, 6), torch.tensor(-2.0))
        torch.testing.assert_close(runner(*call), serve(*call))
    else:
        with pytest.raises(ArgumentError, match=r"`early` returns (1\.5|True|2), which it reads"):
            serve.export_stages()
