"""Cost reports against counts by hand."""

import pytest
import torch
from torch import nn

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    cost_report,
    count_flops,
)
from tests.backbones import VisionTransformer
from tests.handmade import Moody, resnet32_plain, resnet32_ride, small_model

TRUNK = 2 * 8 * (3 * 9) * 8 * 8
EXPERT = 2 * 12 * (8 * 9) * 4 * 4 + 2 * 12 * 5
GATE = 2 * (5 + 3 + 8) * 32 + 2 * 33  # top 5 logits, 3 measures of confidence, 8 for the class


def test_counts_equal_those_by_hand():
    model = small_model()
    report = cost_report(model, router=ExpertRouter.for_model(model))
    assert report.trunk_flops == TRUNK
    assert report.expert_flops == (EXPERT,) * 3
    assert report.gate_flops == (GATE,) * 2
    assert report.trunk_parameters == (3 * 9 * 8 + 8) + 16
    assert report.expert_parameters == ((8 * 9 * 12 + 12) + 24 + (12 * 5 + 5),) * 3
    assert report.router_parameters == 2 * (16 * 32 + 32) + (33 + 1) + 5 * 8
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.flops == TRUNK + 3 * EXPERT
    assert report.routed_flops is None
    assert report.backbone_flops is None


def test_routed_cost_charges_each_row_for_the_gates_it_passes():
    model = small_model()
    report = cost_report(model, router=ExpertRouter.for_model(model), shares=(0.5, 0.2, 0.3))
    used = (TRUNK + EXPERT + GATE, TRUNK + 2 * EXPERT + 2 * GATE, TRUNK + 3 * EXPERT + 2 * GATE)
    assert report.flops_by_experts == used
    assert report.routed_flops == pytest.approx(0.5 * used[0] + 0.2 * used[1] + 0.3 * used[2])


def test_counts_do_not_depend_on_the_batch():
    model = small_model()
    router = ExpertRouter.for_model(model)
    one = cost_report(model, router=router)
    for example in (
        torch.zeros(6, 3, 8, 8),
        (torch.zeros(6, 3, 8, 8),),
        {"x": torch.zeros(6, 3, 8, 8)},
    ):
        assert cost_report(model, router=router, example_input=example) == one


class Masked(nn.Module):
    """A sequence, a mask for each row, and a table for all rows."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x, mask, table):
        return self.late(((self.early(x) + table).relu() * mask[:, :, None]).mean(1))


def test_the_sizes_that_were_counted_are_named():
    example = {"x": torch.randn(3, 6, 8), "mask": torch.ones(3, 6), "table": torch.randn(6, 8)}
    model = RIDEWrapper(Masked(), 2, fork_at="late", example_input=example)
    report = cost_report(model)
    assert report.input_sizes == ((6, 8), (6,), (6, 8))
    assert str(report).endswith("\nFLOPs are those of a row of sizes [6, 8], [6], [6, 8]")
    other = {"x": torch.randn(4, 7, 8), "mask": torch.ones(4, 7), "table": torch.randn(7, 8)}
    report = cost_report(model, example_input=other)
    assert report.input_sizes == ((7, 8), (7,), (7, 8))


def test_a_confidence_exit_costs_nothing():
    report = cost_report(small_model(), router=ConfidenceRouter())
    assert (report.router_parameters, report.gate_flops) == (0, (0, 0))


@pytest.mark.parametrize(("width", "dense", "routed"), [(48, 1.46, 1.12), (64, 2.30, 1.71)])
def test_the_papers_network_costs_what_the_docs_say(width, dense, routed):
    model, router = resnet32_ride(width=width)
    shares = (0.41, 0.09, 0.50)
    report = cost_report(model, router=router, shares=shares, backbone=resnet32_plain())
    assert report.flops / report.backbone_flops == pytest.approx(dense, abs=0.005)
    assert report.routed_flops / report.backbone_flops == pytest.approx(routed, abs=0.005)
    assert sum(report.gate_flops) < 1e-4 * report.flops
    assert "routed (0.41, 0.09, 0.50)" in str(report)
    assert f"{routed:.2f}" in str(report)


def test_the_wrapper_is_counted_and_left_as_it_was():
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).train()  # fmt: skip
    model = RIDEWrapper(backbone, 3, example_input=torch.zeros(2, 3, 8, 8)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = cost_report(model, router=ExpertRouter.for_model(model), backbone=backbone)
    assert report.trunk_flops + report.expert_flops[0] == report.backbone_flops
    assert report.trunk_parameters + report.expert_parameters[0] == report.backbone_parameters
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in (*model.modules(), *backbone.modules()))


def test_count_flops_counts_two_for_each_multiply_add():
    assert count_flops(nn.Linear(10, 5, bias=False), torch.zeros(3, 10)) == 2 * 3 * 10 * 5


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.5, 0.5), "to hold 3 numbers"),
        ((0.5, 0.5, 0.5), "sum to 1"),
        ((1.5, -0.5, 0.0), "non-negative"),
        ((float("nan"), 0.5, 0.5), "non-negative"),
    ],
)
def test_bad_shares_are_named(shares, message):
    with pytest.raises(ArgumentError, match=message):
        cost_report(small_model(), shares=shares)


def test_a_plain_module_is_refused():
    with pytest.raises(ArgumentError, match="count_flops"):
        cost_report(nn.Linear(2, 2))


class Grown(nn.Module):
    """Takes another path for larger images: one that the build has not seen."""

    def __init__(self):
        super().__init__()
        self.stem, self.late = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.more, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        if x.shape[-1] > 8:
            x = self.more(x)
        return self.head(self.late(x).mean((2, 3)))


def test_learning_a_path_is_not_counted():
    x = torch.randn(2, 3, 16, 16)
    model = RIDEWrapper(Grown(), 2, fork_at="late", example_input=torch.randn(2, 3, 8, 8))
    first = cost_report(model, example_input=x, backbone=Grown())
    assert first == cost_report(model, example_input=x, backbone=Grown())
    assert first.trunk_flops + first.expert_flops[0] == first.backbone_flops


def test_a_path_that_is_learned_anew_each_time_is_not_counted():
    class Random(Grown):
        def forward(self, x):
            x = self.more(self.stem(x)) if torch.rand(()) > -1 else self.stem(x)
            return self.head(self.late(x).mean((2, 3)))

    model = RIDEWrapper(Random(), 2, fork_at="late", example_input=torch.randn(2, 3, 8, 8))
    model._known_paths.layouts.clear()  # nothing that the model knows fits this input
    model._known_paths.learn = lambda m, parts, inputs: (
        [m.trunk.stem(inputs[0][0]) for _ in range(9)] and None
    )
    report = cost_report(model, backbone=Random())
    assert report.trunk_flops + report.expert_flops[0] == report.backbone_flops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_counted(dtype):
    expected = cost_report(
        RIDEWrapper(Grown(), 2, fork_at="late", example_input=torch.randn(2, 3, 8, 8)),
        backbone=Grown(),
    )
    model = RIDEWrapper(Grown(), 2, fork_at="late", example_input=torch.randn(2, 3, 8, 8))
    assert cost_report(model.to(dtype), backbone=Grown()) == expected


@pytest.mark.parametrize("shares", ["abc", True, None, [None, 0.5, 0.5], [[0.5, 0.3, 0.2]]])
def test_what_is_no_share_is_refused(shares):
    if shares is None:
        assert cost_report(small_model(), shares=None).shares is None
    else:
        with pytest.raises(ArgumentError, match="`shares` to"):
            cost_report(small_model(), shares=shares)


def test_a_transformer_is_counted_alike_alone_and_wrapped() -> None:
    backbone = VisionTransformer(depth=3)
    report = cost_report(RIDEWrapper(backbone, 1), backbone=backbone)
    assert report.flops == report.backbone_flops


class TokenNet(nn.Module):
    """A class token, a bare parameter, goes through a layer after the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late = nn.Linear(6, 8), nn.Linear(8, 8)
        self.token = nn.Parameter(torch.randn(1, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.late(self.stem(x)) * self.norm(self.token))


def test_a_parameter_handed_to_a_layer_is_counted() -> None:
    model = RIDEWrapper(TokenNet(), 2, fork_at="late", example_input=torch.randn(2, 6))
    report = cost_report(model, backbone=TokenNet())
    assert report.backbone_flops == 2 * (6 * 8 + 8 * 8 + 8 * 5)
    assert report.flops == 2 * (6 * 8 + 2 * (8 * 8 + 8 * 5))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_routers_modes_and_statistics_stay_as_they_were() -> None:
    router = Moody(5)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    report = cost_report(small_model(), router=router)  # an example of one row
    assert report.gate_flops == (2 * 5,) * 2
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())
    assert all(module.training for module in router.modules())


def test_a_router_that_is_no_module_is_counted() -> None:
    class Plain:
        def gate(self, index: int, mean_logits: torch.Tensor, features: torch.Tensor) -> object:
            return mean_logits @ torch.ones(5)

    report = cost_report(small_model(), router=Plain())  # type: ignore[arg-type]
    assert report.gate_flops == (2 * 5,) * 2
    assert report.router_parameters == 0


class Placed(nn.Module):
    """Adds one position, for all rows, to each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return self.head(self.late((self.early(x) + position).relu()).relu())


def test_flops_are_divided_by_the_rows_of_the_logits_whatever_comes_first() -> None:
    x, position = torch.randn(10, 8), torch.randn(1, 16)
    example = {"x": x[:2], "position": position}
    model = RIDEWrapper(Placed(), 3, fork_at="late", example_input=example).eval()
    backbone = Placed()
    for given in ({"x": x, "position": position}, {"position": position, "x": x}):
        report = cost_report(model, example_input=given, backbone=backbone)
        assert report.trunk_flops == 2 * 8 * 16
        assert report.expert_flops == (2 * 16 * 16 + 2 * 16 * 5,) * 3
        assert report.backbone_flops == report.trunk_flops + report.expert_flops[0]
    with pytest.raises(ArgumentError, match="at least one row"):
        cost_report(model, example_input={"x": x[:0], "position": position})


def test_a_compiled_model_is_counted_as_it_was_before() -> None:
    model = RIDEWrapper(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), 2, fork_at="2")
    backbone = nn.Linear(6, 5)
    compiled, compiled_backbone = (torch.compile(m, backend="eager") for m in (model, backbone))
    report = cost_report(compiled, backbone=compiled_backbone)
    assert report == cost_report(model, backbone=backbone)
    assert report.trunk_parameters == 6 * 8 + 8
    assert count_flops(compiled, torch.zeros(1, 6)) == report.flops


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: cost_report(m, router=ExpertRouter), "Make one: `ExpertRouter.for_model"),
        (lambda m: cost_report(m, router=nn.Linear(2, 2)), "with a method `gate`"),
        (lambda m: cost_report(m, router=ExpertRouter(12, 5, num_classes=5)), "num_experts 3, but"),
        (lambda m: cost_report(m, router=ExpertRouter(12, 2, num_classes=5)), "num_experts 3, but"),
        (lambda m: cost_report(m, router=ExpertRouter(12, 3, num_classes=7)), "num_classes 5, but"),
        (lambda m: cost_report(m, backbone=nn.Linear(3, 5)), "`backbone` to be the plain network"),
        (lambda m: count_flops(lambda x: x, torch.zeros(1)), "`module` to be a module"),
    ],
)
def test_what_cannot_be_counted_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(small_model())
