"""Changes the library's source in one place at a time, and counts how many changes a test notices.

`python -m benchmarks.mutants --number 300 --seed 0` from the repository's root. A mutant is one
change of one expression or statement (a comparison, an operator, a number, a condition, a default,
a cast, a call left out); it is killed if a test of the mirroring modules fails or takes too long.
Every mutant runs in a process of its own, forked after torch was imported; no file is changed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  (imported before the fork, so that no mutant pays for it)
import numpy as np  # noqa: F401
import pytest
import sybil  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # module -> the tests that mirror it, nearest first
    "functional": (
        "test_functional.py",
        *(f"losses/test_{name}.py" for name in ("diversity", "temperature", "distillation")),
        "routing/test_router.py",
        "routing/test_exit.py",
    ),
    "_numerics": ("test_numerics.py", "test_functional.py", "losses/test_diversity.py"),
    "losses/*": ("losses/test_{}.py", "test_functional.py"),
    "longtail/_ldam": ("longtail/test_ldam.py",),
    "longtail/_focal": ("longtail/test_focal.py",),
    "longtail/_logit_adjustment": ("longtail/test_logit_adjustment.py",),
    "longtail/_reweighting": ("longtail/test_reweighting.py",),
    "longtail/_sampler": ("longtail/test_sampler.py",),
    "routing/_runner": ("routing/test_export.py",),
    "routing/*": ("routing/test_{}.py", "routing/test_router.py", "routing/test_exit.py"),
}
_ELSEWHERE = {"__init__", "_fused"}  # the fused executor is compared with eager at every build
_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_NAMES = {
    "sum": "mean", "mean": "sum", "min": "max", "max": "min", "amax": "amin", "amin": "amax",
    "any": "all", "all": "any", "softmax": "log_softmax", "log_softmax": "softmax", "log": "exp",
    "exp": "log", "ones": "zeros", "zeros": "ones", "argmax": "argmin", "clamp_min": "clamp_max",
}  # fmt: skip
_CASTS = {"detach", "float", "double", "to", "contiguous", "clone", "clamp", "clamp_min", "abs"}
_MESSAGES = {"refuse", "ArgumentError", "MissingExpertLogitsError", "ValueError", "warn"}


@dataclass(frozen=True)
class Mutant:
    """One change: the module's path, the line, what was changed, and the module's new source."""

    path: str
    line: int
    change: str
    source: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a source file."""
    text = path.read_text()
    places = list(_places(ast.parse(text)))
    for place, (node, _) in enumerate(places):
        for choice in range(len(list(_changes(node)))):
            tree = ast.parse(text)
            node, parent = list(_places(tree))[place]
            old, line = ast.unparse(node), getattr(node, "lineno", 0)
            new = list(_changes(node))[choice]
            _replace(parent, node, new)
            mutated = ast.unparse(ast.fix_missing_locations(tree))
            shown = f"{old} -> {ast.unparse(new)}".replace("\n", " ")
            yield Mutant(path.relative_to(ROOT).as_posix(), line, shown[:160], mutated)


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every node that may be changed, with its parent; no annotation, docstring or message."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_text(child):
                continue
            yield child, node
            yield from _places(child)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).split(".")[-1] in _MESSAGES
    skipped = (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Raise)
    typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    public = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    representation = isinstance(node, ast.FunctionDef) and node.name in ("extra_repr", "__repr__")
    return isinstance(node, skipped) or typing or public or representation


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in _COMPARE:
        new.ops[0] = _COMPARE[type(new.ops[0])]()
        yield new
    elif isinstance(new, ast.BinOp | ast.AugAssign) and type(new.op) in _OPERATORS:
        new.op = _OPERATORS[type(new.op)]()
        yield new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        yield new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        yield ast.Constant(new.value + 1 if isinstance(new.value, int) else new.value * 2 + 0.25)
    elif isinstance(new, ast.If | ast.IfExp | ast.While):
        for value in (True, False) if not isinstance(new, ast.While) else (False,):
            other = copy.deepcopy(new)
            other.test = ast.Constant(value)
            yield other
    elif isinstance(new, ast.Expr) and isinstance(new.value, ast.Call):
        yield ast.Pass()
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute):
        if new.func.attr in _CASTS:
            yield new.func.value
        if new.func.attr in _NAMES:
            new.func.attr = _NAMES[new.func.attr]
            yield new
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in _NAMES:
        new.func.id = _NAMES[new.func.id]
        yield new


def _replace(parent: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list):
            setattr(parent, name, [new if item is old else item for item in value])


class _Loader(importlib.abc.SourceLoader):
    """Gives a module the mutant's source, and knows of no bytecode that could be stale."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def get_filename(self, fullname: str) -> str:
        return str(ROOT / self.mutant.path)

    def get_data(self, path: str | bytes) -> bytes:
        return self.mutant.source.encode()


class _Finder(importlib.abc.MetaPathFinder):
    """Imports the mutant instead of the module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = mutant.path.removesuffix(".py").replace("/", ".")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        loader = _Loader(self.mutant)
        return importlib.util.spec_from_file_location(name, ROOT / self.mutant.path, loader=loader)


def tests_of(path: str) -> list[str]:
    """The mirroring tests, nearest first, and the module's own doctests."""
    inner = path.removeprefix("ride_plugin/").removesuffix(".py")
    folder, _, module = inner.rpartition("/")
    patterns = TESTS.get(inner) or TESTS[f"{folder}/*"]
    files = [ROOT / "tests" / pattern.format(module.strip("_")) for pattern in patterns]
    return list(dict.fromkeys([str(ROOT / path), *(str(f) for f in files if f.exists())]))


def passes(mutant: Mutant, limit: float) -> tuple[bool, float]:
    """Whether the tests pass on the mutant in a process of its own, and the seconds they took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.meta_path.insert(0, _Finder(mutant))
        options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]
        os._exit(int(pytest.main([*options, *tests_of(mutant.path)])))
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0, time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, limit


def main() -> None:
    """Sample, run, print every survivor and the share that was killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one mutant")
    parser.add_argument("--log", type=Path, help="a line of JSON for each mutant; goes on from it")
    parser.add_argument("--part", default="1/1", help="1/3 and so on: processes share one --log")
    parser.add_argument("--only", default="", help="paths that contain this text")
    parser.add_argument("--again", action="store_true", help="of --log, the survivors only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths: list[Path] = []
    for pattern in TESTS:
        paths += sorted((ROOT / "ride_plugin").glob(f"{pattern}.py"))
    everything = [m for path in paths if path.stem not in _ELSEWHERE for m in mutants_of(path)]
    sample = random.Random(options.seed).sample(everything, min(options.number, len(everything)))
    part, parts = map(int, options.part.split("/"))
    sample = [mutant for mutant in sample[part - 1 :: parts] if options.only in mutant.path]
    known: dict[str, bool] = {}
    if options.log and options.log.exists():
        for entry in map(json.loads, options.log.read_text().splitlines()):
            known[f"{entry['path']}:{entry['line']}: {entry['change']}"] = entry["killed"]
    print(f"{len(everything)} mutants, {len(sample)} of them run", flush=True)
    for path in sorted({mutant.path for mutant in sample}):
        unchanged = Mutant(path, 0, "", (ROOT / path).read_text())
        if not known and not passes(unchanged, options.limit)[0]:
            raise SystemExit(f"the tests of {path} fail without any change: {tests_of(path)}")
    killed = run = 0
    for mutant in sample:
        name = f"{mutant.path}:{mutant.line}: {mutant.change}"
        dead = known.get(name)
        if dead is None or (options.again and not dead):
            survived, seconds = passes(mutant, options.limit)
            dead = not survived
            if options.log:
                entry = {"path": mutant.path, "line": mutant.line, "change": mutant.change}
                entry |= {"killed": dead, "seconds": round(seconds, 1)}
                with options.log.open("a") as log:
                    log.write(json.dumps(entry) + "\n")
        run += 1
        killed += dead
        if not dead:
            print(f"SURVIVED {name}", flush=True)
    print(f"{killed} of {run} killed ({100 * killed / max(1, run):.1f} %)")


if __name__ == "__main__":
    main()
