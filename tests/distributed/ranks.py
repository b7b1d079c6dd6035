"""Two processes with one gloo group, started once and handed one function after the other."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

WORLD_SIZE = 2
_LIMIT = 120.0  # seconds that one function may take; a rank that waits for a dead one never ends


class RankError(AssertionError):
    """A function failed on a rank."""


class Ranks:
    """Calls a function on every rank and returns what each returned.

    The function is a module's own, so that it can be sent by name, and finds the process group
    initialised. After a failure the processes are started anew, since one rank may be waiting.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        answers: list[Any] = []
        for rank, (process, pipe) in enumerate(self._workers):
            if not pipe.poll(_LIMIT if not answers else 20.0):
                self.stop()
                raise RankError(f"rank {rank} did not answer (exit code {process.exitcode})")
            try:
                answers.append(pipe.recv())
            except EOFError:
                self.stop()
                raise RankError(f"rank {rank} ended in the middle") from None
            if answers[-1][0] == "error":
                self.stop()
                raise RankError(f"on rank {rank}:\n{answers[-1][1]}")
        return [answer for _, answer in answers]

    def stop(self) -> None:
        """End both processes."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(10)  # its pipe is closed, so it ends, and coverage writes what it ran
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def _serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = ("ok", function(*args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)
