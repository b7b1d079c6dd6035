"""The queue against routed inference, row by row, and its bound on how long a row waits."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ride_plugin import ArgumentError, ExpertRouter, RIDEWrapper, RoutingInference
from ride_plugin.routing import RoutingQueue, TrunkState
from tests.handmade import small_model


def serving(threshold=0.5, channels_last=False):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    model = RIDEWrapper(backbone, 3, example_input=torch.zeros(2, 3, 8, 8))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    router = ExpertRouter.for_model(model)
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.mul_(3.0)
        router.output.weight.mul_(10)
        x = torch.randn(64, 3, 8, 8)
        router.output.bias.sub_(router(model.router_inputs(x)).quantile(0.5))
    return RoutingInference(model, router, threshold)


SERVE = serving()


def counted(serve):
    """A list to which each run of an expert adds its index and its number of rows."""
    sizes, run = [], serve.model.run_expert

    def counting(index, state):
        sizes.append((index, state.batch_size))
        return run(index, state)

    serve.model.run_expert = counting
    return sizes


def batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def assert_equal_row_by_row(got, serve, x):
    expected = serve(x, return_routing=True)
    assert torch.equal(got.num_experts_used, expected.num_experts_used)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    batch_size=st.integers(1, 20),
    max_wait=st.integers(0, 5),
    collect=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_queue_equals_routed_inference_and_keeps_its_bound(
    sizes, batch_size, max_wait, collect, seed
):
    queue = RoutingQueue(SERVE, batch_size=batch_size, max_wait=max_wait)
    inputs, results = batches(sizes, seed), {}
    for number, x in enumerate(inputs):
        assert queue.submit(x) == number
        assert all(ticket > number - max_wait for ticket in queue._unfinished)
        assert all(sum(map(len, stage)) < batch_size for stage in queue._waiting)
        if number % collect == 0:
            got = queue.results()
            assert list(got) == sorted(got)
            assert not got.keys() & results.keys()
            results |= got
    results |= queue.flush()
    assert sorted(results) == list(range(len(inputs)))
    assert queue.num_waiting == 0
    assert queue.flush() == {}
    for ticket, x in enumerate(inputs):
        assert_equal_row_by_row(results[ticket], SERVE, x)


def test_later_experts_run_on_full_batches():
    serve = serving(threshold=0.0)
    sizes = counted(serve)
    queue = RoutingQueue(serve, batch_size=8, max_wait=100)
    for x in batches([2] * 10):
        queue.submit(x)
    assert [s for s in sizes if s[0]] == [(1, 8), (2, 8), (1, 8), (2, 8)]
    assert queue.num_waiting == 4
    queue.flush()
    assert sizes[-2:] == [(1, 4), (2, 4)]


def test_threshold_one_finishes_at_once():
    queue = RoutingQueue(serving(threshold=1.0))
    (x,) = batches([5])
    ticket = queue.submit(x)
    assert_equal_row_by_row(queue.results()[ticket], queue.serve, x)


def test_modes_and_statistics_are_left_as_they_were():
    serve = serving()
    serve.model.train()
    before = {key: value.clone() for key, value in serve.state_dict().items()}
    queue = RoutingQueue(serve, batch_size=3)
    for x in batches([2, 2, 2]):
        queue.submit(x)
    queue.flush()
    assert all(module.training for module in serve.model.modules())
    for key, value in serve.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_nan_logits_raise_and_the_other_submissions_keep_their_results():
    queue = RoutingQueue(SERVE, batch_size=4)
    good, bad = batches([3, 2])
    with pytest.raises(ArgumentError, match="NaN"):
        queue.submit(bad * torch.nan)
    ticket = queue.submit(good)
    results = queue.flush()
    assert list(results) == [ticket]
    assert_equal_row_by_row(results[ticket], SERVE, good)


def test_an_expert_that_fails_drops_the_submissions_it_ran_on():
    serve = serving(threshold=0.0)
    queue = RoutingQueue(serve, batch_size=4)
    first, second, third = batches([2, 2, 2])
    queue.submit(first)
    run = serve.model.run_expert
    serve.model.run_expert = lambda index, state: (_ for _ in ()).throw(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        queue.submit(second)
    serve.model.run_expert = run
    ticket = queue.submit(third)
    assert list(queue.flush()) == [ticket]


def test_rows_left_over_of_a_lost_submission_harm_no_other():
    serve = serving(threshold=0.0)
    queue = RoutingQueue(serve, batch_size=4, max_wait=100)
    lost, kept = batches([6, 3])
    run, fails = serve.model.run_expert, [True]

    def once(index, state):
        if index == 1 and fails.pop():
            fails.append(False)
            raise RuntimeError("no memory")
        fails.append(False)
        return run(index, state)

    serve.model.run_expert = once
    with pytest.raises(RuntimeError, match="no memory"):
        queue.submit(lost)  # four of its rows are gone, two wait
    assert queue.num_waiting == 2
    ticket = queue.submit(kept)
    results = queue.flush()
    assert list(results) == [ticket]
    assert queue.num_waiting == 0
    assert_equal_row_by_row(results[ticket], serve, kept)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("where", ["run_expert", "gate", "select"])
def test_nothing_unfinished_is_handed_out_after_an_interruption(interruption, where, monkeypatch):
    serve = serving(threshold=0.3)
    first, second, third = batches([6, 6, 6])
    for moment in range(1, 6):
        queue, count = RoutingQueue(serve, batch_size=5, max_wait=1), [0]
        holder = {"run_expert": serve.model, "gate": serve.router, "select": TrunkState}[where]
        original = getattr(holder, where)

        def interrupted(*args, original=original, count=count, moment=moment):
            count[0] += 1
            if count[0] == moment:
                raise interruption("now")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(holder, where, interrupted)
            inputs, results = {}, {}
            for x in (first, second):
                try:
                    inputs[queue.submit(x)] = x
                except interruption:
                    inputs[queue._next_ticket - 1] = x
            with suppress(interruption):
                results = queue.flush()
        results |= queue.flush()
        inputs[queue.submit(third)] = third
        results |= queue.flush()
        for ticket, output in results.items():
            assert_equal_row_by_row(output, serve, inputs[ticket])
        assert queue._next_ticket - 1 in results
        assert queue._unfinished == {}


def test_the_callers_buffer_may_be_filled_anew():
    torch.manual_seed(0)

    class ReadsInput(nn.Module):  # whose experts read the input itself
        def __init__(self):
            super().__init__()
            self.early, self.late, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.late(self.early(x)).relu() + x)

    model = RIDEWrapper(ReadsInput(), 3, fork_at="late", example_input=torch.randn(2, 6))
    serve = RoutingInference(model, ExpertRouter.for_model(model), 0.0)
    queue = RoutingQueue(serve, batch_size=64)
    x = torch.randn(4, 6)
    expected = serve(x, return_routing=True)
    ticket = queue.submit(x)
    x.zero_()
    assert torch.equal(queue.flush()[ticket].logits, expected.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be an integer >= 1, but got 0"),
        ({"batch_size": 2.5}, "`batch_size` to be an integer >= 1, but got 2.5"),
        ({"max_wait": -1}, "`max_wait` to be an integer >= 0, but got -1"),
        ({"max_wait": True}, "`max_wait` to be an integer >= 0, but got True"),
        ({"batch_size": None}, "`batch_size` to be an integer >= 1, but got None"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        RoutingQueue(SERVE, **options)


def test_the_wrapper_itself_is_refused():
    with pytest.raises(ArgumentError, match=r"(?s)`serve` to be a RoutingInference.*Pass Routing"):
        RoutingQueue(SERVE.model)


def test_a_model_whose_states_cannot_be_joined_is_refused():
    model = small_model()
    queue = RoutingQueue(RoutingInference(model, ExpertRouter.for_model(model)))
    with pytest.raises(ArgumentError, match="HandmadeState without it"):
        queue.submit(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("channels_last", [False, True])
def test_joined_states_give_the_rows_of_each(channels_last):
    model = serving(channels_last=channels_last).model.eval()
    inputs = batches([1, 3, 2])
    if channels_last:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    with torch.no_grad():
        states = [model.run_trunk(x) for x in inputs]
        joined = TrunkState.cat(states)
        assert joined.batch_size == 6
        layout = joined.layout
        for value, flags in zip(joined.values, layout.live, strict=True):
            if any(flags):
                assert value.shape[0] == 6
                if channels_last:
                    assert value.is_contiguous(memory_format=torch.channels_last)
        for index in range(3):
            each = torch.cat([model.run_expert(index, state)[0] for state in states])
            torch.testing.assert_close(model.run_expert(index, joined)[0], each)


def test_states_of_different_input_sizes_are_not_joined():
    model = serving().model.eval()
    with torch.no_grad():
        states = [model.run_trunk(torch.randn(2, 3, size, size)) for size in (8, 10)]
    with pytest.raises(ArgumentError, match="one input size"):
        TrunkState.cat(states)


class Options(nn.Module):
    """Takes a mask and a number beside the rows, and has values for all rows in its experts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x, mask=None, depth=1, table=None):
        h = self.a(x).relu()
        if mask is not None:
            h = h * mask[:, None]
        for _ in range(depth):
            h = self.b(h).relu()
        return self.c(h if table is None else h + table)


def mixed_calls():
    x, mask, table = torch.randn(3, 8), torch.rand(3), torch.randn(12)
    kinds = [
        ((x,), {}), ((x, mask), {}), ((), {"x": x, "mask": mask}), ((x,), {"depth": 3}),
        ((x,), {"table": table}), ((x,), {"table": table + 1}), ((x,), {}), ((x, mask), {}),
    ]  # fmt: skip
    return [kinds[index] for index in (0, 0, 1, 2, 3, 4, 5, 6, 7, 3, 0, 1, 1, 1, 5, 4)]


@pytest.mark.parametrize(("batch_size", "max_wait"), [(4, 100), (50, 100), (7, 2), (1, 0)])
def test_submissions_of_different_kinds_all_have_their_results(batch_size, max_wait):
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 8), "mask": torch.rand(2)}
    model = RIDEWrapper(Options(), 3, fork_at="b", example_input=example).eval()
    serve = RoutingInference(model, ExpertRouter.for_model(model), 0.0)
    queue = RoutingQueue(serve, batch_size=batch_size, max_wait=max_wait)
    calls, results = mixed_calls(), {}
    for ticket, (args, kwargs) in enumerate(calls):
        assert queue.submit(*args, **kwargs) == ticket
        results |= queue.results()
        assert all(waiting > ticket - max_wait for waiting in queue._unfinished)
    results |= queue.flush()
    assert sorted(results) == list(range(len(calls)))
    assert queue.num_waiting == 0
    for ticket, (args, kwargs) in enumerate(calls):
        expected = serve(*args, **kwargs)
        torch.testing.assert_close(results[ticket].logits, expected, rtol=1e-5, atol=1e-5)


def test_other_image_sizes_wait_beside_each_other():
    serve = serving(threshold=0.0)
    sizes = counted(serve)
    queue = RoutingQueue(serve, batch_size=64, max_wait=100)
    inputs = [torch.randn(2, 3, size, size) for size in (8, 8, 8, 10, 10, 8)]
    for x in inputs:
        queue.submit(x)
    results = queue.flush()
    # As many as can run together do, from the first on.
    assert [size for index, size in sizes if index == 1] == [6, 4, 2]
    for ticket, x in enumerate(inputs):
        torch.testing.assert_close(results[ticket].logits, serve(x), rtol=1e-5, atol=1e-5)


def test_rows_of_a_lost_submission_run_no_more():
    serve = serving(threshold=0.0)
    queue = RoutingQueue(serve, batch_size=4, max_wait=100)
    first, second, third = batches([3, 3, 1])
    queue.submit(first)
    run = serve.model.run_expert

    def failing(index, state):
        raise RuntimeError("no memory")

    serve.model.start = lambda x: (s := serve.model.run_trunk(x), *run(0, s))
    serve.model.run_expert = failing
    with pytest.raises(RuntimeError, match="no memory"):
        queue.submit(second)  # three rows of the first and one of this are gone
    sizes = []
    serve.model.run_expert = lambda i, state: sizes.append(state.batch_size) or run(i, state)
    assert queue.num_waiting == 2
    ticket = queue.submit(third)
    assert queue.num_waiting == 1
    assert list(queue.flush()) == [ticket]
    assert sizes == [1, 1]


def test_what_was_finished_before_an_error_is_handed_out():
    serve = serving(threshold=0.0)
    queue = RoutingQueue(serve, batch_size=64, max_wait=1)
    first, second = batches([3, 3])
    kept, run = queue.submit(first), serve.model.run_expert
    queue.submit(torch.randn(2, 3, 10, 10))  # of another kind: it runs by itself

    def failing(index, state):
        if state.batch_size == 2:
            raise RuntimeError("no memory")
        return run(index, state)

    serve.model.run_expert = failing
    with pytest.raises(RuntimeError, match="no memory"):
        queue.submit(second)
    assert list(queue.results() | queue.flush()) == [kept, 2]


@pytest.mark.parametrize("outside", ["submit", "flush", "neither"])
def test_inference_mode_may_hold_for_some_calls_only(outside):
    queue = RoutingQueue(SERVE, batch_size=64, max_wait=100)
    inputs = batches([3, 4])
    for x in inputs:
        with torch.inference_mode(outside != "submit"):
            queue.submit(x if outside == "submit" else x.clone())
    with torch.inference_mode(outside != "flush"):
        results = queue.flush()
    for ticket, x in enumerate(inputs):
        assert_equal_row_by_row(results[ticket], SERVE, x)
        assert not results[ticket].logits.is_inference()
        results[ticket].logits.add_(1)


def test_every_submission_runs_under_the_autocast_of_its_own():
    queue, inputs = RoutingQueue(SERVE, batch_size=64, max_wait=100), batches([3, 4, 3, 2])
    modes = [True, False, False, True]
    expected = []
    for x, mode in zip(inputs, modes, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode):
            queue.submit(x)
            expected.append(SERVE(x, return_routing=True))
    results = queue.flush()
    for ticket, (logits, used) in enumerate(expected):
        assert results[ticket].logits.dtype == logits.dtype
        assert torch.equal(results[ticket].num_experts_used, used)
        torch.testing.assert_close(results[ticket].logits, logits, rtol=2e-2, atol=2e-2)


def test_what_the_model_returned_is_not_written_into():
    serve, returned = serving(threshold=0.0), []
    run = serve.model.run_first if hasattr(serve.model, "run_first") else serve.model.start

    def remembered(*args, **kwargs):
        state, logits, features = run(*args, **kwargs)
        returned.append((logits, logits.clone()))
        return state, logits, features

    serve.model.start = remembered
    queue = RoutingQueue(serve, batch_size=4, max_wait=0)
    for x in batches([3, 2]):
        queue.submit(x)
    for logits, before in returned:
        assert torch.equal(logits, before)


def test_an_expert_runs_on_the_oldest_rows_and_never_on_more_than_a_batch():
    serve = serving(threshold=0.0)
    sizes = counted(serve)
    queue = RoutingQueue(serve, batch_size=5, max_wait=100)
    for x in batches([3, 4, 9]):
        queue.submit(x)
    assert max(size for index, size in sizes if index) == 5
    assert list(queue.results()) == [
        0,
        1,
    ]  # 15 of 16 rows are through, the last of the third is not
    assert queue.num_waiting == 1


def test_threads_share_a_queue():
    """Each waits for the others: else tickets are given twice and rows that run count as lost."""
    queue, rows, of_ticket, answers = RoutingQueue(SERVE, batch_size=8), batches([160])[0], {}, {}

    def submit(first):
        for row in range(first, len(rows), 4):
            ticket = queue.submit(rows[row : row + 1])
            of_ticket.setdefault(ticket, []).append(row)
            assert queue.num_waiting >= 0
            answers.update(queue.results())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(submit, range(4)))
    finally:
        sys.setswitchinterval(interval)
    answers.update(queue.flush())
    assert sorted(answers) == sorted(of_ticket) == list(range(160))
    expected = SERVE(rows, return_routing=True)
    for ticket, (row,) in of_ticket.items():
        assert answers[ticket].num_experts_used == expected.num_experts_used[row]
        torch.testing.assert_close(answers[ticket].logits[0], expected.logits[row])


def test_a_copy_of_a_queue_goes_on_by_itself():
    queue, x = RoutingQueue(SERVE, batch_size=100), batches([9])[0]
    queue.submit(x)
    other = copy.deepcopy(queue)
    assert_equal_row_by_row(other.flush()[0], SERVE, x)
    assert_equal_row_by_row(queue.flush()[0], SERVE, x)
