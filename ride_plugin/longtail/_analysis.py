"""The whole report of a multi-expert model in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ride_plugin._checks import (
    ClassCounts,
    Numbers,
    as_cpu_tensor,
    as_indices,
    as_labels,
    check_class_counts,
    warn_of_probabilities,
)
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin.functional import running_means
from ride_plugin.longtail._calibration_error import expected_calibration_error
from ride_plugin.longtail._shots import ShotReport, shot_report
from ride_plugin.longtail._splits import (
    SPLITS,
    BySplit,
    by_split,
    masks_by_split,
    mean_by_split,
    shot_groups,
    shown,
)

_CHUNK_BYTES = 1024 * 1024  # logits that are worked on at a time: they stay in a core's cache


@dataclass(frozen=True)
class Analysis:
    """What a paper reports of a multi-expert model. Print it for a table.

    Every :class:`BySplit` is a mean over samples, overall and by shot.

    Attributes:
        report: accuracy overall, by shot and by class, of the prediction described below.
        calibration_error: expected calibration error of that prediction.
        expert_accuracy: accuracy of each expert alone, a tuple of E.
        disagreement: share of pairs of experts whose predicted classes differ; None for E = 1.
        kl: KL(p_i || p_j), mean over ordered pairs of experts, in nats; infinite where an expert
            excludes (logit -inf) a class that another does not; None for E = 1.
        num_experts_used: mean number of experts used; E where the model was not routed.
    """

    report: ShotReport
    calibration_error: BySplit
    expert_accuracy: tuple[BySplit, ...]
    disagreement: BySplit | None
    kl: BySplit | None
    num_experts_used: BySplit

    def __str__(self) -> str:
        top1 = BySplit(self.report.overall, self.report.many, self.report.medium, self.report.few)
        rows = [("top-1", top1), ("calibration error", self.calibration_error)]
        rows += [(f"expert {i} top-1", value) for i, value in enumerate(self.expert_accuracy)]
        if self.disagreement is not None and self.kl is not None:
            rows += [("expert disagreement", self.disagreement), ("expert KL (nats)", self.kl)]
        rows.append(("experts used", self.num_experts_used))
        lines = [f"{'':<20}" + "".join(f"{name:>9}" for name in ("overall", *SPLITS))]
        lines += [f"{name:<20}" + "".join(f"{shown(v):>9}" for v in row) for name, row in rows]
        return "\n".join(lines)


def analyze(
    expert_logits: Tensor,
    target: Numbers,
    class_counts: ClassCounts,
    *,
    num_experts_used: Numbers | None = None,
    many: float = 100,
    few: float = 20,
    num_bins: int = 15,
) -> Analysis:
    r"""Report accuracy, calibration, experts' agreement and routing, overall and by shot.

    The prediction is the mean of the experts' logits: of all E, or, with ``num_experts_used``, of
    each sample's first k, which is what routed inference returns. The logits are gone through in
    small parts, so that no second copy of them is made. Under ``torch.distributed`` it
    is the report of this rank's samples: gather the logits for one of all.

    Args:
        expert_logits: ``[N, E, C]``.
        target: ``[N]`` true classes.
        class_counts: **training** images per class, ``[C]``, positive.
        num_experts_used: ``[N]`` integers 1 .. E, from routed inference.
        many: see :func:`shot_report`.
        few: see :func:`shot_report`.
        num_bins: of the calibration error; see :func:`expected_calibration_error`.

    Returns:
        An :class:`Analysis`.

    Raises:
        ArgumentError: shapes do not fit, a label is out of range, or the logits hold NaN.

    Warns:
        UserWarning: the logits are probabilities, as far as can be told.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
        >>> print(analyze(logits, [0, 1], [150, 30]))
                              overall     many   medium      few
        top-1                   0.500    1.000    0.000   absent
        calibration error       0.288    0.076    0.500   absent
        expert 0 top-1          1.000    1.000    1.000   absent
        expert 1 top-1          0.500    1.000    0.000   absent
        expert disagreement     0.500    0.000    1.000   absent
        expert KL (nats)        0.249    0.036    0.462   absent
        experts used            2.000    2.000    2.000   absent
    """
    counts = check_class_counts(class_counts)
    labels = as_labels(target, "target", len(counts))
    logits = as_cpu_tensor(expert_logits, "expert_logits")
    _check_expert_logits(logits, len(labels), len(counts))
    warn_of_probabilities(logits, "expert_logits")
    num_experts = logits.shape[1]
    if num_experts_used is None:
        used = torch.full_like(labels, num_experts)
    else:
        used = _check_used(num_experts_used, len(labels), num_experts)

    rows = max(1, _CHUNK_BYTES // max(1, logits[0].nbytes))
    chunks = [_measure(*c) for c in zip(logits.split(rows), used.split(rows), strict=True)]
    found = _Measured(*map(torch.cat, zip(*chunks, strict=True)))
    _check_values(found.usable)

    groups = shot_groups(counts, many, few)[labels.numpy()]
    confidence, correct = found.confidence.numpy(), (found.predicted == labels).numpy()
    errors = [
        expected_calibration_error(confidence[mask], correct[mask], num_bins)
        if mask.any()
        else None
        for mask in masks_by_split(groups)
    ]
    right = (found.choices == labels[:, None]).numpy()
    pairs = num_experts > 1
    return Analysis(
        # As everything else here, of the samples given; one rank may call this by itself.
        report=shot_report(found.predicted, labels, counts, many=many, few=few, over_ranks=False),
        calibration_error=by_split(errors),
        expert_accuracy=tuple(mean_by_split(right[:, i], groups) for i in range(num_experts)),
        disagreement=mean_by_split(found.disagreement.float().numpy(), groups) if pairs else None,
        kl=mean_by_split(found.kl.numpy(), groups) if pairs else None,
        num_experts_used=mean_by_split(used.numpy(), groups),
    )


class _Measured(NamedTuple):
    """What is kept of each sample.

    Attributes:
        usable: ``[N]``, whether each expert's largest logit is finite.
        choices: ``[N, E]``, each expert's class.
        predicted: ``[N]``, the class that the experts used predict together.
        confidence: ``[N]``, its probability.
        disagreement: ``[N]``, share of pairs of experts whose classes differ.
        kl: ``[N]``, see `mean_kl_of_pairs`.
    """

    usable: Tensor
    choices: Tensor
    predicted: Tensor
    confidence: Tensor
    disagreement: Tensor
    kl: Tensor


def _measure(logits: Tensor, used: Tensor) -> _Measured:
    logits = float32_or_better(logits)
    choices = _argmax(logits)
    # The largest logit is NaN if one is, +inf if one is, and -inf only if all classes are masked.
    usable = logits.gather(2, choices[:, :, None]).isfinite().all(1)[:, 0]
    routed = running_means(logits)[torch.arange(len(used), device=used.device), used - 1]
    predicted = _argmax(routed)
    confidence = routed.softmax(1).amax(1)
    pairs = max(logits.shape[1] * (logits.shape[1] - 1), 1)
    differ = (choices[:, :, None] != choices[:, None, :]).sum((1, 2)).float() / pairs
    return _Measured(usable, choices, predicted, confidence, differ, mean_kl_of_pairs(logits))


def _argmax(values: Tensor) -> Tensor:
    return torch.from_numpy(values.numpy().argmax(-1))  # three times as fast as torch's


def mean_kl_of_pairs(expert_logits: Tensor) -> Tensor:
    r"""Mean of KL(p_i || p_j) over ordered pairs of experts, ``[N, E, C]`` -> ``[N]``.

    $$\frac{1}{E (E - 1)} \sum_i \sum_{j \ne i} \sum_c p_{ic} (\log p_{ic} - \log p_{jc})
    = \frac{1}{E - 1} \sum_i \sum_c (p_{ic} - \bar p_c)
    (\log p_{ic} - \overline{\log p}_c)$$

    The right side is computed: it needs no loop over pairs, and it cancels no digits where experts
    are close. `functional.pairwise_kl` is E times as large and is a loss, with a gradient. Here a
    class that only some experts mask (logit -inf) makes the mean infinite, as the equation says.
    """
    log_p = expert_logits.log_softmax(2)
    p = log_p.exp()
    # A class that all experts mask has no probability in any, and adds nothing.
    masked = log_p.isneginf() if bool(log_p.amin().isneginf()) else None
    if masked is not None:
        log_p.masked_fill_(masked, 0.0)
    log_p -= log_p.mean(dim=1, keepdim=True)
    p -= p.mean(dim=1, keepdim=True)
    mean = p.mul_(log_p).sum((1, 2)) / max(expert_logits.shape[1] - 1, 1)
    if masked is not None:
        mean.masked_fill_((masked.any(1) & ~masked.all(1)).any(1), torch.inf)
    return mean


def _check_expert_logits(logits: Tensor, num_samples: int, num_classes: int) -> None:
    shape = list(logits.shape)
    fits = logits.dim() == 3 and shape[1] > 0 and [shape[0], shape[2]] == [num_samples, num_classes]
    if not fits or not logits.is_floating_point():
        raise ArgumentError(
            f"Expected argument `expert_logits` to be floating point [{num_samples}, E, "
            f"{num_classes}], as `target` and `class_counts` have it, but got shape {shape} and "
            f"dtype {logits.dtype}. Collect expert_logits(model(x)) over the test set."
        )


def _check_values(usable: Tensor) -> None:
    if not bool(usable.all()):
        raise ArgumentError(
            "Expected argument `expert_logits` to hold no NaN, no +inf and no row that is -inf "
            f"throughout, but got such in {int((~usable).sum())} of {len(usable)} samples. Look "
            "for a diverged training."
        )


def _check_used(num_experts_used: Numbers, num_samples: int, num_experts: int) -> Tensor:
    used = as_indices(num_experts_used, "num_experts_used", num_samples)
    if int(used.min()) < 1 or int(used.max()) > num_experts:
        raise ArgumentError(
            f"Expected argument `num_experts_used` to hold integers from 1 to {num_experts}, but "
            f"got values from {used.min()} to {used.max()}. Pass what "
            "RoutingOutput.num_experts_used holds."
        )
    return used
