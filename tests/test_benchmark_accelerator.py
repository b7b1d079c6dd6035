"""The benchmark for accelerators, rehearsed on the processor."""

import torch

from benchmarks.speed import accelerator, timing

CPU = torch.device("cpu")


def test_a_rehearsal_measures_every_row(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(accelerator, "SHARES", accelerator.SHARES[:1])
    sizes = {"small": (accelerator.resnet32, 2, 32, 100)}
    steps = list(accelerator.training(CPU, ("eager",), sizes))
    calls = list(accelerator.inference(CPU, ("eager",), (2,)))
    assert [row[1] for row in steps] == ["eager, float32", "eager, bfloat16"]
    assert len(calls) == 2 * 3  # precisions and ways
    for row in steps + calls:
        assert float(row[2].split()[0]) > 0
        assert row[4] > 100  # operations of one call
    shares = [float(row[5]) for row in steps]
    assert 0 < shares[0] < 3
    assert shares[1] > 0  # without instructions for bfloat16 its matrix product is no peak


def test_a_step_learns_and_counts_its_operations():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    losses = []

    def loss(out):
        losses.append(torch.nn.functional.cross_entropy(out, y))
        return losses[-1]

    run = accelerator.step(model, loss, x, False)
    for _ in range(50):
        run()
    assert losses[-1] < losses[0]
    assert accelerator.launches(lambda: x + 1, CPU) == 1
