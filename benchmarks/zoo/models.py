"""A dozen backbones as people write them; each is hard to split in a way of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .images import (
    AuxiliaryHeads,
    DropPathDict,
    FeaturesAndClassifier,
    LateClassToken,
    resnet32_option_a,
)
from .other_inputs import AudioConvNet, SetNetwork, TextLSTM, TwoInputs, convnet_3d
from .stateful import ControlFlow, FrozenStem, KeepsFeatures

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cifar_resnet32_option_a": (
        resnet32_option_a,
        "closures as shortcuts, normalised head",
    ),
    "features_and_classifier": (FeaturesAndClassifier, "two networks in a ModuleDict"),
    "auxiliary_heads": (AuxiliaryHeads, "auxiliary heads in training only"),
    "drop_path_dict": (DropPathDict, "stochastic depth and dropout, dict output"),
    "two_inputs": (TwoInputs, "two inputs, skip over the fork, dataclass output"),
    "late_class_token": (LateClassToken, "class token after the fork, tied parameters"),
    "control_flow": (ControlFlow, "data-dependent control flow, activation checkpointing"),
    "frozen_stem": (FrozenStem, "frozen BatchNorm, buffers not saved, cached grid, counter"),
    "keeps_features": (KeepsFeatures, "kept activations, in-place writes, shared ReLU"),
    "text_lstm": (TextLSTM, "recurrent, tuples between layers"),
    "audio_convnet": (AudioConvNet, "1-D, ModuleLists walked in step"),
    "convnet_3d": (convnet_3d, "3-D, all in one Sequential"),
    "set_network": (SetNetwork, "elements folded into the batch"),
}
"""Name -> (constructor, what is hard about it)."""
