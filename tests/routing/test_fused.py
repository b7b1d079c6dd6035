"""Fused stages give what the exported programs give, to rounding, for every pattern they touch."""

import copy
import io
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.resnets import ImageNetResNet
from ride_plugin import ArgumentError, ExpertRouter, RIDEWrapper, RoutingInference
from ride_plugin.routing import StagedRunner, fuse_stages, quantize_stages
from ride_plugin.routing._fused import FusedStage
from ride_plugin.routing._fused_conv import AllFinite, FusedConv2d
from tests.backbones import VisionTransformer

pytestmark = pytest.mark.exports


class Block(nn.Module):
    """One convolution and what follows it, in one of many ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        groups = 8 if kind == "depthwise" else 2 if kind == "grouped" else 1
        padding: str | int = "same" if kind == "same" else 1
        self.conv = nn.Conv2d(8, 8, 3, padding=padding, groups=groups, bias=kind != "no_bias")
        self.other = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8, affine=kind != "plain_norm")

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        if kind == "both_used":
            out = self.conv(x)
            return F.relu(out) + self.norm(out)
        out = self.norm(self.conv(x)) if kind != "without_norm" else self.conv(x)
        if kind == "in_place":
            return F.relu(out.add_(x), inplace=True)
        if kind == "into_the_other":
            x = x * 1.0
            return F.relu(x.add_(out)) + x
        if kind == "two_convolutions":
            return F.relu(self.other(x) + out)
        if kind == "twice_the_same":
            return F.relu(out + out)
        if kind == "broadcast":
            return F.relu(out + x.mean(dim=(2, 3), keepdim=True))
        if kind == "weighted":
            return F.relu(torch.add(out, x, alpha=0.5))
        if kind == "number":
            return F.relu(out + 1.0)
        if kind == "no_relu":
            return out + x
        if kind == "other_first":
            return F.relu(x + out)
        if kind == "addition_used_twice":
            total = out + x
            return F.relu(total) + total
        return F.relu(out)


KINDS = [
    "plain",
    "plain_norm",
    "without_norm",
    "no_bias",
    "depthwise",
    "grouped",
    "same",
    "in_place",
    "into_the_other",
    "both_used",
    "two_convolutions",
    "twice_the_same",
    "broadcast",
    "weighted",
    "number",
    "no_relu",
    "other_first",
    "addition_used_twice",
]


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.block = Block(kind)
        self.head = nn.Linear(8, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.block(self.stem(x))
        return x, self.head(x.mean(dim=(2, 3)))


def exported(network: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(network.eval(), (x,), dynamic_shapes=shapes)


def kinds_of_operations(stage: FusedStage) -> set[str]:
    return {str(node.target) for node in stage.graph_module.graph.nodes}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_stage_is_the_program(kind: str) -> None:
    network = Network(kind)
    stage = FusedStage(exported(network, torch.randn(2, 3, 17, 17)))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 17, 17)
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
            before = laid_out.clone()
            for _ in range(2):  # nothing may be changed in place that the next call reads
                results = stage(laid_out)
                with torch.no_grad():
                    for got, expected in zip(results, network(laid_out), strict=True):
                        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
                        assert not got.requires_grad
            assert torch.equal(laid_out, before)


@pytest.mark.parametrize(
    "kind", ["plain", "in_place", "two_convolutions", "no_relu", "other_first", "depthwise"]
)
def test_no_normalisation_addition_or_activation_is_left(kind: str) -> None:
    stage = FusedStage(exported(Network(kind), torch.randn(2, 3, 17, 17)))
    left = " ".join(kinds_of_operations(stage))
    assert not any(word in left for word in ("batch_norm", "relu", "add", "aten.conv2d"))
    assert "contiguous" in left  # images are laid out once, where they come in
    if torch.backends.mkldnn.is_available():
        assert all(m._packed is not None for m in stage.modules() if isinstance(m, FusedConv2d))


@pytest.mark.parametrize("kind", ["into_the_other", "both_used", "weighted", "addition_used_twice"])
def test_what_others_read_too_is_not_fused(kind: str) -> None:
    stage = FusedStage(exported(Network(kind), torch.randn(2, 3, 17, 17)))
    assert any("relu" in target for target in kinds_of_operations(stage))


class Residuals(nn.Module):
    """Two blocks in a row, and something else that may read the first one's residual."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def block(self, index: int, x: Tensor) -> Tensor:
        return F.relu(self.outer[index](F.relu(self.inner[index](x))) + x)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        residual = self.stem(images)
        before = residual.mean(dim=(2, 3)) if self.reader == "before" else images
        view = residual.flatten(2) if self.reader == "view" else images
        inside = self.third(residual) if self.reader == "a convolution before" else images
        out = self.block(0, residual)
        after = residual.mean(dim=(2, 3)) if self.reader == "after" else images
        later = self.third(residual) if self.reader == "a convolution after" else images
        again = self.third(out) + residual if self.reader == "a second sum" else images
        out = self.block(1, out)
        returned = residual if self.reader == "the caller" else images
        return out, before, view.sum(-1), inside, after, later, again, returned


@pytest.mark.parametrize(
    ("reader", "written_over"),
    [
        ("nobody", 2),
        ("a convolution before", 2),
        ("before", 1),
        ("view", 1),
        ("after", 1),
        ("a convolution after", 1),
        ("a second sum", 2),  # the second one takes its place
        ("the caller", 1),
    ],
)
def test_a_residual_is_written_over_where_nobody_reads_it_later(
    reader: str, written_over: int
) -> None:
    network = Residuals(reader)
    x = torch.randn(4, 3, 17, 17)
    stage = FusedStage(exported(network, x))
    if torch.backends.mkldnn.is_available():
        assert sum(m.onto for m in stage.modules() if isinstance(m, FusedConv2d)) == written_over
    for batch in (4, 1):
        for _ in range(2):
            with torch.no_grad():
                for got, expected in zip(stage(x[:batch]), network(x[:batch]), strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_a_stage_is_given_is_never_written_over() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (F.relu(self.outer(F.relu(self.inner(x))) + x),)

    network, x = Expert(), torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last)
    before = x.clone()
    (got,) = FusedStage(exported(network, x))(x)
    assert torch.equal(x, before)
    with torch.no_grad():
        torch.testing.assert_close(got, network(x)[0], rtol=1e-5, atol=1e-5)


def test_a_layer_that_onednn_does_not_take_falls_back() -> None:
    network = Network("in_place").double()
    x = torch.randn(4, 3, 17, 17, dtype=torch.float64)
    stage = FusedStage(exported(network, x))
    assert all(m._packed is None for m in stage.modules() if isinstance(m, FusedConv2d))
    with torch.no_grad():
        torch.testing.assert_close(stage(x)[1], network(x)[1])


def test_what_depends_on_parameters_alone_is_computed_once() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (F.linear(F.normalize(x), F.normalize(self.weight)),)

    network, x = Cosine(), torch.randn(4, 8)
    stage = FusedStage(exported(network, x))
    norms = [n for n in stage.graph_module.graph.nodes if "norm" in str(n.target)]
    assert len(norms) == 1  # that of the features
    torch.testing.assert_close(stage(x)[0], network(x)[0].detach())


class Views(nn.Module):
    """Calls that return what they are given, and their neighbours that do not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        cut = torch.ops.aten.slice.Tensor
        nothing = cut(cut(cut(cut(x, 1), 1, 0), 1, 0, sys.maxsize), 1, 0, sys.maxsize, 1)
        nothing = torch.cat([nothing.movedim(1, 1).to(torch.float32)])
        nothing = torch.cat([nothing, x.new_zeros(x.shape[0], 0, 4)], dim=1)
        return (
            nothing + 1,
            x.movedim(1, 2) + 1,
            x.to(torch.float64) + 1,
            cut(x, 1, 1) + 1,
            cut(x, 1, 0, 2) + 1,
            cut(x, 1, 0, sys.maxsize, 2) + 1,
            torch.cat([x, x, x.new_zeros(x.shape[0], 0, 4)], dim=1) + 1,
            torch.cat([x.new_zeros(x.shape[0], 0, 4)], dim=1) + 1,
            torch.cat([x, x.new_zeros(x.shape[0], 0, 4, dtype=torch.float64)], dim=1) + 1,
        )


def test_calls_that_do_nothing_are_dropped_and_no_others() -> None:
    network, x = Views(), torch.randn(3, 5, 4)
    stage = FusedStage(exported(network, x))
    for got, expected in zip(stage(x), network(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    nodes = list(stage.graph_module.graph.nodes)
    left = Counter(str(node.target).removeprefix("aten.").split(".")[0] for node in nodes)
    assert (left["slice"], left["movedim"], left["cat"]) == (3, 1, 2)
    assert next(node for node in nodes if "add" in str(node.target)).args[0].op == "placeholder"


def test_no_weight_is_kept_twice() -> None:
    network = Network("plain")
    stage = FusedStage(exported(network, torch.randn(2, 3, 17, 17)))
    needed = [network.stem.weight, network.stem.bias, network.block.conv.weight]
    needed += [network.block.conv.bias, network.head.weight, network.head.bias]
    kept = stage.state_dict().values()
    assert sum(tensor.numel() for tensor in kept) == sum(tensor.numel() for tensor in needed)
    assert not any(tensor.requires_grad for tensor in (*stage.buffers(), *stage.parameters()))


def test_a_convolution_of_a_parameter_and_names_that_are_taken() -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv2d_weight = nn.Conv2d(3, 4, 3)
            self.conv2d_bias = nn.Parameter(torch.randn(1, 3, 5, 5))
            self.norm = nn.BatchNorm2d(4)
            nn.init.normal_(self.norm.running_mean)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            prompt = self.norm(self.conv2d_weight(self.conv2d_bias))
            return (self.conv2d_weight(x) * prompt,)

    network, x = Prompt(), torch.randn(4, 3, 5, 5)
    stage = FusedStage(exported(network, x))
    torch.testing.assert_close(stage(x)[0], network(x)[0].detach(), rtol=1e-5, atol=1e-5)


def test_autocast_around_a_stage_changes_nothing() -> None:
    stage = FusedStage(exported(Network("plain"), torch.randn(2, 3, 17, 17)))
    x = torch.randn(4, 3, 17, 17)
    expected = stage(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(stage(x)[1], expected)


def test_stages_survive_copies_files_and_new_weights() -> None:
    x = torch.randn(4, 3, 17, 17)
    stage = FusedStage(exported(Network("in_place"), x))
    expected = stage(x)[1]
    buffer = io.BytesIO()
    torch.save(stage, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x)[1], expected)
    assert torch.equal(copy.deepcopy(stage)(x)[1], expected)
    other = FusedStage(exported(Network("in_place"), x))
    assert not torch.equal(other(x)[1], expected)
    other.load_state_dict(stage.state_dict())
    assert torch.equal(other(x)[1], expected)
    assert torch.equal(copy.deepcopy(stage).to("cpu")(x)[1], expected)
    assert not any(parameter.requires_grad for parameter in stage.parameters())


def test_fused_stages_are_moved_but_not_cast() -> None:
    backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    model = RIDEWrapper(backbone, 2, fork_at="2", example_input=torch.randn(2, 6))
    fused = fuse_stages(RoutingInference(model, ExpertRouter.for_model(model)).export_stages())
    for stage in fused.values():
        before = {name: value.clone() for name, value in stage.state_dict().items()}
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            for holder in (stage, nn.ModuleDict({"stage": stage})):
                with pytest.raises(ArgumentError, match=rf"from .*float32 to {dtype}.*Cast the"):
                    holder.to(dtype)
        assert all(torch.equal(v, before[name]) for name, v in stage.state_dict().items())
        assert stage.to("meta").state_dict().keys() == before.keys()


def test_a_routed_model_is_served_from_fused_stages_by_several_threads() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    model = RIDEWrapper(backbone, 3, classifier="cosine", example_input=torch.randn(2, 3, 9, 9))
    serve = RoutingInference(model, ExpertRouter.for_model(model))
    batches = [torch.randn(n, 3, 9, 9) for n in (1, 3, 64)] * 4
    gates = torch.cat([serve.router(model.router_inputs(x)).detach() for x in batches])
    middle = gates.double().sort(dim=0).values[len(gates) // 2 - 1 :][:2].mean(dim=0)
    serve.set_threshold(middle.sigmoid())  # between two gates: rounding moves no row across it
    runner = StagedRunner(fuse_stages(serve.export_stages()))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: runner(x, return_routing=True), batches))
    used = set()
    for x, (logits, num_experts_used) in zip(batches, results, strict=True):
        expected = serve(x, return_routing=True)
        assert torch.equal(num_experts_used, expected.num_experts_used)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
        used |= set(num_experts_used.tolist())
    assert used == {1, 2, 3}


def bottleneck_network() -> nn.Module:
    network = ImageNetResNet(7, 8, (1, 1, 1, 1))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return network


@pytest.mark.parametrize(
    ("backbone", "size"), [(bottleneck_network, 64), (lambda: VisionTransformer(7), 32)]
)
def test_a_bottleneck_network_and_a_transformer_are_served_equally(
    backbone: Callable[[], nn.Module], size: int
) -> None:
    x = torch.randn(5, 3, size, size)
    model = RIDEWrapper(backbone(), 2, init="copy", example_input=x[:2]).eval()
    serve = RoutingInference(model, ExpertRouter.for_model(model), 0.0)
    runner = StagedRunner(fuse_stages(serve.export_stages()))
    for batch in (1, 5):
        torch.testing.assert_close(runner(x[:batch]), serve(x[:batch]), rtol=1e-4, atol=1e-5)


def test_only_programs_can_be_fused() -> None:
    with pytest.raises(ArgumentError, match=r"stages\['trunk'\].*export_stages"):
        fuse_stages({"trunk": nn.Identity()})  # type: ignore[dict-item]
    for bad in (None, [nn.Identity()]):
        with pytest.raises(ArgumentError, match=r"`stages` to be a dict of stages by name"):
            fuse_stages(bad)  # type: ignore[arg-type]


class SizeDependent(nn.Module):
    """Reads sizes of its inputs, which the graph holds as constants but for the batch's."""

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return (x.sum((2, 3)) / (x.shape[2] * x.shape[3]) + m.to(torch.float32),)


def test_inputs_unlike_the_exported_ones_are_refused() -> None:
    x, m = torch.randn(4, 3, 8, 9), torch.randn(4, 1)
    free = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(SizeDependent(), (x, m), dynamic_shapes=(free, free))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for each in (program, torch.export.load(buffer)):
        stage = FusedStage(each)
        for rows in (1, 3, 4):
            expected = SizeDependent()(x[:rows], m[:rows])
            torch.testing.assert_close(stage(x[:rows], m[:rows]), expected)
        unlike = [
            (torch.randn(4, 3, 12, 9), m),
            (torch.randn(4, 3, 8, 12), m),
            (x[0], m),
            (x[..., None], m),
            (x, m[:1]),  # would be broadcast
            (x, m.double()),
            (x.to(torch.uint8), m),
            (x,),
            (x, m, m),
        ]
        for tensors in unlike:
            with pytest.raises(ArgumentError, match=r"float32 \[\w+, 3, 8, 9\].*`example_input`"):
                stage(*tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fork_at", ["0", "2"])
def test_images_that_are_no_numbers_are_refused_and_not_classified(
    bad: float, fork_at: str
) -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    model = RIDEWrapper(backbone, 2, fork_at=fork_at, example_input=torch.randn(2, 3, 9, 9))
    serve = RoutingInference(model, ExpertRouter.for_model(model), 0.0)
    fused = fuse_stages(serve.export_stages())
    x = torch.randn(4, 3, 9, 9)
    stages = {"fused": fused, "int8": quantize_stages(fused, [x])}
    for rows in (4, 1):
        broken = x[:rows].clone()
        broken[-1, 1, 4, 4] = bad
        for runner in (serve, *map(StagedRunner, stages.values())):
            with pytest.raises(ArgumentError, match=f"in 1 of {rows} rows"):
                runner(broken)


def test_large_numbers_are_numbers() -> None:
    x = torch.full((2, 3, 4, 4), torch.finfo(torch.float32).max)
    assert AllFinite()(x) is x


def test_each_input_is_looked_at_once() -> None:
    stage = FusedStage(exported(bottleneck_network(), torch.randn(2, 3, 64, 64)))
    assert sum(isinstance(module, AllFinite) for module in stage.modules()) == 1


def test_weights_that_are_no_numbers_are_refused() -> None:
    network, x = Network("plain"), torch.randn(2, 3, 17, 17)
    network.block.norm.running_var[2] = float("nan")
    with pytest.raises(ArgumentError, match=r"finite.*conv2d_1_weight"):
        FusedStage(exported(network, x))
