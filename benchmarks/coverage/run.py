"""Runs the checks, one process for each architecture."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.checks import CHECKS, measure
from benchmarks.coverage.compare import NotApplicable
from benchmarks.coverage.subject import Subject

_FORK = multiprocessing.get_context("fork")  # libraries are imported once, in the parent


def run_all(
    architectures: Sequence[Architecture], jobs: int, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(key, result)`` as they come."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_in_process, a, limit): a.key for a in architectures}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_checks(architecture: Architecture) -> dict[str, Any]:
    """Result of every check: what passed, what does not apply, what failed and how."""
    start = time.perf_counter()
    result: dict[str, Any] = {"passed": [], "not_applicable": {}, "failed": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(architecture)
        for name, check in CHECKS.items():
            try:
                check(subject)
            except NotApplicable as reason:
                result["not_applicable"][name] = str(reason).splitlines()[0]
            except Exception as error:
                result["failed"][name] = f"{type(error).__name__}: {error}"
                result.setdefault("traces", {})[name] = traceback.format_exc()[-3000:]
                if name == "wraps":
                    break
            else:
                result["passed"].append(name)
        if "wraps" in result["passed"]:
            with torch.no_grad():
                result |= measure(subject)
    result["seconds"] = time.perf_counter() - start
    return result


def _in_process(architecture: Architecture, limit: float) -> dict[str, Any]:
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(architecture, sender))
    process.start()
    sender.close()
    failure = f"no result within {limit:.0f} s"
    try:
        if receiver.poll(limit):
            return receiver.recv()
    except EOFError:
        failure = "the process died"
    finally:
        process.kill()
        process.join()
    return {"passed": [], "not_applicable": {}, "failed": {"wraps": failure}, "seconds": limit}


def _work(architecture: Architecture, sender: Connection) -> None:
    torch.set_num_threads(1)
    sender.send(run_checks(architecture))
