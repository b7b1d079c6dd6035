"""What is compared, each method as a few fields; nothing here runs anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Diversity = Literal["paper", "official", "bounded"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        loss: the criterion, applied to each expert by itself.
        num_experts: 0 for the plain backbone.
        diversity: form of the diversity term, or None for the ablation without it; "bounded" is the
            paper's with a capped reward, see `benchmarks.cifar.terms`.
        expert_width: share of the channels that an expert keeps.
        cosine: cosine classifiers times 30, as LDAM needs; the others have a linear classifier.
        mixup: parameter of the Beta distribution; 0 for none.
        adjustments: logit adjustment of each expert, in units of the log prior.
        teacher: method whose run distils into this one.
        collaborative: every expert is distilled from the mean of all, held constant.
        views: "weak" is crop, flip and rotation, "strong" AutoAugment's policy; with "both" every
            image comes in either, and the strong one is distilled from the weak one.
        depths: experts look at features of different depths, see `benchmarks.cifar.depths`.
        starts_from: method whose finished model this one starts from; it trains no first stage.
        classifiers: what happens to that model's classifiers.
        fork_at: where experts begin; None for where the library forks.
        channels: of the backbone's first layer; 16 is ResNet-32.
        other: another library's form of the plain backbone, see `benchmarks.cifar.others`.
    """

    loss: Literal["ce", "ldam_drw", "balanced_softmax", "adjusted"] = "ce"
    num_experts: int = 0
    diversity: Diversity | None = None
    expert_width: float = 0.75
    cosine: bool = False
    mixup: float = 0.0
    adjustments: tuple[float, ...] = ()
    teacher: str | None = None
    collaborative: bool = False
    views: Literal["weak", "strong", "both"] = "weak"
    depths: bool = False
    starts_from: str | None = None
    classifiers: Literal["crt", "tau_norm"] | None = None
    fork_at: str | None = None
    channels: int = 16
    other: Literal["earlyon", "packed", "batch"] | None = None

    @property
    def words(self) -> str:
        """The method as figures name it."""
        said = [_CRITERIA[self.loss]]
        if self.num_experts == 0:
            said.insert(0, "plain")
        else:
            width = "full width" if self.expert_width == 1 else f"{self.expert_width:g} width"
            experts = "experts" if self.num_experts > 1 else "expert"
            said.insert(0, f"{self.num_experts} {experts}, {width}")
        if len(set(self.adjustments)) > 1:
            said.append("priors " + ", ".join(f"{tau:g}" for tau in self.adjustments))
        if self.cosine and self.loss != "ldam_drw":
            said.append("cosine")
        if self.mixup:
            said.append("mixup")
        if self.num_experts and self.diversity is not None:
            said.append(f"diversity ({self.diversity})")
        if self.teacher is not None:
            said.append("distilled")
        if self.collaborative:
            said.append("collaborative distillation")
        if self.views != "weak":
            said.append({"strong": "AutoAugment", "both": "consistency of two views"}[self.views])
        if self.depths:
            said.append("different depths")
        if self.classifiers is not None:
            said.append({"crt": "cRT", "tau_norm": "tau-normalised"}[self.classifiers])
        if self.fork_at is not None:
            said.append(f"forked at {self.fork_at}")
        if self.channels != 16:
            said.append(f"{self.channels} to {4 * self.channels} channels")
        if self.other is not None:
            said.append(_OTHERS[self.other])
        return ", ".join(said)


_OTHERS = {
    "earlyon": "early exit of earlyon",
    "packed": "Packed-Ensemble of 4",
    "batch": "BatchEnsemble of 4",
}
_CRITERIA = {
    "ce": "cross entropy",
    "ldam_drw": "LDAM-DRW",
    "balanced_softmax": "balanced softmax",
    "adjusted": "balanced softmax",
}


def _ride(num_experts: int, diversity: Diversity | None, **more: object) -> Method:
    return Method("ldam_drw", num_experts, diversity, cosine=True, **more)  # type: ignore[arg-type]


def _adjusted(
    adjustments: tuple[float, ...] = (1.0, 0.0, 2.0),
    diversity: Diversity | None = None,
    **more: object,
) -> Method:
    options = {"num_experts": 3, "cosine": True, "adjustments": adjustments, **more}
    return Method("adjusted", diversity=diversity, **options)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "ce": Method(),
    "ldam_drw": Method("ldam_drw", cosine=True),
    "balanced_softmax": Method("balanced_softmax"),
    "balanced_softmax_cosine": Method("balanced_softmax", cosine=True),
    "balanced_softmax_narrow": _adjusted((1.0,), num_experts=1),
    "balanced_softmax_wide": Method("balanced_softmax", cosine=True, channels=20),
    "balanced_softmax_mixup": Method("balanced_softmax", cosine=True, mixup=0.4),
    "balanced_softmax_strong": Method("balanced_softmax", cosine=True, views="strong"),
    "balanced_softmax_earlyon": Method("balanced_softmax", other="earlyon"),
    "balanced_softmax_packed": Method("balanced_softmax", other="packed"),
    "balanced_softmax_batch": Method("balanced_softmax", other="batch"),
    "crt": Method(starts_from="ce", classifiers="crt"),
    "tau_norm": Method(starts_from="ce", classifiers="tau_norm"),
    "ride2_official": _ride(2, "official"),
    "ride3_official": _ride(3, "official"),
    "ride3_paper": _ride(3, "paper"),
    "ride3_bounded": _ride(3, "bounded"),
    "ride3_no_diversity": _ride(3, None),
    "ride3_full_width": _ride(3, "official", expert_width=1.0),
    "ride4_official": _ride(4, "official"),
    "ride6_official": _ride(6, "official"),
    "ride4_distilled": _ride(4, "official", teacher="ride6_official"),
    "ride3_ce_no_diversity": Method("ce", 3),
    "ride3_ce_paper": Method("ce", 3, "paper"),
    "ride3_ce_official": Method("ce", 3, "official"),
    "ride3_crt": Method("ce", 3, starts_from="ride3_ce_no_diversity", classifiers="crt"),
    "ride3_tau_norm": Method("ce", 3, starts_from="ride3_ce_no_diversity", classifiers="tau_norm"),
    "ride3_balanced": _adjusted((1.0, 1.0, 1.0)),
    "ride3_balanced_linear": _adjusted((1.0, 1.0, 1.0), cosine=False),
    "ride3_balanced_linear_official": _adjusted((1.0, 1.0, 1.0), "official", cosine=False),
    "ride3_balanced_official": _adjusted((1.0, 1.0, 1.0), "official"),
    "ride3_balanced_bounded": _adjusted((1.0, 1.0, 1.0), "bounded"),
    "ride3_balanced_official_strong": _adjusted((1.0, 1.0, 1.0), "official", views="strong"),
    "ride3_balanced_official_views": _adjusted((1.0, 1.0, 1.0), "official", views="both"),
    "ride3_balanced_official_depths": _adjusted((1.0, 1.0, 1.0), "official", depths=True),
    "ride3_balanced_full_width": _adjusted((1.0, 1.0, 1.0), expert_width=1.0),
    "three_networks": _adjusted((1.0, 1.0, 1.0), expert_width=1.0, fork_at="conv1"),
    "ride3_balanced_collaborative": _adjusted((1.0, 1.0, 1.0), collaborative=True),
    "ride3_adjusted": _adjusted(),
    "ride3_adjusted_mixup": _adjusted(mixup=0.3),
    "ride3_adjusted_strong": _adjusted(views="strong"),
    "ride3_adjusted_strong_full_width": _adjusted(views="strong", expert_width=1.0),
    "ride3_adjusted_mixup_full_width": _adjusted(mixup=0.4, expert_width=1.0),
    "ride3_adjusted_paper": _adjusted(diversity="paper"),
}
"""RIDE follows the authors: LDAM with deferred re-weighting on cosine classifiers, diversity weight
0.45, width 3/4. The ``ce`` rows have cross entropy and linear classifiers; the balanced rows have
balanced softmax, on cosine classifiers unless they say linear; the adjusted rows give each expert a
logit adjustment of its own, whose difference takes the place of the diversity term. With one, the
term reads adjusted logits: experts for different priors disagree without bound. The balanced expert
comes first: early exits end there."""
