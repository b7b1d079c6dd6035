"""RIDEWrapper: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ExpertOutput, RIDEWrapper, SplitError, expert_logits
from ride_plugin.longtail import CosineClassifier

from .backbones import BACKBONES, CifarResNet, GluedNet, ImageNetResNet, mlp, plain_convnet

KINDS = list(BACKBONES)


def build(kind: str) -> tuple[nn.Module, Tensor]:
    constructor, shape, _ = BACKBONES[kind]
    return constructor(), torch.randn(5, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_default_fork_point(kind: str) -> None:
    constructor, _, fork = BACKBONES[kind]
    assert RIDEWrapper(constructor(), 2).fork_at == fork


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_is_the_backbone_to_the_bit(kind: str, training: bool) -> None:
    backbone, x = build(kind)
    model = RIDEWrapper(backbone, 1).train(training)
    backbone.train(training)
    torch.manual_seed(7)
    expected = backbone(x)
    expected.sum().backward()
    torch.manual_seed(7)
    logits = model(x)
    logits.sum().backward()
    assert torch.equal(logits, expected)
    ours = {name.split(".", 1)[1]: b for name, b in model.trunk.named_buffers(prefix="trunk")}
    ours |= {name.split(".", 2)[2]: b for name, b in model.named_buffers() if "experts" in name}
    for name, buffer in backbone.named_buffers():
        assert torch.equal(ours[name], buffer), name
    gradients = {name.split(".", 1)[1]: p.grad for name, p in model.named_parameters()}
    for name, parameter in backbone.named_parameters():
        ours_grad = gradients.get(name, gradients.get(f"0.{name}"))
        assert torch.equal(ours_grad, parameter.grad), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_equals_a_backbone_with_its_weights(kind: str) -> None:
    backbone, x = build(kind)
    model = RIDEWrapper(backbone, 3).eval()
    experts = expert_logits(model(x))
    for k in range(3):
        plain = copy.deepcopy(backbone).eval()
        state = {n.removeprefix("trunk."): t for n, t in model.state_dict().items()}
        state = {n.removeprefix(f"experts.{k}."): t for n, t in state.items()}
        plain.load_state_dict({n: t for n, t in state.items() if not n.startswith("experts.")})
        torch.testing.assert_close(experts[:, k], plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_expert_are_the_rows_of_the_whole(kind: str) -> None:
    backbone, x = build(kind)
    model = RIDEWrapper(backbone, 2).eval()
    whole = expert_logits(model(x))
    rows = torch.tensor([4, 0, 2])
    logits, features = model.run_expert(1, model.run_trunk(x).select(rows))
    # Kernels may add in another order at another batch size; the largest logit gives the scale.
    scale = float(whole.detach().abs().max())
    torch.testing.assert_close(logits, whole[rows, 1], rtol=1e-5, atol=1e-5 * max(1, scale))
    assert features.shape == (3, model.feature_dim)


def test_forward_is_the_mean_of_the_experts() -> None:
    model = RIDEWrapper(mlp(), 3)
    out = model(torch.randn(4, 20))
    assert type(out) is Tensor
    torch.testing.assert_close(out, expert_logits(out).mean(1))


def test_return_experts_can_be_set_later() -> None:
    model = RIDEWrapper(mlp(), 3)
    x = torch.randn(4, 20)
    plain = model(x)
    model.return_experts = True
    out = model(x)
    assert isinstance(out, ExpertOutput)
    assert torch.equal(out.logits, plain)
    assert torch.equal(out.expert_logits, expert_logits(plain))


def test_trunk_runs_once_and_its_batchnorm_updates_once() -> None:
    model = RIDEWrapper(CifarResNet(n=1), 3).train()
    calls = []
    model.trunk.layer1.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(4, 3, 32, 32))
    assert len(calls) == 1
    assert model.trunk.bn1.num_batches_tracked == 1
    assert model.experts[2].layer2[0].bn1.num_batches_tracked == 1


def test_user_hooks_on_a_trunk_module_fire_once() -> None:
    backbone = CifarResNet(n=1)
    calls: list[int] = []
    backbone.layer1.register_forward_hook(lambda *_: calls.append(1))
    model = RIDEWrapper(backbone, 3)
    calls.clear()
    model(torch.randn(2, 3, 32, 32))
    assert len(calls) == 1


def test_names_are_the_backbones_and_each_tensor_is_listed_once() -> None:
    model = RIDEWrapper(GluedNet(), 2)
    names = list(model.state_dict())
    assert "trunk.gain" in names
    assert "experts.1.late_bias" in names
    assert "experts.0.down.weight" in names
    assert not any("stem" in n or "gain" in n for n in names if n.startswith("experts"))
    assert len({t.data_ptr() for t in model.state_dict().values()}) == len(names)
    assert [n for n, _ in model.named_parameters()] == [n for n in names if "running" not in n]


def test_backbone_random_state_and_statistics_are_left_alone() -> None:
    backbone = CifarResNet(n=1)
    before = copy.deepcopy(backbone.state_dict())
    random_state = torch.get_rng_state()
    RIDEWrapper(backbone, 1)
    assert torch.equal(torch.get_rng_state(), random_state)
    RIDEWrapper(backbone, 3)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not backbone.layer1._forward_hooks


def test_modes_of_submodules_are_kept() -> None:
    backbone = CifarResNet(n=1)
    backbone.layer1.eval()
    model = RIDEWrapper(backbone, 2)
    assert model.training
    assert not model.trunk.layer1[0].bn1.training
    assert model.trunk.bn1.training
    assert model.experts[1].layer2.training


def test_cosine_classifier_bounds_the_logits_of_every_expert() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 3, classifier="cosine").eval()
    assert [type(head) for head in model.classifiers] == [CosineClassifier] * 3
    x = torch.randn(4, 3, 32, 32)
    logits = expert_logits(model(x))
    assert logits.abs().max() <= 30.001
    features = model.router_inputs(x).expert_features
    for k, head in enumerate(model.classifiers):
        cosine = nn.functional.cosine_similarity(features[:, k, None], head.weight[None], dim=2)
        torch.testing.assert_close(logits[:, k], 30 * cosine, rtol=1e-4, atol=1e-4)


def test_a_classifier_replaced_by_the_user_is_the_one_that_runs() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 3).eval()
    for k, expert in enumerate(model.experts):
        expert.linear = nn.Linear(64, 10)
        nn.init.zeros_(expert.linear.weight)
        nn.init.constant_(expert.linear.bias, k)
    inputs = model.router_inputs(torch.randn(2, 3, 32, 32))
    assert torch.equal(inputs.expert_logits[0, :, 0], torch.tensor([0.0, 1.0, 2.0]))
    assert inputs.expert_features.shape == (2, 3, 64)


def test_classifier_factory() -> None:
    model = RIDEWrapper(mlp(), 2, classifier=lambda d, c: nn.Linear(d, c, bias=False))
    assert all(head.bias is None for head in model.classifiers)


def test_router_inputs_leave_mode_and_statistics_untouched() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 3).train()
    model.trunk.layer1.eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    inputs = model.router_inputs(torch.randn(4, 3, 32, 32))
    assert inputs.expert_logits.shape == (4, 3, 10)
    assert inputs.expert_features.shape == (4, 3, model.feature_dim)
    assert not inputs.expert_logits.requires_grad
    assert [m.training for m in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_features_are_what_the_classifier_receives() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 3).eval()
    inputs = model.router_inputs(torch.randn(4, 3, 32, 32))
    for k, head in enumerate(model.classifiers):
        rebuilt = head(inputs.expert_features[:, k])
        torch.testing.assert_close(rebuilt, inputs.expert_logits[:, k])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same(kind: str) -> None:
    backbone, x = build(kind)
    model = RIDEWrapper(backbone, 2).eval()
    model(x)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = RIDEWrapper(type(backbone)() if kind not in ("mlp", "plain convnet") else backbone, 2)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(other.eval()(x), expected)


def test_a_copy_shares_nothing_with_the_original() -> None:
    model = RIDEWrapper(GluedNet(), 2).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert (other(x) == 0).all()


def test_double_precision_and_back() -> None:
    model = RIDEWrapper(GluedNet(), 2).double().eval()
    assert model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64
    assert model.float()(torch.randn(2, 3, 16, 16)).dtype == torch.float32


def test_other_input_sizes_and_keyword_arguments() -> None:
    model = RIDEWrapper(GluedNet(), 2).eval()
    x = torch.randn(5, 3, 15, 15)  # odd sizes take another path: they are padded
    whole = expert_logits(model(x, double=True))
    rows = torch.tensor([3, 1])
    logits, _ = model.run_expert(1, model.run_trunk(x, double=True).select(rows))
    torch.testing.assert_close(logits, whole[rows, 1])


def test_channels_last_is_kept_through_selection() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 2).eval().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        state = model.run_trunk(x).select(torch.tensor([2, 1]))
    features = state.values[-1]
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert not features.is_contiguous()


def test_threads_do_not_disturb_each_other() -> None:
    model = RIDEWrapper(GluedNet(), 3).eval()
    batches = [torch.randn(3, 3, 16, 16) for _ in range(16)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    got: list[Tensor | None] = [None] * len(batches)
    barrier = threading.Barrier(4)

    def work(start: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for i in range(start, len(batches), 4):
                got[i] = model(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_fork_at_moves_the_fork() -> None:
    model = RIDEWrapper(CifarResNet(10, n=2), 2, fork_at="layer3.1.conv2")
    assert "trunk.layer3.1.conv1.weight" in model.state_dict()
    assert "experts.1.layer3.1.conv2.weight" in model.state_dict()


def test_a_cache_filled_by_the_first_forward_does_not_disturb_the_second() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid: Tensor | None = None
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            if self.grid is None:
                self.grid = torch.linspace(0, 1, 6)
            x = x + self.grid
            self.kept = torch.relu(self.b(x))
            return self.c(self.kept)

    model = RIDEWrapper(Cached(), 3, fork_at="b")
    x = torch.randn(3, 6)
    first = model(x)
    assert torch.equal(model(x), first)
    state = model.run_trunk(x)
    torch.testing.assert_close(model.run_expert(2, state)[0], expert_logits(first)[:, 2])
    copied = copy.deepcopy(model)  # an activation with a history hangs on the modules
    assert torch.equal(copied(x), first)


def test_in_place_change_of_the_trunks_result_is_isolated() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(self.b(x)) + self.c(x)

    backbone = InPlace()
    model = RIDEWrapper(backbone, 2, fork_at="c").eval()
    x = torch.randn(5, 6)
    whole = expert_logits(model(x))
    state = model.run_trunk(x)
    for _ in range(2):
        torch.testing.assert_close(model.run_expert(1, state)[0], whole[:, 1])


@pytest.mark.parametrize("num_experts", [0, -1, 2.0, True, "3", None])
def test_number_of_experts_is_checked(num_experts: int) -> None:
    with pytest.raises(ArgumentError, match=r"`num_experts` to be an integer >= 1, but got"):
        RIDEWrapper(mlp(), num_experts)
    with pytest.raises(ArgumentError, match=r"`num_experts` to be an integer >= 1, but got"):
        RIDEWrapper.from_parts(nn.Linear(4, 4), lambda k: nn.Linear(4, 3), num_experts)


def test_an_integer_of_numpy_is_a_number_of_experts() -> None:
    model = RIDEWrapper(mlp(), np.int64(2))
    assert type(model.num_experts) is int
    assert len(model.experts) == 2


def test_unknown_fork_point_lists_near_matches() -> None:
    with pytest.raises(SplitError, match=r"'layr2' is none\. Near matches: \['layer"):
        RIDEWrapper(CifarResNet(n=1), 2, fork_at="layr2")


def test_fork_point_that_is_never_called_is_refused() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    backbone = Partly()
    with pytest.raises(SplitError, match="not called"):
        RIDEWrapper(backbone, 2, fork_at="unused")


def test_not_a_module() -> None:
    with pytest.raises(ArgumentError, match=r"`backbone` to be a torch\.nn\.Module.*function"):
        RIDEWrapper(lambda x: x, 2)
    for makes_one in (nn.Linear, partial(nn.Linear, 3, 5)):
        with pytest.raises(ArgumentError, match=r"pass what it returns: `RIDEWrapper\(make\(\)"):
            RIDEWrapper(makes_one, 2)


def test_input_that_cannot_be_guessed_asks_for_an_example() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * weight)

    with pytest.raises(SplitError, match="Pass `example_input=`"):
        RIDEWrapper(Odd(), 2)
    x, weight = torch.randn(3, 4), torch.rand(3, 1)
    model = RIDEWrapper(Odd(), 2, fork_at="b", example_input=(x, weight))
    assert model(x, weight=weight).shape == (3, 3)
    by_name = RIDEWrapper(Odd(), 2, fork_at="b", example_input={"x": x, "weight": weight})
    assert by_name(x=x, weight=weight).shape == (3, 3)


def test_example_that_the_backbone_refuses() -> None:
    with pytest.raises(SplitError, match="does not run on `example_input`"):
        RIDEWrapper(mlp(), 2, example_input=torch.randn(2, 3))
    with pytest.raises(ArgumentError, match="`example_input` to be a tensor"):
        RIDEWrapper(mlp(), 2, example_input=3)


def test_output_that_is_not_logits() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(SplitError, match=r"logits \[B, C\]"):
        RIDEWrapper(backbone, 2, example_input=torch.randn(2, 3, 8, 8))


def test_backbone_whose_rows_depend_on_each_other_is_refused() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.a(x)))
            return self.c(x - x.mean(dim=0))

    with pytest.raises(
        SplitError, match=r"at 'b'.*depends on the rows that come with it.*`fork_at="
    ):
        RIDEWrapper(Coupled(), 2, fork_at="b")


def test_forward_that_changes_its_path_is_refused() -> None:
    calls = [0]  # outside the module: what it keeps itself, every expert starts from

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            calls[0] += 1
            x = self.a(x)
            x = torch.tanh(x) if calls[0] % 2 else torch.relu(x)
            return self.c(self.b(x))

    with pytest.raises(SplitError, match=r"fork_at|path"):
        RIDEWrapper(Fickle(), 2, fork_at="b")


def test_a_trunk_module_may_be_replaced_and_hooked_after_wrapping() -> None:
    model = RIDEWrapper(ImageNetResNet(), 2).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = expert_logits(model(x))
    # As `convert_sync_batchnorm`, adapters and pruning do it.
    model.trunk.bn1 = nn.Sequential(model.trunk.bn1, nn.Identity())
    torch.testing.assert_close(expert_logits(model(x)), expected)
    model.trunk.bn1.register_forward_hook(lambda module, args, result: result * 2)
    model.trunk.bn1.register_forward_pre_hook(lambda module, args: (args[0] + 1,), prepend=True)
    doubled = expert_logits(model(x))
    assert not torch.allclose(doubled, expected)
    torch.testing.assert_close(model.router_inputs(x).expert_logits, doubled)


def test_hooks_of_an_expert_and_of_the_trunk_run_once_a_forward() -> None:
    model = RIDEWrapper(ImageNetResNet(), 2).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = expert_logits(model(x))
    seen: list[str] = []
    for name, view in (("trunk", model.trunk), ("0", model.experts[0]), ("1", model.experts[1])):
        view.register_forward_pre_hook(lambda m, a, n=name: seen.append(n) or (a[0] + 0,))
    torch.testing.assert_close(expert_logits(model(x)), expected)
    assert seen == ["trunk", "0", "1"]


def test_cosine_classifier_on_a_convolution_is_refused() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(SplitError, match="classifier"):
        RIDEWrapper(backbone, 2, classifier="cosine")
    with pytest.raises(ArgumentError, match="`classifier` to be None, 'cosine'"):
        RIDEWrapper(mlp(), 2, classifier="cosin")


def test_plain_convnet_with_dropout_trains() -> None:
    model = RIDEWrapper(plain_convnet(), 3)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        experts = expert_logits(model(x))
        loss = nn.functional.cross_entropy(experts.flatten(0, 1), y.repeat_interleave(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_narrowing_keeps_the_mode_of_every_module_and_fresh_statistics() -> None:
    backbone = CifarResNet(10, n=1)
    backbone.layer3.eval()
    model = RIDEWrapper(backbone, 2, expert_width=0.75)
    for expert in model.experts:
        assert expert.layer2[0].bn1.training
        assert expert.layer2[0].shortcut.training
        assert not expert.layer3[0].bn1.training
        assert expert.layer2[0].bn1.num_batches_tracked == 0
        assert (expert.layer2[0].bn1.running_mean == 0).all()
    assert model.experts[0].layer2[0].conv1.out_channels == 24


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(16), nn.Linear(16, 5))


class Meta(nn.Linear):
    """Weights as buffers that are trained, so that a step of meta-learning can replace them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        for name, weight in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, weight.detach().requires_grad_())


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda: RIDEWrapper(mlp(), 2), "is or holds a wrapped one"),
        (lambda: nn.Sequential(RIDEWrapper(mlp(), 2), nn.Identity()), "is or holds a wrapped one"),
        (lazy, r"`2\.weight` is lazy and has none yet. Run one batch"),
        (lambda: mlp().to("meta"), "is on the meta device. Materialise it"),
        (lambda: nn.Sequential(Meta(8, 16), *mlp()), r"the buffer `0\.weight` requires gradients"),
    ],
)
def test_backbones_without_weights_or_wrapped_already_are_refused(
    backbone: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(SplitError, match=message):
        RIDEWrapper(backbone(), 2)


def test_a_model_that_was_copied_in_inference_mode_runs() -> None:
    backbone = nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 5)
    )
    model = RIDEWrapper(backbone, 2, fork_at="2", init="copy").eval()  # the frozen one is shared
    x = torch.randn(4, 8)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_inference_mode_is_refused() -> None:
    backbone = mlp()
    with torch.inference_mode(), pytest.raises(SplitError, match=r"outside `torch.inference_mode"):
        RIDEWrapper(backbone, 2)


class AsksForGradients(nn.Module):
    """A forward that turns gradients on by itself in training, as Wav2Vec2's encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.late = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        if self.training:
            x.requires_grad = True
        return self.head(self.late(self.stem(x).relu()).relu())


def test_a_forward_may_ask_for_gradients_itself() -> None:
    backbone = AsksForGradients()
    example = torch.randn(2, 8)
    model = RIDEWrapper(backbone, 1, fork_at="late", init="copy", example_input=example)
    model.classifiers[0].load_state_dict(backbone.head.state_dict())
    x = torch.randn(4, 8)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), backbone.train(mode)(x))
