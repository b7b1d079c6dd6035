"""The training loops that users have: what they do around the model must keep working."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import (
    DiversityLoss,
    ExpertRouter,
    MissingExpertLogitsError,
    RIDEWrapper,
    RoutingLoss,
    expert_logits,
    experts_loss,
)

from .backbones import CifarResNet, GluedNet, VisionTransformer, mlp

COUNTS = [60, 30, 20, 12, 8, 5, 3]


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 20), torch.randint(0, 7, (size,))


def loss_of(model: nn.Module, diversity: DiversityLoss, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return experts_loss(nn.functional.cross_entropy, out, y) + diversity(out, y)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_accumulated_gradients_equal_those_of_the_whole_batch() -> None:
    model, diversity = RIDEWrapper(mlp(), 3), DiversityLoss(COUNTS)
    x, y = batch(16)
    loss_of(model, diversity, x, y).backward()
    whole = gradients(model)
    model.zero_grad()
    for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
        (loss_of(model, diversity, part_x, part_y) / 4).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4)


def test_mixup_targets_at_share_one_equal_hard_targets() -> None:
    model, diversity = RIDEWrapper(mlp(), 3), DiversityLoss(COUNTS)
    x, y = batch()
    hard = loss_of(model, diversity, x, y)
    soft = loss_of(model, diversity, x, nn.functional.one_hot(y, 7).float())
    torch.testing.assert_close(hard, soft)
    order = torch.randperm(16)
    mixed = 0.7 * nn.functional.one_hot(y, 7) + 0.3 * nn.functional.one_hot(y[order], 7)
    loss_of(model, diversity, 0.7 * x + 0.3 * x[order], mixed).backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("backbone", [CifarResNet(7, n=1), VisionTransformer(7)])
def test_autocast_trains_with_losses_in_full_precision(backbone: nn.Module) -> None:
    model, diversity = RIDEWrapper(backbone, 2), DiversityLoss(COUNTS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 7, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        loss = experts_loss(nn.CrossEntropyLoss(), out, y) + diversity(out, y)
    assert expert_logits(out).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_exponential_moving_average_of_the_model() -> None:
    model = RIDEWrapper(CifarResNet(7, n=1), 2).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 7, (8,))
    first = copy.deepcopy(average.module.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        experts_loss(nn.functional.cross_entropy, model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
    assert expert_logits(average(x)).shape == (8, 2, 7)
    moved = average.module.state_dict()
    name = "experts.1.layer3.0.conv1.weight"
    assert not torch.equal(moved[name], first[name])
    assert not torch.equal(moved[name], model.state_dict()[name])


def test_output_that_lost_its_experts_is_refused() -> None:
    model, diversity = RIDEWrapper(mlp(), 3), DiversityLoss(COUNTS)
    x, y = batch()
    for lost in (model(x) * 1.0, model(x)[:, :], model(x).detach(), model(x).double()):
        with pytest.raises(MissingExpertLogitsError, match="return_experts"):
            diversity(lost, y)


# While it traces, torch instantiates autograd functions, of which it warns others.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.compiles
def test_compiles_without_a_graph_break_and_without_recompiling(training: bool) -> None:
    torch.compiler.reset()
    model = RIDEWrapper(VisionTransformer(7), 3).train(training)
    diversity = DiversityLoss(COUNTS, start_epoch=1)
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compilations.append(1)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compute(x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        return experts_loss(nn.functional.cross_entropy, out, y) + diversity(out, y)

    y = torch.randint(0, 7, (4,))
    for epoch in range(3):
        x = torch.randn(4, 3, 32, 32)
        torch.manual_seed(epoch)
        got = compute(x, y)
        torch.manual_seed(epoch)
        torch.testing.assert_close(got, loss_of(model, diversity, x, y))
        diversity.step()  # other temperatures, in place
    assert len(compilations) == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.compiles
def test_exports(strict: bool) -> None:
    model = RIDEWrapper(CifarResNet(7, n=1), 3).eval()
    x = torch.randn(4, 3, 32, 32)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_gradient_checkpointing_of_the_whole_model() -> None:
    model = RIDEWrapper(GluedNet(7), 2).eval()  # no dropout, so that both passes agree
    x, y = torch.randn(4, 3, 16, 16, requires_grad=True), torch.randint(0, 7, (4,))
    experts_loss(nn.functional.cross_entropy, model(x), y).backward()
    expected = gradients(model)
    model.zero_grad()
    model.return_experts = True
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    experts_loss(nn.functional.cross_entropy, out, y).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_stage_two_is_an_ordinary_loop_with_everything_else_frozen() -> None:
    model = RIDEWrapper(CifarResNet(7, n=1), 3).train()
    router, criterion = ExpertRouter.for_model(model), RoutingLoss()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(router.parameters(), 1e-2)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 7, (32,))
    losses = []
    for _ in range(20):
        inputs = model.router_inputs(x)  # could be stored: they do not change
        loss = criterion(router(inputs), inputs.expert_logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_checkpointed_experts_give_equal_gradients_statistics_and_random_numbers() -> None:
    model = RIDEWrapper(GluedNet(7), 3).train()
    resnet = RIDEWrapper(CifarResNet(7, n=1), 3).train()
    for plain, size in ((model, 16), (resnet, 32)):
        other = copy.deepcopy(plain)
        other.checkpoint_experts = True
        x, y = torch.randn(6, 3, size, size), torch.randint(0, 7, (6,))
        diversity = DiversityLoss(COUNTS)
        results = []
        for one in (plain, other):
            torch.manual_seed(3)
            loss_of(one, diversity, x, y).backward()
            results.append((gradients(one), one.state_dict(), torch.rand(1)))
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(results[1][0][name], gradient, atol=1e-6, rtol=1e-5)
        for name, tensor in results[0][1].items():
            assert torch.equal(results[1][1][name], tensor), name
        assert torch.equal(results[0][2], results[1][2])
        assert not any("features" in vars(m) for m in other.modules())


def _replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module for another device, as torch's `replicate` does it."""
    modules = list(module.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        for name, child in m._modules.items():
            copies[id(m)]._modules[name] = None if child is None else copies[id(child)]
        for name, tensor in m._parameters.items():
            setattr(copies[id(m)], name, None if tensor is None else 2 * tensor.detach())
        for name, tensor in m._buffers.items():
            copies[id(m)]._buffers[name] = tensor
    return copies[id(module)]


@pytest.mark.parametrize("backbone", [GluedNet(7), VisionTransformer(7)])
def test_data_parallel_replicas_use_their_own_parameters(backbone: nn.Module) -> None:
    model = RIDEWrapper(backbone, 3, return_experts=True).eval()
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
        x = torch.randn(4, 3, 32, 32)
        torch.testing.assert_close(_replica(model)(x).expert_logits, doubled(x).expert_logits)
