"""FSDP2, each expert a group: ``torchrun --nproc-per-node 2 examples/stacks/torchrun_fsdp2.py``."""

import torch
import torch.distributed as dist
from _shared import accuracy, backbone, digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from ride_plugin import RIDELoss, RIDEWrapper  # RIDE


def main(epochs: int = 10) -> float:
    """Train on all ranks and return the test accuracy in per cent."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train, test, class_counts = digits()
    sampler = DistributedSampler(train.dataset)
    train = DataLoader(train.dataset, 32, sampler=sampler)
    model = backbone()
    model = RIDEWrapper(model, num_experts=3)  # RIDE
    for expert in model.experts:  # RIDE
        fully_shard(expert, mesh=mesh)  # RIDE
    fully_shard(model, mesh=mesh)
    criterion = nn.CrossEntropyLoss()
    criterion = RIDELoss(criterion, class_counts)  # RIDE
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        model.train()
        sampler.set_epoch(epoch)
        for x, y in train:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return accuracy(model, test)


if __name__ == "__main__":
    result = main()
    if dist.get_rank() == 0:
        print(f"{result:.1f} %")
    dist.destroy_process_group()
