"""peft's adapters on a transformers model, and safetensors; skipped where they are absent.

Run them after ``pip install -c constraints.txt torch==2.13.0 peft transformers safetensors``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from ride_plugin import ReplayError, RIDEWrapper, expert_logits, experts_loss  # noqa: E402
from ride_plugin.routing import TrunkState  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=7,
    )  # fmt: skip
    network: torch.nn.Module
    network = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    return network


def wrapped(**options: object) -> RIDEWrapper:
    adapted = peft.get_peft_model(
        bert(),
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"], **options),
    )
    fork_at = "base_model.model.bert.encoder.layer.2"
    return RIDEWrapper(
        adapted, 3, fork_at=fork_at, init="copy", example_input=batch(2), logits="logits"
    )


def batch(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, 10))
    mask = torch.ones_like(ids)
    mask[1:, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_lora_makes_experts_for_the_price_of_adapters(options: dict[str, object]) -> None:
    model = wrapped(**options)
    layer = "base_model.model.bert.encoder.layer.3.attention.self.query"
    first, second, _ = (expert.get_submodule(layer) for expert in model.experts)
    assert first.base_layer.weight is second.base_layer.weight
    assert not torch.equal(first.lora_A.default.weight, second.lora_A.default.weight)
    assert f"{layer}.lora_A.default.weight" in model.redrawn_parameters
    assert not first.lora_B.default.weight.any()
    heads = model.classifiers
    assert heads[0].weight is not heads[1].weight


def test_what_trains_is_at_most_two_percent_of_the_model() -> None:
    """As for the sentence encoder of benchmarks/adapters, where rank 5 is 1.7 % (rank 8: 2.2 %)."""
    config = transformers.BertConfig(
        vocab_size=2000, hidden_size=128, num_hidden_layers=12, num_attention_heads=2,
        intermediate_size=512, max_position_embeddings=16, num_labels=20,
    )  # fmt: skip
    network = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = RIDEWrapper(
        peft.get_peft_model(network, config),
        3,
        init="copy",
        example_input=batch(2),
        logits="logits",
    )
    trains = sum(tensor.numel() for tensor in model.trainable_state_dict().values())
    assert 0 < trains <= 0.02 * sum(p.numel() for p in model.parameters())


def test_states_and_adapters_go_to_disk(tmp_path: Path) -> None:
    model, other = wrapped(), wrapped()
    model.trunk.requires_grad_(False)
    inputs = batch(6)
    with model.evaluating():
        torch.save(model.run_trunk(**inputs), tmp_path / "trunk.pt")
    state = torch.load(tmp_path / "trunk.pt", weights_only=True)
    assert isinstance(state, TrunkState)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    experts_loss(
        torch.nn.functional.cross_entropy, model.train()(state), torch.arange(6)
    ).backward()
    optimizer.step()
    model.eval()
    torch.testing.assert_close(model(state), model(**inputs))

    adapters = model.trainable_state_dict()
    safetensors_torch.save_file(adapters, tmp_path / "adapters.safetensors")
    other.trunk.requires_grad_(False)
    other.load_trainable_state_dict(safetensors_torch.load_file(tmp_path / "adapters.safetensors"))
    torch.testing.assert_close(other.eval()(**inputs), model(**inputs))

    safetensors_torch.save_model(model, str(tmp_path / "model.safetensors"))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * size + 40_000
    for load in (
        lambda m, file: safetensors_torch.load_model(m, file),
        lambda m, file: m.load_state_dict(safetensors_torch.load_file(file)),
    ):
        again = wrapped().eval()
        load(again, str(tmp_path / "model.safetensors"))
        torch.testing.assert_close(again(**inputs), model(**inputs))


@pytest.mark.parametrize("method", ["VeraConfig", "RandLoraConfig", "LoHaConfig", "IA3Config"])
def test_methods_that_share_matrices_between_layers_and_others(method: str) -> None:
    options = {"feedforward_modules": []} if method == "IA3Config" else {}
    kind = getattr(peft, method)
    adapted = peft.get_peft_model(
        bert(), kind(task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    ).eval()
    model = RIDEWrapper(adapted, 2, init="copy", example_input=batch(2), logits="logits").eval()
    theirs = dict(adapted.named_parameters())
    with torch.no_grad():
        for expert in model.experts:
            for name, parameter in expert.named_parameters():
                parameter.copy_(theirs[name])  # the classifier and what was drawn anew
        x = batch(3)
        experts = expert_logits(model(**x))
        assert torch.equal(experts, adapted(**x).logits[:, None].expand_as(experts))
    model.train()
    experts_loss(torch.nn.CrossEntropyLoss(), model(**x), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapters_are_merged_in_a_copy_of_one_expert() -> None:
    model, x = wrapped().eval(), batch(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = expert_logits(model(**x))
        plain = model.to_module(1)
        plain.merge_adapter()
        torch.testing.assert_close(plain(**x).logits, expected[:, 1])
        torch.testing.assert_close(expert_logits(model(**x)), expected)
        for part in (model.trunk, *model.experts):
            part.merge_adapter()
        with pytest.raises(ReplayError, match="one tensor for all experts"):
            model(**x)
        for part in (model.trunk, *model.experts):
            part.unmerge_adapter()
        torch.testing.assert_close(expert_logits(model(**x)), expected)
