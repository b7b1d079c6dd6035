"""The library's own hooks: they see a classifier however it is called, and go without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, expert_logits
from tests.naive import train_both


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.late(input=torch.relu(self.stem(input=x))))
        logits: Tensor = self.fc(input=features)
        return logits


def test_a_classifier_that_is_called_by_keyword_is_seen_to_run() -> None:
    net = ByKeyword()
    model = RIDEWrapper(net, 3, fork_at="late", init="copy")
    assert model.feature_dim == 8
    x = torch.randn(5, 6)
    got = model.eval().router_inputs(x)
    for index, plain in enumerate(model.to_modules()):
        torch.testing.assert_close(got.expert_logits[:, index], plain(x))
        features = torch.relu(plain.late(torch.relu(plain.stem(x))))
        torch.testing.assert_close(got.expert_features[:, index], features)
    train_both(net, model, [torch.randn(5, 6) for _ in range(2)])


def test_a_replaced_classifier_that_is_called_by_keyword_is_seen_to_run() -> None:
    model = RIDEWrapper(ByKeyword(), 2, fork_at="late", num_classes=7)
    assert expert_logits(model(torch.randn(5, 6))).shape == (5, 2, 7)
    for expert in model.experts:
        expert.fc = nn.Linear(8, 7)
    assert expert_logits(model(torch.randn(5, 6))).shape == (5, 2, 7)


def test_a_hook_that_somebody_moved_to_another_module_still_sees_keywords() -> None:
    """As torch's quantization does, which registers it there as a plain one."""
    model = RIDEWrapper(ByKeyword(), 2, fork_at="late")
    x = torch.randn(5, 6)
    wanted = model(x)
    for expert in model.experts:
        other = nn.Linear(8, 4)
        other.load_state_dict(expert.fc.state_dict())
        for hook in expert.fc._forward_pre_hooks.values():
            other.register_forward_pre_hook(hook)
        expert.fc = other
    torch.testing.assert_close(model(x), wanted)
    for expert in model.experts:
        hooks = [type(hook).__name__ for hook in expert.fc._forward_pre_hooks.values()]
        assert hooks.count("FeatureHook") == 1


def test_nothing_of_a_hook_stays_on_a_plain_module() -> None:
    """Torch notes by a hook's number how it is called, and another may get that number."""
    model = RIDEWrapper(ByKeyword(), 2, fork_at="late")
    for part in model.to_module(1).modules():
        assert not any(value for name, value in vars(part).items() if "hooks" in name)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.third, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.third(self.second(self.first(x)).relu()).relu())


@pytest.mark.parametrize("path", ["trunk.second", "experts.1.third", "experts.0.fc"])
def test_a_submodule_that_was_removed_is_named(path: str) -> None:
    model, x = RIDEWrapper(Named(), 2, fork_at="third"), torch.randn(2, 4)
    parent, _, name = path.rpartition(".")
    message = f"Submodule `{name}` of a Named was removed, or set to None"
    holder = model.get_submodule(parent)
    setattr(holder, name, None)
    with pytest.raises(ReplayError, match=message):
        model(x)
    setattr(holder, name, nn.Linear(6, 3 if name == "fc" else 6))
    assert model(x).shape == (2, 3)
    delattr(holder, name)
    with pytest.raises(ReplayError, match=message):
        model(x)
