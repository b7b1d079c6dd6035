"""Frozen means shared, whatever trains beside it; and it stays so through what people do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ride_plugin import ArgumentError, CheckpointError, RIDEWrapper, cost_report, experts_loss
from tests.adapters import KINDS, low_rank, pretrained


def wrapped(kind: str = "low_rank", num_experts: int = 3) -> RIDEWrapper:
    return RIDEWrapper(KINDS[kind](), num_experts, fork_at="blocks.2", init="copy")


def step(model: nn.Module, x: Tensor | None = None) -> None:
    """One step of SGD, in training mode."""
    model.train()
    x = torch.randn(6, 8) if x is None else x
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    experts_loss(F.cross_entropy, model(x), torch.arange(len(x)) % 5).backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen_are_shared(model: RIDEWrapper) -> bool:
    first, *others = (dict(e.named_parameters(remove_duplicate=False)) for e in model.experts)
    return all(
        (other[name] is parameter) != parameter.requires_grad
        for other in others
        for name, parameter in first.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_one_tensor_and_trainable_ones_are_each_experts_own(
    kind: str,
) -> None:
    model = wrapped(kind)
    assert frozen_are_shared(model)
    assert not any(p.requires_grad for p in model.trunk.parameters())
    first, *others = (dict(e.named_buffers()) for e in model.experts)
    assert first  # the statistics of frozen BatchNorm layers
    assert all(other[name] is buffer for other in others for name, buffer in first.items())
    before = {name: p.clone() for name, p in model.named_parameters()}
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    step(model)
    step(model)  # low-rank adapters: the first matrix receives gradients from the second step on
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    trained = [[p for p in e.parameters() if p.requires_grad] for e in model.experts]
    assert all(not torch.equal(a, b) for a, b in zip(trained[0], trained[1], strict=True))


def features_of(network: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with network.head.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        network(x)
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_starts_with_the_features_of_the_pretrained_network(kind: str) -> None:
    backbone = KINDS[kind]()
    model = RIDEWrapper(backbone, 3, fork_at="blocks.2", init="copy").eval()
    x = torch.randn(4, 8)
    state = model.run_trunk(x)
    for index in range(3):
        assert torch.equal(model.run_expert(index, state)[1], features_of(backbone, x))


def test_what_does_not_act_yet_is_drawn_anew_for_each_expert_and_named() -> None:
    model = wrapped("low_rank")
    names = ["blocks.2.linear.down.weight", "blocks.3.linear.down.weight"]
    assert model.redrawn_parameters == names
    for name in names:
        first, second, _ = (expert.get_parameter(name) for expert in model.experts)
        assert not torch.equal(first, second)
        assert torch.equal(first.flatten().sort().values, second.flatten().sort().values)
        assert not expert_is_changed(model, name.replace("down", "up"))
    assert wrapped("adapter_modules").redrawn_parameters[0] == "blocks.2.adapter.0.weight"


def expert_is_changed(model: RIDEWrapper, name: str) -> bool:
    return bool(model.experts[1].get_parameter(name).any())


@pytest.mark.parametrize("kind", ["biases", "prompt", "new_head"])
def test_what_acts_already_may_be_pretrained_and_is_kept(kind: str) -> None:
    backbone = KINDS[kind]()
    model = RIDEWrapper(backbone, 2, fork_at="blocks.2", init="copy")
    assert model.redrawn_parameters == []
    for expert in model.experts:
        for name, parameter in expert.named_parameters():
            if not name.startswith("head."):
                assert torch.equal(parameter, backbone.get_parameter(name)), name


def test_unfrozen_pretrained_layers_are_copied_and_not_drawn() -> None:
    backbone = pretrained()
    backbone.blocks[3].requires_grad_(True)
    backbone.head.requires_grad_(True)
    model = RIDEWrapper(backbone, 2, fork_at="blocks.2", init="copy").train()
    first, second = (expert.blocks[3] for expert in model.experts)
    assert first.linear.weight is not second.linear.weight
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert first.norm.running_mean is not second.norm.running_mean  # it goes on counting
    assert first.norm.training
    assert not model.experts[0].blocks[2].norm.training


def test_batchnorm_that_was_not_frozen_goes_on_counting() -> None:
    model = RIDEWrapper(pretrained().train(), 2, fork_at="blocks.2", init="copy", **KEPT).train()
    norms = [expert.blocks[3].norm for expert in model.experts]
    assert norms[0].training
    assert norms[0].weight is norms[1].weight
    assert norms[0].running_mean is not norms[1].running_mean


KEPT = {"classifier": lambda features, classes: nn.Linear(features, classes)}


def test_a_frozen_batchnorm_trains_again_once_it_is_unfrozen() -> None:
    model = wrapped("new_head")
    norm = model.trunk.blocks[1].norm
    assert not model.train().trunk.blocks[1].norm.training
    norm.requires_grad_(True)
    assert model.train().trunk.blocks[1].norm.training


def test_sharing_survives_copies_moves_and_averaging() -> None:
    model = wrapped()
    assert frozen_are_shared(copy.deepcopy(model))
    assert frozen_are_shared(pickle.loads(pickle.dumps(model)))
    assert frozen_are_shared(copy.deepcopy(model).double())
    moved = copy.deepcopy(model).to("meta")
    moved.to_empty(device="cpu")
    assert frozen_are_shared(moved)
    buffers = [dict(expert.named_buffers()) for expert in copy.deepcopy(model).double().experts]
    assert all(buffers[1][name] is buffer for name, buffer in buffers[0].items())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    start = {name: p.clone() for name, p in model.named_parameters()}
    step(model)
    averaged.update_parameters(model)
    assert frozen_are_shared(averaged.module)
    for name, parameter in model.named_parameters():
        expected = 0.5 * (start[name] + parameter)
        torch.testing.assert_close(averaged.module.get_parameter(name), expected)


def test_state_dicts_are_complete_and_hold_shared_tensors_once() -> None:
    model, other = wrapped(), wrapped()
    step(model)
    state = model.state_dict()
    assert {f"experts.{k}.blocks.3.linear.base.weight" for k in range(3)} <= state.keys()
    file = io.BytesIO()
    torch.save(state, file)
    small = sum(t.numel() for t in {t.data_ptr(): t for t in state.values()}.values())
    assert len(file.getvalue()) < 4 * small + 200 * len(state) + 20_000
    file.seek(0)
    read = torch.load(file, weights_only=True)
    x = torch.randn(4, 8)
    for assign in (False, True):
        loaded = copy.deepcopy(other)
        loaded.load_state_dict(read, assign=assign)
        assert frozen_are_shared(loaded)
        assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_checkpoint_may_hold_a_shared_tensor_under_one_name() -> None:
    model, other = wrapped(), wrapped()
    once = {t.data_ptr(): (name, t) for name, t in reversed(model.state_dict().items())}
    assert len(once) < len(model.state_dict())
    state = dict(once.values())
    x = torch.randn(4, 8)
    for strict in (True, False):
        for assign in (True, False):
            loaded = copy.deepcopy(other)
            missing, unexpected = loaded.load_state_dict(state, strict=strict, assign=assign)
            assert unexpected == []
            assert bool(missing) != strict
            assert frozen_are_shared(loaded)
            assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_checkpoint_of_experts_that_share_nothing_is_refused_before_anything_is_loaded() -> None:
    network = low_rank()
    network.blocks[3].linear.base.requires_grad_(True)
    apart = RIDEWrapper(network, 3, fork_at="blocks.2", init="copy")
    step(apart)
    model = wrapped()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"another `blocks\.3\.linear\.base\.weight`"):
        model.load_state_dict(apart.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("checkpoint_experts", [False, True])
def test_unfreezing_later_is_explained_once(checkpoint_experts: bool) -> None:
    model = wrapped().train()
    model.checkpoint_experts = checkpoint_experts
    model(torch.randn(4, 8))
    model.experts[0].blocks[3].linear.base.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"all experts share them: \['blocks.3.linear.base.weight"):
        model(torch.randn(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8))


def test_replaced_classifiers_are_not_tied_again() -> None:
    model = RIDEWrapper(low_rank(), 2, fork_at="blocks.2", init="copy")
    for expert in model.experts:
        expert.head = nn.Linear(12, 5).requires_grad_(False)
    model.double()
    first, second = model.classifiers
    assert first.weight is not second.weight


def test_what_trains_is_saved_and_loaded_alone(tmp_path) -> None:
    torch.manual_seed(0)
    start = low_rank()
    model, other = (
        RIDEWrapper(copy.deepcopy(start), 3, fork_at="blocks.2", init="copy") for _ in range(2)
    )
    step(model)
    step(model)
    torch.save(model.trainable_state_dict(), tmp_path / "adapters.pt")
    other.load_trainable_state_dict(torch.load(tmp_path / "adapters.pt", weights_only=True))
    x = torch.randn(4, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    names = model.trainable_state_dict().keys()
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(CheckpointError, match="Wrap and freeze as when it was saved"):
        wrapped("new_head").load_trainable_state_dict(model.trainable_state_dict())


def test_what_is_no_such_state_is_refused_and_nothing_is_loaded() -> None:
    model = RIDEWrapper(low_rank(), 2, fork_at="blocks.2", init="copy")
    state = {name: value.clone() for name, value in model.trainable_state_dict().items()}
    with pytest.raises(ArgumentError, match="what `trainable_state_dict` returned, but got"):
        model.load_trainable_state_dict([])
    first, *_, last = state
    changed = {**state, first: state[first] + 1, last: torch.zeros(1)}
    with pytest.raises(CheckpointError, match=rf"`state\['{last}'\]` to be a tensor .* got \[1\]"):
        model.load_trainable_state_dict(changed)
    now = model.trainable_state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items())


def test_statistics_that_training_changes_are_among_what_is_saved() -> None:
    model = RIDEWrapper(pretrained().train(), 2, fork_at="blocks.2", init="copy", **KEPT)
    other = copy.deepcopy(model)
    step(model)
    other.load_trainable_state_dict(model.trainable_state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_the_counts_of_parameters_are_those_of_tensors(capsys) -> None:
    model = wrapped()
    own = 2 * (12 * 2 + 2 * 12) + 12 * 5 + 5
    frozen = (8 * 12 + 12) + 4 * (12 * 12 + 12 + 24) + 12
    model.print_trainable_parameters()
    share = 100 * 3 * own / (3 * own + frozen)
    assert capsys.readouterr().out == (
        f"trainable params: {3 * own:,} || all params: {3 * own + frozen:,} || "
        f"trainable%: {share:.4f}\n"
    )
    report = cost_report(model)
    assert report.expert_parameters == (own,) * 3
    assert report.trainable_parameters == 3 * own
    assert report.parameters == 3 * own + frozen
    assert report.shared_parameters == 2 * (12 * 12 + 12 + 24) + 12
    assert "shared by experts" in str(report)
    assert f"{3 * own:,}" in str(report).splitlines()[-2]


def test_folding_batchnorm_of_experts_that_share_their_weights() -> None:
    model = wrapped("new_head").eval()
    x = torch.randn(4, 8)
    expected = model(x)
    torch.testing.assert_close(model.optimize_for_inference()(x), expected)
    assert torch.equal(model(x), expected)


def _train_on_rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    model = wrapped()
    whole = copy.deepcopy(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    x, y = torch.randn(8, 8), torch.arange(8) % 5
    half = slice(4 * rank, 4 * rank + 4)
    experts_loss(F.cross_entropy, ddp.train()(x[half]), y[half]).backward()
    experts_loss(F.cross_entropy, whole.train()(x), y).backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    gradients = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    torch.save((frozen_are_shared(model), gradients), f"{out}-{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path) -> None:
    mp.spawn(_train_on_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    for rank in range(2):
        shared, gradients = torch.load(tmp_path / f"out-{rank}", weights_only=True)
        assert shared
        assert len(gradients) == 3 * 6
        for got, expected in gradients:
            torch.testing.assert_close(got, expected)


class Bank(nn.Module):
    """A memory bank without anything to train: it writes its rows in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("seen", torch.zeros(16, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen[self.pointer[0] % 16] += len(x)
            self.pointer += 1
        return x


def test_what_training_writes_moves_on_once_for_each_experts_own() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), Bank(), nn.Linear(8, 4))
    model = RIDEWrapper(net, 3, fork_at="2", init="copy", example_input=torch.randn(2, 6)).train()
    for _ in range(2):
        model(torch.randn(5, 6))
    pointers = [int(expert.get_submodule("3").pointer) for expert in model.experts]
    assert pointers == [2, 2, 2]


def test_tensors_that_are_swapped_for_a_call_are_read() -> None:
    model = wrapped("prompt").eval()
    x = torch.randn(4, 8)
    before = model(x)
    swapped = {n: p + 1 for n, p in model.named_parameters() if n.endswith("prompt")}
    assert len(swapped) == 3
    called = torch.func.functional_call(model, swapped, x)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for name in swapped:
            model.get_parameter(name).add_(1)
    torch.testing.assert_close(called, model(x))


@pytest.mark.parametrize("wrong", ["integers", "large"])
def test_a_trainable_state_that_the_model_s_dtype_cannot_hold_is_refused(wrong: str) -> None:
    model = RIDEWrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), 2, fork_at="2")
    state = {name: value.clone() for name, value in model.trainable_state_dict().items()}
    model.half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_trainable_state_dict(state)  # rounds, as any load does
    name = "experts.1.2.weight"
    if wrong == "large":
        state[name][0, 0] = 1e5
    else:
        state[name] = (100 * state[name]).to(torch.int8)
    message = rf"`state\['{name}'\]` to hold numbers that torch.float16 can hold"
    with pytest.raises(CheckpointError, match=message):
        model.load_trainable_state_dict(state)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    model.bfloat16()
    if wrong == "large":
        model.load_trainable_state_dict(state)
