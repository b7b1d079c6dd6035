"""Tensors of another device than the CPU, which stand for an accelerator's: torch's meta tensors.

They raise where two devices meet, and where a value would be read back, which on an accelerator
stalls the queue at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ride_plugin import (
    ConfidenceRouter,
    DistillationLoss,
    DiversityLoss,
    ExpertRouter,
    RIDELoss,
    RIDEModule,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    expert_logits,
    experts_loss,
    functional,
    longtail,
)
from ride_plugin.routing._exit import exceeds
from ride_plugin.routing._measure import _unpack

COUNTS = [50, 20, 5]
Function = Callable[..., torch.Tensor]

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "diversity": lambda: DiversityLoss(COUNTS),
    "diversity, paper": lambda: DiversityLoss(COUNTS, form="paper"),
    "distillation": DistillationLoss,
    "ride": lambda: RIDELoss(nn.CrossEntropyLoss(), COUNTS),
    "ride, prior": lambda: RIDELoss(longtail.BalancedSoftmaxLoss(COUNTS), COUNTS),
    "ldam": lambda: longtail.LDAMLoss(COUNTS),
    "focal": lambda: longtail.FocalLoss(weight=[1.0, 2.0, 3.0]),
    "balanced softmax": lambda: longtail.BalancedSoftmaxLoss(COUNTS),
    "routing": lambda: RoutingLoss(class_counts=COUNTS),
}


def experts(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(4, 2, 3, dtype=dtype, device="meta", requires_grad=True)


TARGETS = {
    "indices": lambda: torch.zeros(4, dtype=torch.int32, device="meta"),
    "probabilities": lambda: torch.zeros(4, 3, dtype=torch.float16, device="meta"),
}


@pytest.mark.parametrize("moved", [True, False])  # a criterion without tensors need not be moved
@pytest.mark.parametrize(
    ("name", "target"),
    [pair for pair in product(LOSSES, TARGETS) if pair != ("ldam", "probabilities")],
)
def test_losses_go_to_the_device_of_the_logits_and_read_nothing_back(name, target, moved) -> None:
    loss = LOSSES[name]()
    if moved:
        loss.to("meta")
    logits, labels = experts(torch.float16), TARGETS[target]()
    if name == "routing":
        gates = torch.zeros(4, 1, device="meta", requires_grad=True)
        value, leaf = loss(gates, logits, labels), gates
    elif name == "distillation":
        value, leaf = loss(logits, torch.zeros(4, 3, device="meta")), logits
    elif name in ("diversity", "diversity, paper", "ride", "ride, prior"):
        value, leaf = loss(logits, labels), logits
    else:
        value, leaf = experts_loss(loss, logits, labels), logits
    assert (value.device.type, value.dtype, value.shape) == ("meta", torch.float32, ())
    value.backward()
    assert (leaf.grad.device.type, leaf.grad.dtype) == ("meta", leaf.dtype)


EMPTIED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "meta": lambda loss: loss.to("meta").to_empty(device="cpu"),
    "meta twice": lambda loss: loss.to("meta").double().to("meta").to_empty(device="cpu").float(),
    "empty": lambda loss: loss.to_empty(device="cpu"),
    "half": lambda loss: loss.to("meta").half().to_empty(device="cpu"),
    "copied": lambda loss: copy.deepcopy(loss.to("meta")).to_empty(device="cpu"),
}


@pytest.mark.parametrize("emptied", EMPTIED)
@pytest.mark.parametrize(
    "name", [*LOSSES, "ldam, weighted", "ride, ldam", "ride, focal", "ride module"]
)
def test_losses_without_values_have_them_again(name, emptied, monkeypatch) -> None:
    weight = [0.5, 1.0, 4.0]
    losses = LOSSES | {
        "ldam, weighted": lambda: longtail.LDAMLoss(COUNTS, weight=weight),
        "ride, ldam": lambda: RIDELoss(longtail.LDAMLoss(COUNTS, weight=weight), COUNTS),
        "ride, focal": lambda: RIDELoss(longtail.FocalLoss(weight=weight), COUNTS),
        "ride module": lambda: RIDEModule(wrapped(), RIDELoss(longtail.LDAMLoss(COUNTS), COUNTS)),
    }
    loss = losses[name]()
    buffers = {key: buffer.clone() for key, buffer in loss.named_buffers()}
    logits, target = torch.randn(4, 2, 3), torch.tensor([0, 1, 2, 2])

    def value() -> torch.Tensor:
        criterion = loss.criterion if name == "ride module" else loss
        if name == "routing":
            return loss(logits[:, 0, :1], logits, target)
        if name == "distillation":
            return loss(logits, logits.flip(0)[:, 0])
        if name.startswith(("ride", "diversity")):
            return criterion(logits, target)
        return experts_loss(criterion, logits, target)

    before = value()
    # What an allocation finds in memory is often what was there before.
    monkeypatch.setattr(
        torch, "empty_like", lambda tensor, **how: torch.full_like(tensor, 7, **how)
    )
    loss = EMPTIED[emptied](loss)
    monkeypatch.undo()
    for key, after in loss.named_buffers():
        torch.testing.assert_close(after, buffers[key], rtol=1e-6, atol=0)
    torch.testing.assert_close(value(), before)


def wrapped() -> RIDEWrapper:
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return RIDEWrapper(backbone, 2, fork_at="2")


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "distillation"])
def test_losses_come_back_from_a_run_for_shapes(name) -> None:
    loss, fresh = LOSSES[name](), LOSSES[name]()
    logits, target = torch.randn(4, 2, 3), torch.tensor([0, 1, 2, 2])

    def value(loss: nn.Module, device: str) -> torch.Tensor:
        here, labels = logits.to(device), target.to(device)
        if name == "routing":
            return loss(here[:, 0, :1], here, labels)
        if name.startswith(("ride", "diversity")):
            return loss(here, labels)
        return experts_loss(loss, here, labels)

    assert value(loss, "meta").is_meta
    torch.testing.assert_close(value(loss, "cpu"), value(fresh, "cpu"))


def test_class_weights_of_a_schedule_outlive_a_stay_on_the_meta_device() -> None:
    criterion = longtail.LDAMLoss(COUNTS)
    schedule = longtail.DeferredReweighting(criterion, COUNTS, start_epoch=1)
    schedule.step()
    criterion.to("meta").to_empty(device="cpu")
    torch.testing.assert_close(criterion.weight, longtail.effective_number_weights(COUNTS))
    schedule.load_state_dict({"epoch": torch.tensor(0)})
    criterion.to("meta").to_empty(device="cpu")
    assert criterion.weight.tolist() == [1.0, 1.0, 1.0]


def test_ldam_reads_the_first_batch_only_on_an_accelerator(monkeypatch) -> None:
    checked = []
    monkeypatch.setattr(
        longtail.LDAMLoss, "_check_cosine", lambda self, logits: checked.append(logits.device.type)
    )
    loss = longtail.LDAMLoss(COUNTS)
    for _ in range(2):
        loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    assert checked == ["cpu", "cpu"]
    monkeypatch.setattr("ride_plugin.longtail._ldam.has_values", lambda logits: True)
    again = longtail.LDAMLoss(COUNTS).to("meta")
    for _ in range(2):
        again(experts()[:, 0], torch.zeros(4, dtype=torch.int64, device="meta"))
    assert checked == ["cpu", "cpu", "meta"]


UNREAD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ldam": lambda z, y: longtail.LDAMLoss(COUNTS)(z[:, 0], y),
    "ldam of experts": lambda z, y: experts_loss(longtail.LDAMLoss(COUNTS), z, y),
    "ldam by expert": lambda z, y: experts_loss([longtail.LDAMLoss(COUNTS)] * 2, z, y),
    "focal": lambda z, y: longtail.FocalLoss(weight=[1.0, 2.0, 3.0])(z[:, 0], y),
    "balanced softmax": lambda z, y: longtail.BalancedSoftmaxLoss(COUNTS)(z[:, 0], y),
    "routing": lambda z, y: RoutingLoss(class_counts=COUNTS)(z[:, :1, 0], z.square(), y),
    "adjusted": lambda z, y: longtail.adjust_logits(z, COUNTS).square().mean(),
    "tau-normalized": lambda z, y: longtail.tau_normalized(z[:, 0], 0.7).mean(),
}


@pytest.mark.parametrize("name", UNREAD)
def test_nothing_is_read_under_vmap(name) -> None:
    function, target = UNREAD[name], torch.tensor([0, 1, 2, 2])
    samples = torch.randn(5, 4, 2, 3)
    each = torch.stack([function(z, target) for z in samples])
    torch.testing.assert_close(torch.vmap(function, (0, None))(samples, target), each)
    torch.testing.assert_close(torch.vmap(function)(samples, target.expand(5, 4)), each)
    leaves = samples.clone().requires_grad_()
    sum(function(z, target) for z in leaves).backward()
    gradients = torch.vmap(torch.func.grad(function), (0, None))(samples, target)
    torch.testing.assert_close(gradients, leaves.grad)


@pytest.mark.parametrize("name", ["ldam", "focal", "balanced softmax", "ride, ldam"])
def test_nothing_is_read_of_fake_tensors(name) -> None:
    loss = {**LOSSES, "ride, ldam": lambda: RIDELoss(longtail.LDAMLoss(COUNTS), COUNTS)}[name]()
    logits, target = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([0, 1, 2, 2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, labels = mode.from_tensor(logits), mode.from_tensor(target)
        value = loss(fake, labels) if name.startswith("ride") else loss(fake[:, 0], labels)
    assert (value.shape, value.dtype) == ((), torch.float32)
    with (
        pytest.raises(ValueError, match="cosines times scale") if "ldam" in name else nullcontext()
    ):
        experts_loss(getattr(loss, "criterion", loss), 100 * logits.sign(), target)


@pytest.mark.parametrize("inputs", ["predictions", "paper"])
def test_routers_stay_on_the_device_and_read_nothing_back(inputs, monkeypatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # has no "meta"
    router = ExpertRouter(8, 2, num_classes=3, inputs=inputs).to("meta")
    features = torch.zeros(4, 2, 8, device="meta")
    gates = router((experts(), features))
    assert (gates.device.type, gates.shape) == ("meta", (4, 1))
    for gate in (
        router.gate(0, experts()[:, 0], features[:, 0]),
        ConfidenceRouter("margin").gate(0, experts()[:, 0], features[:, 0]),
        ConfidenceRouter().gate(0, experts()[:, 0], features[:, 0]),
    ):
        assert exceeds(gate, torch.zeros((), device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    "function",
    [
        lambda z: functional.pairwise_kl(z, torch.ones(4, device="meta")),
        lambda z: functional.pairwise_kl(z, torch.ones((), device="meta"), detach_others=False),
        lambda z: functional.pairwise_kl(z, 2.0),
        lambda z: functional.kl_from_mean(z, torch.ones(3, device="meta")),
        lambda z: functional.kl_from_reference(z, z[:, 0].half()),
        lambda z: functional.distillation_kl(z, z[:, 0]),
        functional.running_means,
        functional.mean_logits,
        lambda z: functional.routing_targets(z, torch.zeros(4, dtype=torch.int64, device="meta")),
        lambda z: longtail.adjust_logits(z, COUNTS),
        expert_logits,
    ],
)
def test_functions_stay_on_the_device_and_read_nothing_back(function: Function) -> None:
    assert function(experts()).device.type == "meta"


def test_a_served_model_has_its_thresholds_where_its_parameters_are() -> None:
    class Parts(nn.Sequential):  # as much of a model as the two look at
        num_experts, num_classes, feature_dim = 2, 3, 8
        run_trunk = run_expert = router_inputs = evaluating = None

    model = Parts(nn.Linear(2, 2)).to("meta")
    serve = RoutingInference(model, ConfidenceRouter(), 0.5)
    assert serve.threshold_logits.device.type == "meta"
    assert next(ExpertRouter.for_model(model).parameters()).device.type == "meta"
    assert F.relu(serve.threshold).device.type == "meta"


def test_class_counts_that_ask_for_gradients_are_constants() -> None:
    counts = torch.tensor(COUNTS, dtype=torch.float32, requires_grad=True)
    for loss in (
        DiversityLoss(counts),
        RoutingLoss(class_counts=counts),
        longtail.LDAMLoss(counts),
    ):
        assert not any(buffer.requires_grad for buffer in loss.buffers())
    assert not functional.class_balance(counts, 0.1).requires_grad


def test_a_batch_for_calibration_goes_to_the_device_and_its_labels_stay_to_be_looked_at() -> None:
    batch = ([torch.zeros(2, 3)], torch.zeros(2, dtype=torch.int64))
    (inputs,), target = _unpack(batch, torch.device("meta"))
    assert (inputs.device.type, target.device.type) == ("meta", "cpu")
