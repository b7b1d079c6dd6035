"""FSDP2 (`fully_shard`) and FSDP1: what trains is what one process would train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

if not hasattr(fsdp, "fully_shard"):
    pytest.skip("torch has FSDP2 from 2.6 on", allow_module_level=True)

from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ride_plugin import MissingExpertLogitsError, RIDEWrapper, experts_loss
from tests import adapters

from .ranks import Ranks
from .training import CLASSES, assert_equal_to_alone, build, loss_of, my_half, train


def shard(model: RIDEWrapper, parts: str = "whole", **options: Any) -> RIDEWrapper:
    options["mesh"] = init_device_mesh("cpu", (2,))
    if parts == "trunk and experts":
        fully_shard(model.trunk, **options)
    if "experts" in parts:
        for expert in model.experts:
            fully_shard(expert, **options)
    if parts == "blocks":
        for module in list(model.modules()):
            if type(module).__name__ == "Block":
                fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def _train(parts: str, reshard: bool, options: dict[str, Any]) -> None:
    model = shard(build(**options), parts, reshard_after_forward=reshard)
    train(model, my_half)
    assert_equal_to_alone(model.state_dict())


@pytest.mark.parametrize("return_experts", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("parts", ["whole", "experts", "trunk and experts", "blocks"])
def test_trains_as_one_process(
    ranks: Ranks, parts: str, reshard: bool, return_experts: bool
) -> None:
    ranks(_train, parts, reshard, {"return_experts": return_experts})


def _checkpointed(parts: str) -> None:
    model = shard(build(checkpoint_experts=True), parts)
    train(model, my_half)
    assert_equal_to_alone(model.state_dict())


@pytest.mark.parametrize("parts", ["whole", "blocks"])
def test_experts_whose_activations_are_recomputed(ranks: Ranks, parts: str) -> None:
    ranks(_checkpointed, parts)


def _in_bfloat16(output_dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=output_dtype
    )
    model = shard(build(torch.float32, **options), mp_policy=policy)
    train(model, lambda step: my_half(step, torch.float32))
    # A bfloat16 has 8 bits; an update that were lost or doubled would be off by far more.
    assert_equal_to_alone(model.state_dict(), tolerance=4e-3, dtype=torch.float32)
    assert model(my_half(0, torch.float32)[0])[0].dtype == (output_dtype or torch.bfloat16)


@pytest.mark.skipif(
    torch.__version__ < (2, 10),  # 2.9 was not tried
    reason="torch 2.8 sums the ranks' gradients under `reduce_dtype`, a plain Linear's as well",
)
@pytest.mark.parametrize(
    ("output_dtype", "options"), [(None, {}), (torch.float32, {"return_experts": True})]
)
def test_mixed_precision(
    ranks: Ranks, output_dtype: torch.dtype | None, options: dict[str, Any]
) -> None:
    ranks(_in_bfloat16, output_dtype, options)


def _cast() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = shard(build(torch.float32), mp_policy=policy)
    with pytest.raises(MissingExpertLogitsError, match="return_experts"):
        loss_of(model, *my_half(0, torch.float32))


def test_outputs_that_the_policy_casts_are_refused(ranks: Ranks) -> None:
    ranks(_cast)


def _fsdp1(options: dict[str, Any], fsdp: dict[str, Any]) -> None:
    model = build(**options)
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **fsdp)
    train(sharded, my_half)
    with FullyShardedDataParallel.summon_full_params(sharded):
        state = {n: t.detach().clone() for n, t in sharded.module.state_dict().items()}
    assert_equal_to_alone(state)


@pytest.mark.parametrize("options", [{}, {"return_experts": True}], ids=str)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_trains_as_one_process(
    ranks: Ranks, options: dict[str, Any], use_orig_params: bool
) -> None:
    ranks(_fsdp1, options, {"use_orig_params": use_orig_params})


class _Pooled(nn.Module):
    """A classifier that is not the last thing to run, as in the networks that pool after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Conv2d(4, 8, 3)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x).relu()).relu()).mean((2, 3))


def _routed() -> None:
    torch.manual_seed(0)
    model = RIDEWrapper(_Pooled(), 3, num_classes=CLASSES)
    x = torch.randn(4, 3, 8, 8)
    expected = model.router_inputs(x)
    shard(model, "experts")
    register_fsdp_forward_method(model, "router_inputs")  # torch gathers in `forward` alone
    got = model.router_inputs(x)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_sharded_experts_answer_the_router(ranks: Ranks) -> None:
    ranks(_routed)


def _shared_among_experts(kind: str) -> None:
    network = adapters.KINDS[kind]()
    example = torch.randn(2, 8)
    model = RIDEWrapper(network, 3, fork_at="blocks.2", init="copy", example_input=example)
    alone = model.double().train()
    sharded = shard(copy.deepcopy(alone))
    x, y = torch.randn(8, 8, dtype=torch.float64), torch.arange(8) % 5
    half = torch.distributed.get_rank()
    experts_loss(nn.functional.cross_entropy, alone(x), y).backward()
    x, y = x.chunk(2)[half], y.chunk(2)[half]
    experts_loss(nn.functional.cross_entropy, sharded(x), y).backward()
    frozen = "blocks.3.norm.weight"
    first, *others = (expert.get_parameter(frozen) for expert in sharded.experts)
    assert all(other is first for other in others)
    assert not first.requires_grad
    got = dict(sharded.named_parameters())
    expected = dict(alone.named_parameters())
    assert got.keys() == expected.keys()
    for name, parameter in expected.items():
        if parameter.grad is None:
            assert got[name].grad is None, name
        else:
            torch.testing.assert_close(got[name].grad.full_tensor(), parameter.grad, msg=name)
    assert any(parameter.grad is not None for parameter in expected.values())


@pytest.mark.parametrize("kind", sorted(adapters.KINDS))
def test_frozen_parameters_that_experts_share(ranks: Ranks, kind: str) -> None:
    ranks(_shared_among_experts, kind)
