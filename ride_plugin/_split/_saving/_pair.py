"""A feature extractor and a classifier that are two modules, as one backbone."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from ride_plugin._checks import check_instance, refuse
from ride_plugin._errors import SplitError
from ride_plugin._split._examine import Choice, LogitsReader, check_logits_choice, describe
from ride_plugin._tree import Path


class Pair(nn.Module):
    """``classifier(feature_extractor(x))``; of an extractor's tuple, the classifier gets features.

    Args:
        feature_extractor: returns features, or something that holds them.
        classifier: takes features and returns logits, or something that holds them.
        features: where the features are in what the extractor returns: an index, a key or a
            function. None takes a tensor as it is, and the only matrix of anything else.
    """

    def __init__(
        self, feature_extractor: nn.Module, classifier: nn.Module, features: Choice = None
    ) -> None:
        super().__init__()
        check_instance(feature_extractor, "feature_extractor", nn.Module, "a torch.nn.Module")
        check_instance(classifier, "classifier", nn.Module, "a torch.nn.Module")
        check_logits_choice(features, "features")
        _check_takes_features(classifier)
        self.feature_extractor = feature_extractor
        self.classifier = classifier
        self.choice = features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the classifier returns."""
        return self.classifier(self.features_in(self.feature_extractor(*args, **kwargs)))

    def features_in(self, output: Any) -> Tensor:
        """The features in what the extractor returned.

        Raises:
            SplitError: it is not certain which they are.
        """
        chosen = LogitsReader(self.choice).entry_of(output)
        if not isinstance(chosen, Tensor):
            raise SplitError(
                f"Which part of the feature extractor's output are the features? It returned "
                f"{describe(output)}. Pass `features=`: an index, a key or a function of what it "
                "returns."
            )
        return chosen

    def place_of_features(self, output: Any) -> Path | None:
        """Where the features lie in what the extractor returned; None if that is not known."""
        return LogitsReader(self.choice).place_in(output)


def _check_takes_features(classifier: nn.Module) -> None:
    """Raise ArgumentError where a classifier's forward cannot be called with features alone."""
    try:
        taken = signature(classifier.forward)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        taken.bind(None)
    except TypeError as error:
        refuse(
            "classifier",
            "callable with the features alone, `classifier(features)`",
            classifier,
            f"Its forward takes {taken} ({error}). Give the others defaults.",
        )
