"""Routed inference over several small batches: the rows that go on run together."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ride_plugin._checks import check_instance, check_integer, check_predictions, setting
from ride_plugin._errors import ArgumentError, listed
from ride_plugin._numerics import Autocast
from ride_plugin._split import kept_rows_of
from ride_plugin._tree import dotted, map_tensors
from ride_plugin.routing._exit import RoutingOutput, Underway, rows_going_on, run_first, run_next
from ride_plugin.routing._inference import RoutingInference
from ride_plugin.routing._protocols import RoutableModel

_ADVICE = "Pass RoutingInference(model, router)."


@dataclass(frozen=True)
class _Waiting:
    """Rows that wait for one expert, of one or several submissions, oldest first."""

    rows: Underway
    tickets: Tensor  # int64 [n] on the CPU, ascending: whose row it is
    places: Tensor  # int64 [n], which row of that submission
    autocast: Autocast  # as it stood when they were submitted

    def __len__(self) -> int:
        return len(self.tickets)

    @property
    def oldest(self) -> int:
        return int(self.tickets[0])

    def select(self, rows: Tensor) -> _Waiting:
        return _Waiting(
            self.rows.select(rows),
            self.tickets.index_select(0, rows.to(self.tickets.device)),
            self.places.index_select(0, rows),
            self.autocast,
        )

    def of_tickets(self, known: Container[int]) -> _Waiting | None:
        """The rows of these submissions, None if there are none."""
        kept = [row for row, ticket in enumerate(self.tickets.tolist()) if ticket in known]
        if len(kept) == len(self):
            return self
        return self.select(torch.tensor(kept, device=self.places.device)) if kept else None

    @staticmethod
    def cat(parts: list[_Waiting]) -> _Waiting:
        states = [part.rows.state for part in parts]
        if len({part.autocast for part in parts}) > 1:
            raise ArgumentError("Expected rows that were submitted under one autocast.")
        join = cast("Any", type(states[0])).cat
        return _Waiting(
            Underway(join(states), torch.cat([part.rows.total for part in parts])),
            torch.cat([part.tickets for part in parts]),
            torch.cat([part.places for part in parts]),
            parts[0].autocast,
        )

    @staticmethod
    def joined(parts: list[_Waiting]) -> tuple[_Waiting, int]:
        """As many of the first parts as can run together, and how many these are.

        Only joining them tells: each kind of state has its own reasons to refuse it.
        """
        joined, fits, fails, tried = parts[0], 1, len(parts) + 1, len(parts)
        while fits + 1 < fails:
            try:
                joined, fits = _Waiting.cat(parts[:tried]), tried
            except Exception:  # of any class: a state may be made by hand
                fails = tried
            tried = (fits + fails) // 2
        return joined, fits


@dataclass
class _Submission:
    """A batch on its way: its output so far, and how many of its rows still need an expert."""

    output: RoutingOutput
    underway: int


class _OneAtATime:
    """A lock that a copy or an unpickled queue has anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a hook of the model may ask the queue

    def __reduce__(self) -> tuple[type[_OneAtATime], tuple[()]]:
        return _OneAtATime, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class RoutingQueue:
    """Serves small batches with early exit, and lets later experts run on full batches.

    Trunk and expert 0 run on each submission at once. Rows that go on wait until ``batch_size`` of
    them, from any submissions, need the same expert, and then run together. No row waits for
    longer than ``max_wait`` further submissions. Each row gets what `RoutingInference` gives it
    under the autocast of its submission. Rows that cannot run together (other input sizes, other
    arguments, another autocast) run one kind after the other. Several threads may share a queue:
    their calls wait for each other, and `results` hands out what is finished, whoever submitted it.
    Not in the paper.

    Args:
        serve: the routed model. Its thresholds can change at any time.
        batch_size: how many waiting rows make an expert run.
        max_wait: after how many further submissions a row is finished in any case; 0 finishes
            every submission at once.

    Raises:
        ArgumentError: an argument is out of range, the model's states cannot be joined, or its
            experts keep something of each row from call to call.

    Example:
        >>> from torch import nn
        >>> from ride_plugin import ConfidenceRouter, RIDEWrapper
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ... )
        >>> serve = RoutingInference(RIDEWrapper(backbone, 3), ConfidenceRouter(), 0.1)
        >>> queue = RoutingQueue(serve, batch_size=4, max_wait=2)
        >>> tickets = [queue.submit(torch.randn(2, 3, 32, 32)) for _ in range(3)]
        >>> [ticket for ticket, output in queue.flush().items()]
        [0, 1, 2]
    """

    batch_size: int = setting("batch_size", "How many rows make an expert run.", check_integer, 1)
    max_wait: int = setting("max_wait", "How many submissions a row waits for.", check_integer, 0)

    def __init__(self, serve: RoutingInference, *, batch_size: int = 64, max_wait: int = 4) -> None:
        self.serve = check_instance(
            serve, "serve", RoutingInference, "a RoutingInference", advice=_ADVICE
        )
        kept = kept_rows_of(serve.model)
        if kept is not None:
            raise ArgumentError(
                "Expected argument `serve` to hold a model whose experts keep nothing of a row "
                f"from call to call, but each keeps {listed([dotted(*p) for p in kept.places])}, "
                "and here an expert runs on rows of several submissions. Call `serve` itself, and "
                "reset the model before each batch."
            )
        self.batch_size = batch_size
        self.max_wait = max_wait
        self._one_at_a_time = _OneAtATime()
        self._next_ticket = 0
        self._unfinished: dict[int, _Submission] = {}
        self._finished: dict[int, RoutingOutput] = {}
        gates = cast("RoutableModel", serve.model).num_experts - 1
        self._waiting: list[deque[_Waiting]] = [deque() for _ in range(gates)]

    @property
    def num_waiting(self) -> int:
        """Number of rows that wait for an expert."""
        with self._one_at_a_time:
            return sum(len(rows) for stage in self._waiting for rows in stage)

    @torch.inference_mode(False)  # rows of one submission may run in the mode of another's caller
    @torch.no_grad()
    def submit(self, *args: Any, **kwargs: Any) -> int:
        """Run trunk and expert 0 on a batch, and whatever expert has now enough rows.

        Args:
            *args: what the model takes, and ``**kwargs``.
            **kwargs: see ``*args``.

        Returns:
            The ticket under which `results` returns this batch: 0, 1, 2, ...

        Raises:
            ArgumentError: (on the CPU only) an expert's logits hold NaN. After an error or an
                interruption, the submissions whose rows ran just then have no result.
        """
        # Rows that wait may hold parts of the inputs, and the caller may fill his buffer anew.
        args, kwargs = map_tensors(torch.clone, (args, kwargs))
        with self._one_at_a_time, self.serve.stages.evaluating():
            rows, logits, features = run_first(self.serve.stages, *args, **kwargs)
            check_predictions(logits, "the experts' logits")
            if not hasattr(type(rows.state), "cat"):
                raise ArgumentError(
                    f"Expected the model's state to have a static method `cat`, but got "
                    f"{type(rows.state).__name__} without it. Wrap the model with RIDEWrapper."
                )
            ticket = self._next_ticket
            self._next_ticket += 1
            autocast = Autocast.now(logits)
            tickets = torch.full((len(logits),), ticket, device="cpu")
            places = torch.arange(len(logits), device=logits.device)
            used = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
            output = RoutingOutput(logits.clone(), used)
            self._unfinished[ticket] = _Submission(output, underway=len(logits))
            self._send_on(0, _Waiting(rows, tickets, places, autocast), logits, features)
            self._run_what_is_due(newest=ticket - self.max_wait)
        return ticket

    @torch.inference_mode(False)
    @torch.no_grad()
    def results(self) -> dict[int, RoutingOutput]:
        """Hand out the batches that are finished and were not handed out yet, by ticket.

        Returns:
            ``{ticket: RoutingOutput}``, tickets ascending.
        """
        with self._one_at_a_time:
            return self._handed_out()

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush(self) -> dict[int, RoutingOutput]:
        """Finish everything that waits, and return `results`."""
        with self._one_at_a_time:
            with self.serve.stages.evaluating():
                self._run_what_is_due(newest=self._next_ticket)
            return self._handed_out()

    def _handed_out(self) -> dict[int, RoutingOutput]:
        self._settle()
        finished, self._finished = self._finished, {}
        return dict(sorted(finished.items()))

    def _run_what_is_due(self, newest: int) -> None:
        """Run stages with a full batch, or with a row of ticket ``newest`` or older."""
        self._settle()  # rows that an error has made useless need no expert
        for index, stage in enumerate(self._waiting, start=1):
            while stage and (stage[0].oldest <= newest or sum(map(len, stage)) >= self.batch_size):
                self._run(index, self._take(stage))
        self._settle()

    def _settle(self) -> None:
        """Note what is finished, and drop submissions of which an error has lost some rows."""
        waiting = Counter(
            ticket for stage in self._waiting for r in stage for ticket in r.tickets.tolist()
        )
        for ticket, submission in list(self._unfinished.items()):
            if submission.underway == 0:
                self._finished[ticket] = self._unfinished.pop(ticket).output
            elif submission.underway != waiting[ticket]:
                # An error or an interruption came while some of its rows ran: they are lost.
                del self._unfinished[ticket]
        if waiting.keys() - self._unfinished.keys():
            for index, stage in enumerate(self._waiting):
                left = [rows.of_tickets(self._unfinished) for rows in stage]
                self._waiting[index] = deque(rows for rows in left if rows is not None)

    def _take(self, stage: deque[_Waiting]) -> _Waiting:
        """Take up to ``batch_size`` rows that can run together, the oldest first."""
        parts, missing = [], self.batch_size
        while stage and missing > 0:
            rows = stage.popleft()
            if len(rows) > missing:
                order = torch.arange(len(rows), device=rows.places.device)
                stage.appendleft(rows.select(order[missing:]))
                rows = rows.select(order[:missing])
            parts.append(rows)
            missing -= len(rows)
        joined, count = _Waiting.joined(parts)
        stage.extendleft(reversed(parts[count:]))
        return joined

    def _run(self, index: int, waiting: _Waiting) -> None:
        with waiting.autocast.restored():
            further, mean, features = run_next(self.serve.stages, index, waiting.rows)
            check_predictions(mean, "the experts' logits")
            owners, counts = waiting.tickets.unique_consecutive(return_counts=True)
            sizes = counts.tolist()
            for ticket, logits, places in zip(
                owners.tolist(), mean.split(sizes), waiting.places.split(sizes), strict=True
            ):
                output = self._unfinished[ticket].output
                output.logits.index_copy_(0, places, logits)
                output.num_experts_used.index_fill_(0, places, index + 1)
            self._send_on(index, replace(waiting, rows=further), mean, features)

    def _send_on(self, index: int, waiting: _Waiting, mean: Tensor, features: Tensor) -> None:
        """Let the rows that need one more expert after expert ``index`` wait for it."""
        settled = waiting.tickets
        if index < len(self._waiting):
            staying = rows_going_on(self.serve.stages, index, mean, features)
            goes_on = torch.zeros(len(waiting), dtype=torch.bool, device="cpu")
            goes_on[staying.cpu()] = True
            settled = settled[~goes_on]
            if len(staying):
                everything = len(staying) == len(waiting)
                self._waiting[index].append(waiting if everything else waiting.select(staying))
        # Last: what is interrupted before leaves too many underway, and so no result.
        for ticket, count in Counter(settled.tolist()).items():
            self._unfinished[ticket].underway -= count
