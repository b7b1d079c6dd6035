"""Checks of what people do with a model: copy, save, convert, share between threads, compile."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import Counter
from typing import Any

import torch

from benchmarks.coverage.compare import Failed, NotApplicable, require_close, require_equal
from benchmarks.coverage.inputs import Inputs, redrawn
from benchmarks.coverage.subject import Subject, run, run_wrapped, unfused
from ride_plugin import RIDEWrapper, expert_logits
from ride_plugin._split._copying._copies import clone_module
from ride_plugin._tree import logits_in, map_tensors


def deep_copy(subject: Subject) -> None:
    """A deep copy, also after a training step, computes the same and shares nothing."""
    model = copy.deepcopy(subject.two).train()
    try:
        run_wrapped(model, subject.inputs).sum().backward()
    except Exception as error:
        if not _trains(subject):
            raise NotApplicable("the backbone does not train on its input") from error
        raise
    model.eval()
    copied = copy.deepcopy(model)
    _same_outputs(copied, model, subject.inputs)
    addresses = {p.data_ptr() for p in model.parameters()}
    if any(p.data_ptr() in addresses for p in copied.parameters()):
        raise Failed("a parameter is shared with the copy")
    with torch.no_grad():
        before = run(model, subject.inputs)
        for parameter in copied.parameters():
            parameter.zero_()
        require_equal(run(model, subject.inputs), before, "after zeroing the copy")


def pickled(subject: Subject) -> None:
    """A pickled model computes the same."""
    try:
        pickle.dumps(clone_module(subject.backbone))
    except Exception as error:
        raise NotApplicable("the backbone itself cannot be pickled") from error
    model = subject.two.eval()
    _same_outputs(pickle.loads(pickle.dumps(model)), model, subject.inputs)


def state_dict(subject: Subject) -> None:
    """Names are the backbone's behind `trunk.` and `experts.k.`; saving and loading works."""
    model = subject.two.eval()
    saved = model.state_dict()
    theirs = set(subject.backbone.state_dict())
    for index in range(2):
        parts = ("trunk.", f"experts.{index}.")
        names = Counter(k.removeprefix(p) for k in saved for p in parts if k.startswith(p))
        if set(names) != theirs:
            raise Failed(f"names differ: {sorted(set(names) ^ theirs)[:3]}")
        tied = {k for k, n in names.items() if n > 1}
        if any(saved["trunk." + k].data_ptr() != saved[parts[1] + k].data_ptr() for k in tied):
            raise Failed(f"listed on both sides: {sorted(tied)[:3]}")
    if stray := [k for k in saved if not k.startswith(("trunk.", "experts."))]:
        raise Failed(f"other names: {stray[:3]}")
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    _same_outputs(other, model, subject.inputs)


def half(subject: Subject) -> None:
    """`.half()` of the model is `.half()` of the backbone."""
    _in_dtype(subject, torch.float16)


def bfloat16(subject: Subject) -> None:
    """`.bfloat16()` of the model is `.bfloat16()` of the backbone."""
    _in_dtype(subject, torch.bfloat16)


def threads(subject: Subject) -> None:
    """Two threads that use one model at once get what each would get alone."""
    model = subject.two.eval()
    batches = [redrawn(subject.inputs, seed) for seed in (11, 12)]
    with torch.no_grad():
        expected = [run(model, batch) for batch in batches]
    wrong: list[str] = []

    def work(index: int) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(2):
                with torch.no_grad():
                    got = logits_in(model(*batches[index][0], **batches[index][1]))
                assert got is not None
                require_equal(got, expected[index], f"thread {index}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if wrong:
        raise Failed(wrong[0])


def compiled(subject: Subject) -> None:
    """One graph without breaks, where the backbone compiles so."""
    if not subject.architecture.compile:
        raise NotApplicable("not tried")
    options: dict[str, Any] = {"fullgraph": True, "backend": "eager"}
    with torch.no_grad():
        try:
            expected = run(torch.compile(subject.plain(), **options), subject.inputs)
        except Exception as error:
            raise NotApplicable("the backbone does not compile without breaks") from error
        finally:
            torch.compiler.reset()
        model = torch.compile(subject.one.eval(), **options)
        require_close(run(model, subject.inputs), expected, "compiled")
        torch.compiler.reset()


def _same_outputs(a: RIDEWrapper, b: RIDEWrapper, inputs: Inputs) -> None:
    with torch.no_grad():
        ours, theirs = (expert_logits(run_wrapped(m, inputs)) for m in (a, b))
        require_equal(ours, theirs, "expert logits")


def _in_dtype(subject: Subject, dtype: torch.dtype) -> None:
    inputs = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, subject.inputs)
    with torch.no_grad():
        try:
            expected = run(unfused(subject.plain()).to(dtype), inputs)
        except Exception as error:
            raise NotApplicable(f"the backbone does not run in {dtype}") from error
        require_equal(run(copy.deepcopy(subject.one).eval().to(dtype), inputs), expected, "logits")


def _trains(subject: Subject) -> bool:
    try:
        run(subject.plain(training=True), subject.inputs).sum().backward()
    except Exception:
        return False
    return True
