"""Counts that carry no noise: operations, waits for the device, and rows looked for."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.resnets import CifarResNet
from benchmarks.speed.live_bytes import LiveBytes
from ride_plugin import (
    DiversityLoss,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    experts_loss,
)
from ride_plugin._compiler import EXPORTS
from ride_plugin.routing._threshold import _sweep

pytestmark = pytest.mark.skipif(not EXPORTS, reason="other versions of torch count otherwise")

CLASSES = 10
COUNTS = [500 // (i + 1) for i in range(CLASSES)]
# Views and plain allocations start no kernel.
NO_KERNEL = frozenset(
    {
        "_unsafe_view",
        "alias",
        "as_strided",
        "as_strided_",
        "detach",
        "empty",
        "empty_like",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    }
)
READS = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "equal"})


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel, forward and backward; views do not."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace != "profiler" and name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.counts.total()

    @property
    def reads(self):
        """Operations whose result the host waits for."""
        return {name: count for name, count in self.counts.items() if name in READS}


def test_the_counter_sees_kernels_reads_and_backward_but_no_views():
    x = torch.randn(3, 4, requires_grad=True)
    with Operations() as seen:
        x.view(12).exp().sum().backward()
    assert seen.counts["exp"] == 1
    assert seen.counts["mul"] == 1  # the backward of exp
    assert "view" not in seen.counts
    assert seen.reads == {}
    with Operations() as seen:
        x.detach().sum().item()
        x.detach().nonzero()
    assert seen.reads == {"_local_scalar_dense": 1, "nonzero": 1}


def counted_losses(num_experts, form, detach_others):
    """Operations of the diversity term alone, and of the whole loss."""
    target = torch.randint(0, CLASSES, (16,))
    diversity = DiversityLoss(COUNTS, form=form, detach_others=detach_others)
    experts = torch.randn(16, num_experts, CLASSES, requires_grad=True)
    with Operations() as term:
        diversity(experts, target).backward()
    with Operations() as whole:
        loss = experts_loss(nn.functional.cross_entropy, experts, target)
        (loss + diversity(experts, target)).backward()
    return term, whole


@pytest.mark.parametrize(
    ("form", "detach_others"), [("paper", True), ("paper", False), ("official", True)]
)
def test_the_loss_takes_few_operations_however_many_experts(form, detach_others):
    pairs = [counted_losses(num_experts, form, detach_others) for num_experts in (2, 3, 8)]
    terms = {term.total for term, _ in pairs}
    wholes = {whole.total for _, whole in pairs}
    assert len(terms) == len(wholes) == 1
    more = 0 if detach_others else 3  # an ablation that nobody trains with
    assert max(terms) <= 46 + more
    assert max(wholes) <= 56 + more  # cross entropy in one call, and two additions
    # On the CPU the bounds of the temperatures are looked at, and in the paper's form the least
    # logit, since a class that only some experts mask makes it infinite; on an accelerator nothing.
    looks = 1 if form == "official" else 2
    reads = {"_local_scalar_dense": 2 * looks + (form == "paper")}
    assert all(counter.reads == reads for pair in pairs for counter in pair)
    assert all(counter.counts["aminmax"] == looks for counter, _ in pairs)


class Narrow(CifarResNet):
    """Full width up to the fork and three quarters of it from there on."""

    def __init__(self):
        super().__init__(CLASSES)
        self.layer2 = self.stage(16, 24, 2)
        self.layer3 = self.stage(24, 48, 2)
        self.linear = nn.Linear(48, CLASSES)


def resnet32(num_experts=3):
    torch.manual_seed(0)
    model = RIDEWrapper(Narrow(), num_experts, fork_at="layer2", classifier="cosine")
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_training_step_of_resnet32_starts_few_kernels_and_reads_no_result(checkpoint):
    model = resnet32()
    model.checkpoint_experts = checkpoint
    diversity = DiversityLoss(COUNTS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2,))

    def step():
        out = model(x)
        optimizer.zero_grad(set_to_none=True)
        (experts_loss(nn.functional.cross_entropy, out, y) + diversity(out, y)).backward()
        optimizer.step()

    step()
    with Operations() as seen:
        step()
    assert seen.reads == {"_local_scalar_dense": 2}  # the bounds of temperatures, on the CPU only
    assert seen.counts["convolution"] == 71 + checkpoint * 60
    if not checkpoint:
        assert seen.total <= 800


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_routing_looks_for_rows_at_most_once_for_each_gate(threshold):
    model = resnet32(4).eval()
    serve = RoutingInference(model, ExpertRouter.for_model(model), threshold)
    x = torch.randn(6, 3, 32, 32)
    with Operations() as seen:
        used = serve(x, return_routing=True).num_experts_used
    gates = min(int(used.max()), 3)
    assert seen.counts["nonzero"] == gates
    # On the CPU each gate, and once the result, is looked at for NaN; on an accelerator neither.
    assert set(seen.reads) <= {"nonzero", "_local_scalar_dense"}
    assert seen.counts["_local_scalar_dense"] == gates + 1
    with Operations() as seen:
        serve.dense(x)
    assert "nonzero" not in seen.counts


def peak(step):
    step()
    with LiveBytes() as counter:
        step()
    return counter.peak


@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize(("batch", "num_experts", "classes"), [(64, 4, 1000), (2, 16, 100_000)])
def test_the_diversity_term_holds_at_most_six_copies_of_the_logits(
    form, batch, num_experts, classes
):
    experts = torch.randn(batch, num_experts, classes, requires_grad=True)
    target = torch.randint(0, classes, (batch,))
    diversity = DiversityLoss(torch.arange(classes, 0, -1), form=form)

    def step():
        experts.grad = None
        diversity(experts, target).backward()

    copy = experts.numel() * experts.element_size()
    assert copy <= peak(step) <= 6 * copy


def test_three_checkpointed_experts_need_no_more_memory_than_the_single_backbone():
    # Large enough for activations to outweigh parameters, as in any real step.
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, CLASSES, (32,))

    def step(model, loss):
        def run():
            model.zero_grad(set_to_none=True)
            loss(model(x), y).backward()

        return run

    plain = nn.functional.cross_entropy
    single = peak(step(CifarResNet(CLASSES).to(memory_format=torch.channels_last), plain))
    model, of_experts = resnet32(), partial(experts_loss, plain)
    kept = peak(step(model, of_experts))
    model.checkpoint_experts = True
    again = peak(step(model, of_experts))
    assert again < kept
    assert again <= single


def test_half_a_million_samples_are_swept_in_few_operations():
    row_flops = torch.tensor([10, 17, 23]).expand(500_000, -1)
    with Operations() as seen:
        _sweep(torch.randn(500_000, 2), torch.rand(500_000, 3) < 0.5, row_flops, 22.0)
    assert seen.total < 120
