"""Hugging Face's own Trainer: what it saves, resumes, predicts and checkpoints is what is meant."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not all(map(importlib.util.find_spec, ("transformers", "accelerate"))):
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from ride_plugin import ArgumentError, RIDELoss, RIDEModule, RIDEWrapper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

COUNTS = [20, 8, 4]


def rows(number: int = 24) -> list[dict[str, Any]]:
    source = torch.Generator().manual_seed(0)
    words = torch.randint(1, 30, (number, 6), generator=source)
    return [{"input_ids": w.tolist(), "labels": i % 3} for i, w in enumerate(words)]


def module(**options: Any) -> RIDEModule:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    example = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    options = {"example_input": example, "logits": "logits", **options}
    model = RIDEWrapper(BertForSequenceClassification(config), 2, **options)
    return RIDEModule(model, RIDELoss(nn.CrossEntropyLoss(), COUNTS))


class EndOfEpoch(TrainerCallback):
    def on_epoch_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        model.criterion.step()


def trainer(folder: Path, one: RIDEModule, **options: Any) -> transformers.Trainer:
    chosen = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    } | options
    arguments = transformers.TrainingArguments(output_dir=str(folder), **chosen)
    return transformers.Trainer(
        one, arguments, train_dataset=rows(), eval_dataset=rows(13), callbacks=[EndOfEpoch()]
    )


def test_what_is_resumed_ends_where_an_unbroken_run_ends(tmp_path: Path) -> None:
    whole = module()
    trainer(tmp_path / "whole", whole).train()
    again = module()
    resumed = trainer(tmp_path / "again", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))  # of two epochs
    assert resumed.state.epoch == 3
    assert again.criterion.diversity.schedule.last_epoch == 3
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_a_checkpoint_is_a_safetensors_file_that_holds_everything(tmp_path: Path) -> None:
    one = module()
    trainer(tmp_path, one, num_train_epochs=1).train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == one.state_dict().keys()
    other = module()
    other.load_state_dict(saved)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


def test_every_row_is_predicted_once_and_in_order(tmp_path: Path) -> None:
    one = module()
    predicted = trainer(tmp_path, one, per_device_eval_batch_size=4).predict(rows(13))
    assert predicted.predictions.shape == (13, 3)
    assert predicted.label_ids.tolist() == [i % 3 for i in range(13)]
    ids = torch.tensor([row["input_ids"] for row in rows(13)])
    with torch.no_grad():
        expected = one.eval()(input_ids=ids)["logits"]
        loss = nn.functional.cross_entropy(expected, torch.arange(13) % 3)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected)
    last_rows_count_less = predicted.metrics["test_loss"]
    assert last_rows_count_less == pytest.approx(float(loss), abs=1e-5)


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain, checkpointed = module(), module()
    trainer(tmp_path / "plain", plain, num_train_epochs=1).train()
    other = trainer(
        tmp_path / "checkpointed", checkpointed, num_train_epochs=1, gradient_checkpointing=True
    )
    other.train()
    assert checkpointed.model.checkpoint_experts
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], value, msg=name)


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path) -> None:
    large, small = module(), module()
    trainer(tmp_path / "large", large, num_train_epochs=1, optim="sgd").train()
    trainer(
        tmp_path / "small", small, num_train_epochs=1, optim="sgd",
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    ).train()  # fmt: skip
    for name, value in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_trainers_own_label_smoothing_is_refused_with_the_way_to_write_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(ArgumentError, match=r"RIDELoss\(nn.CrossEntropyLoss\(label_smoothing"):
        trainer(tmp_path, module(), label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("return_experts", [False, "training"])
def test_bfloat16(tmp_path: Path, return_experts: Any) -> None:
    one = module(return_experts=return_experts)
    before = {name: value.clone() for name, value in one.named_parameters()}
    trainer(tmp_path, one, num_train_epochs=1, bf16=True).train()
    still = [name for name, value in one.named_parameters() if torch.equal(value, before[name])]
    assert still == []
