"""Stacks over two ranks: what they share among them, and accelerate's own FSDP."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.coverage.environment import let_torchvision_import
from ride_plugin import DiversityLoss, experts_loss
from ride_plugin.longtail import ClassBalancedSampler
from tests.distributed.ranks import Ranks
from tests.distributed.training import COUNTS, assert_equal_to_alone, build, my_half, optimizer_for

pytestmark = pytest.mark.slow

LABELS = np.repeat(range(5), [40, 20, 10, 6, 4])  # 80 images


def needs(package: str) -> Any:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package} is not installed")


def epochs_of(loader: Any, number: int = 2) -> list[list[int]]:
    return [[int(i) for (batch,) in loader for i in batch] for _ in range(number)]


def _accelerate(whole: bool, dispatch: bool) -> tuple[list[list[int]], list[str]]:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    config = DataLoaderConfiguration(dispatch_batches=dispatch)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    place = {"num_replicas": 1, "rank": 0} if whole else {}
    sampler = ClassBalancedSampler(LABELS, **place)
    data = TensorDataset(torch.arange(len(LABELS)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = accelerator.prepare(DataLoader(data, batch_size=4, sampler=sampler))
        drawn = epochs_of(loader)
    return drawn, [str(w.message) for w in caught if "ClassBalancedSampler" in str(w.message)]


@needs("accelerate")
@pytest.mark.parametrize("dispatch", [False, True])
def test_accelerate_shares_a_whole_draw(ranks: Ranks, dispatch: bool) -> None:
    (first, said), (second, _) = ranks(_accelerate, True, dispatch)
    assert said == []
    for epoch in range(2):
        counts = np.bincount(LABELS[[*first[epoch], *second[epoch]]])
        assert counts.tolist() == [16] * 5
    assert first[0] != first[1]  # the epoch reaches the sampler


@needs("accelerate")
@pytest.mark.parametrize("dispatch", [False, True])
def test_accelerate_that_shares_a_second_time_is_warned_of(ranks: Ranks, dispatch: bool) -> None:
    (first, said), (second, _) = ranks(_accelerate, False, dispatch)
    assert len(first[0]) + len(second[0]) == len(LABELS) // 2
    assert "among 2 ranks" in said[0]
    assert "`num_replicas=1, rank=0`" in said[0]


def _lightning() -> list[list[int]]:
    let_torchvision_import()
    import lightning
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    seen: list[list[int]] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def on_train_epoch_start(self) -> None:
            seen.append([])

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            seen[-1].extend(batch[0].tolist())
            return self.layer(batch[0].float()[:, None]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    sampler = ClassBalancedSampler(LABELS)
    data = TensorDataset(torch.arange(len(LABELS)))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        plugins=[TorchElasticEnvironment()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ClassBalancedSampler")
        trainer.fit(Module(), DataLoader(data, batch_size=4, sampler=sampler))
    return seen


@needs("lightning")
def test_lightning_leaves_the_sampler_as_it_is_and_tells_it_the_epoch(ranks: Ranks) -> None:
    first, second = ranks(_lightning)
    for epoch in range(2):
        counts = np.bincount(LABELS[[*first[epoch], *second[epoch]]])
        assert counts.tolist() == [16] * 5
    assert first[0] != first[1]


def _accelerator(version: int, **options: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(True)
    os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"], state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False, **options,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Without an accelerator it stays with plain data parallelism; its FSDP runs on the CPU as well,
    # the first one if the device has no number.
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device("cpu")
    return accelerator


def _fit(accelerator: Any, model: Any, optimizer: Any, steps: int) -> None:
    diversity = DiversityLoss(COUNTS)
    for step in range(steps):
        x, y = my_half(step)
        output = model(x)
        loss = experts_loss(nn.functional.cross_entropy, output, y) + diversity(output, y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()


def _accelerate_fsdp2(return_experts: Any) -> None:
    accelerator = _accelerator(2)
    model = build(return_experts=return_experts)
    model, optimizer = accelerator.prepare(model, optimizer_for(model))
    assert any(type(p).__name__ == "DTensor" for p in model.parameters())
    _fit(accelerator, model, optimizer, 2)
    assert_equal_to_alone(model.state_dict())


@needs("accelerate")
@pytest.mark.parametrize("return_experts", [False, "training"])
def test_accelerates_fsdp2_trains_as_one_process(ranks: Ranks, return_experts: Any) -> None:
    ranks(_accelerate_fsdp2, return_experts)


def _accelerate_fsdp1(use_orig_params: bool, together: bool) -> list[str]:
    accelerator = _accelerator(1, use_orig_params=use_orig_params)
    model: Any = build(return_experts="training")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    if together:
        model, optimizer = accelerator.prepare(model, optimizer_for(model))
    else:
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer_for(model))
    trains = use_orig_params or not together
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(accelerator, model.train(), optimizer, 2 if trains else 4)
        with FullyShardedDataParallel.summon_full_params(model):
            state = {
                name.replace("_fsdp_wrapped_module.", ""): value.detach().clone()
                for name, value in model.named_parameters()
            }
        model.eval()(my_half(0)[0])
    if trains:
        assert_equal_to_alone(state)
    else:
        assert all(torch.equal(state[name], value) for name, value in start.items())
    return [str(w.message) for w in caught if "training passes" in str(w.message)]


@needs("accelerate")
@pytest.mark.parametrize(
    ("use_orig_params", "together"), [(True, True), (True, False), (False, False)]
)
def test_accelerates_fsdp1_trains_as_one_process(
    ranks: Ranks, use_orig_params: bool, together: bool
) -> None:
    assert ranks(_accelerate_fsdp1, use_orig_params, together) == [[], []]


@needs("accelerate")
def test_accelerates_fsdp1_that_trains_nothing_is_noticed(ranks: Ranks) -> None:
    """By default the prepared optimizer holds what FSDP1 has replaced, with any model."""
    for (said,) in ranks(_accelerate_fsdp1, False, True):
        assert "`use_orig_params=True`" in said
