"""One run: train a method with the field's recipe, resume after a kill, write one JSON."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from benchmarks.cifar.data import Split, augment, augment_strongly, batches, normalise
from benchmarks.cifar.depths import mixed_depths
from benchmarks.cifar.evaluate import evaluate
from benchmarks.cifar.methods import METHODS, Method
from benchmarks.cifar.others import EarlyExit, Ensemble
from benchmarks.cifar.routing import route
from benchmarks.cifar.second_stage import normalise_classifiers, retrain_classifiers
from benchmarks.cifar.terms import BoundedDiversity, consistency
from benchmarks.machine import machine
from benchmarks.resnets import CifarResNet
from ride_plugin import DistillationLoss, DiversityLoss, RIDELoss, RIDEWrapper, expert_logits
from ride_plugin.longtail import (
    CosineClassifier,
    LDAMLoss,
    LogitAdjustedLoss,
    effective_number_weights,
)


@dataclass(frozen=True)
class Recipe:
    """The field's recipe; every milestone scales with the number of epochs.

    The warm-up does not: at 24 epochs LDAM-DRW reached 31.6 % without it, 37.9 % with it.
    """

    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    warmup: int = 5  # epochs; at most a fifth of all
    milestones: tuple[float, float] = (0.8, 0.9)
    lr_factor: float = 0.1
    reweight_from: float = 0.8
    degrees: float = 0.0
    diversity_weight: float = 0.45
    precision: str = "float32"
    average: float = 0.0  # decay of a moving average of the weights, measured beside; 0 for none

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch counted from zero."""
        warmup = min(self.warmup, max(1, round(self.epochs / 5)))
        if epoch < warmup:
            return self.lr * (epoch + 1) / warmup
        return self.lr * self.lr_factor ** sum(epoch >= m * self.epochs for m in self.milestones)


class Run:
    """A method, a seed, and where its checkpoint and result lie."""

    def __init__(
        self, name: str, seed: int, recipe: Recipe, data: tuple[Split, Split, Tensor], folder: Path
    ) -> None:
        self.name, self.seed, self.recipe, self.folder = name, seed, recipe, folder
        self.method: Method = METHODS[name]
        self.train_split, self.test_split, self.class_counts = data
        self.device = self.train_split.labels.device
        self.result_file = folder / f"{name}-seed{seed}.json"
        self.checkpoint_file = folder / f"{name}-seed{seed}.pth"
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = self._build()
        self.averaged: AveragedModel | None = None
        if recipe.average:
            decay = get_ema_multi_avg_fn(recipe.average)
            self.averaged = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
        self.diversity = self._diversity().to(self.device)

    def _diversity(self) -> DiversityLoss:
        counts, form = self.class_counts.tolist(), self.method.diversity
        start_epoch = round(self.recipe.reweight_from * self.recipe.epochs)
        weight = self.recipe.diversity_weight if form else 0.0
        if form == "bounded":
            return BoundedDiversity(counts, weight=weight, start_epoch=start_epoch)
        return DiversityLoss(counts, weight=weight, start_epoch=start_epoch, form=form or "paper")

    def _build(self) -> nn.Module:
        method, num_classes = self.method, len(self.class_counts)
        model: nn.Module = CifarResNet(num_classes, channels=method.channels)
        if method.other == "earlyon":
            model = EarlyExit(num_classes)
        elif method.other is not None:
            model = Ensemble(num_classes, packed=method.other == "packed")
        elif method.depths:
            model = mixed_depths(num_classes, method.num_experts, method.expert_width)
        elif method.num_experts:
            model = RIDEWrapper(
                model,
                method.num_experts,
                fork_at=method.fork_at,
                expert_width=method.expert_width,
                classifier="cosine" if method.cosine else None,
            )
        elif method.cosine:
            model.linear = CosineClassifier(4 * method.channels, num_classes)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def execute(self) -> dict[str, Any]:
        """Train unless done, evaluate the last epoch, write and return the result."""
        if self.result_file.exists():
            return json.loads(self.result_file.read_text())
        seconds = self._second_stage() if self.method.starts_from else self._first_stage()
        result = {
            "method": self.name,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "torch": torch.__version__,
            "device": machine(),
            "train_seconds": round(seconds, 1),
            "class_counts": self.class_counts.tolist(),
            **evaluate(self.model, self.test_split, self.class_counts),
            "mean_experts": float(max(1, self.method.num_experts)),
        }
        if isinstance(self.model, RIDEWrapper) and self.method.num_experts > 1:
            data = self.train_split, self.test_split, self.class_counts
            result.update(route(self.model, *data, self.seed, self.recipe.degrees))
        if self.averaged is not None and not self.method.starts_from:
            average = self.averaged.module
            result["averaged"] = evaluate(average, self.test_split, self.class_counts)
        torch.save(self.model.state_dict(), self.folder / f"{self.name}-seed{self.seed}-model.pth")
        self.result_file.write_text(json.dumps(result, indent=1))
        self.checkpoint_file.unlink(missing_ok=True)
        return result

    def _second_stage(self) -> float:
        self.model.load_state_dict(self._finished(self.method.starts_from).state_dict())
        started = time.perf_counter()
        split, degrees = self.train_split, self.recipe.degrees
        if self.method.classifiers == "crt":
            epochs = self.recipe.epochs
            retrain_classifiers(self.model, split, epochs, degrees, self.generator)
        else:
            normalise_classifiers(self.model, split, degrees, self.generator)
        return time.perf_counter() - started

    def _finished(self, name: str | None) -> nn.Module:
        """The model of another method's run with this seed, trained now unless it was before."""
        assert name is not None
        data = self.train_split, self.test_split, self.class_counts
        other = Run(name, self.seed, self.recipe, data, self.folder)
        other.execute()
        return other.load_model().eval()

    # ---------------------------------------------------------------- stage one

    def _first_stage(self) -> float:
        recipe, seconds, first = self.recipe, 0.0, 0
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            recipe.lr,
            0.9,
            weight_decay=recipe.weight_decay,
            nesterov=True,
            fused=True,
        )
        if self.checkpoint_file.exists():
            state = torch.load(self.checkpoint_file, weights_only=True)
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["random"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            first, seconds = state["epoch"], state["seconds"]
        teacher = self._finished(self.method.teacher) if self.method.teacher else None
        for _ in range(first):
            self.diversity.step()
        progress = tqdm(range(first, recipe.epochs), desc=f"{self.name} seed {self.seed}")
        for epoch in progress:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch)
            criterion = self._criterion(epoch)
            if self.method.num_experts:
                criterion = RIDELoss(criterion, self.diversity)  # compares what the criterion sees
            self.model.train()
            losses = []
            for indices in batches(self.train_split, recipe.batch_size, self.generator):
                losses.append(self._step(indices, criterion, optimizer, teacher))
            self.diversity.step()
            seconds += time.perf_counter() - started
            progress.set_postfix(loss=float(torch.stack(losses).mean()))
            self._save(epoch + 1, optimizer, seconds)
        return seconds

    def _step(
        self, indices: Tensor, criterion: Any, optimizer: torch.optim.Optimizer, teacher: Any
    ) -> Tensor:
        x, y = self._views(self.train_split.images[indices]), self.train_split.labels[indices]
        target = y.repeat(len(x) // len(y))
        if self.method.mixup:
            x, target = self._mix(x, y)
        with self._autocast():
            out = self.model(x)
        if self.method.num_experts:
            loss = criterion(out, target)
        else:
            # Another library's exits or members, one after the other, have the same targets.
            loss = criterion(out.float(), torch.cat([target] * (len(out) // len(target))))
        if teacher is not None:
            with torch.no_grad(), self._autocast():
                taught = teacher(x)
            loss = loss + DistillationLoss()(out, taught.float())
        if self.method.collaborative:
            loss = loss + DistillationLoss()(out, out.detach())  # its mean teaches
        if self.method.views == "both":
            each = zip(criterion.criterion, expert_logits(out).unbind(1), strict=True)
            seen = torch.stack([one.with_prior(logits) for one, logits in each], dim=1)
            weak, strong = seen.chunk(2)
            loss = loss + 0.6 * consistency(weak, strong, y)  # MDCS's weight
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return loss.detach()

    def _views(self, images: Tensor) -> Tensor:
        """One view of each image, or both of all, weak ones first."""
        views = []
        if self.method.views != "strong":
            views.append(normalise(augment(images, self.generator, self.recipe.degrees)))
        if self.method.views != "weak":
            views.append(normalise(augment_strongly(images, self.generator)))
        return torch.cat(views)

    def _mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        beta = torch.distributions.Beta(self.method.mixup, self.method.mixup)
        share = float(beta.sample())
        order = torch.randperm(len(y), generator=self.generator).to(self.device)
        hard = F.one_hot(y, len(self.class_counts)).float()
        return share * x + (1 - share) * x[order], share * hard + (1 - share) * hard[order]

    def _criterion(self, epoch: int) -> Any:
        counts = self.class_counts.tolist()
        late = epoch >= self.recipe.reweight_from * self.recipe.epochs
        if self.method.loss == "ldam_drw":
            weight = effective_number_weights(counts, beta=0.9999) if late else None
            return LDAMLoss(counts, weight=weight).to(self.device)
        if self.method.loss == "balanced_softmax":
            return LogitAdjustedLoss(counts, tau=1.0).to(self.device)
        if self.method.loss == "adjusted":
            taus = self.method.adjustments
            return nn.ModuleList(LogitAdjustedLoss(counts, tau=t) for t in taus).to(self.device)
        return nn.CrossEntropyLoss()

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _save(self, epoch: int, optimizer: torch.optim.Optimizer, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "epoch": epoch,
            "seconds": seconds,
        }
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        temporary = self.checkpoint_file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint_file)  # a kill leaves the old one or the new one

    def load_model(self) -> nn.Module:
        """The trained model of a finished run."""
        file = self.folder / f"{self.name}-seed{self.seed}-model.pth"
        self.model.load_state_dict(torch.load(file, weights_only=True, map_location=self.device))
        return self.model
