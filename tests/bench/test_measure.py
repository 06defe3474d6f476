"""The measuring tools measure what they say."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from bench import measure
from bench.measure import Limits, Plan, count_launches, machine_limits, peak_memory, time_peers

CPU = torch.device("cpu")
KIB = 1024


def test_views_and_in_place_ops_take_no_memory():
    x = torch.zeros(64, KIB)

    def call():
        x.add_(1)
        return x.view(-1)[10:].unsqueeze(0).expand(3, -1)

    memory = peak_memory(call, CPU)
    assert memory.peak < KIB  # a scalar at most
    assert memory.held == 0


def test_peak_counts_what_lives_at_the_same_time():
    x = torch.zeros(64 * KIB)  # 256 KiB

    def call():
        y = x + x
        z = y * y
        del y
        return z - z  # z and the result live here, y does not

    memory = peak_memory(call, CPU)
    assert memory.peak == pytest.approx(2 * x.nbytes, abs=KIB)
    assert memory.held == 0


def test_peak_includes_what_earlier_calls_keep():
    x, kept = torch.zeros(64 * KIB), []

    def call():
        kept.append(x + 1)

    memory = peak_memory(call, CPU)
    assert memory.held == pytest.approx(2 * x.nbytes, abs=KIB)
    assert memory.peak == pytest.approx(2 * x.nbytes, abs=KIB)


def test_memory_of_a_backward_pass_is_seen():
    w = torch.zeros(64 * KIB, requires_grad=True)

    def call():
        w.grad = None
        (w * 2).exp().sum().backward()

    assert peak_memory(call, CPU).peak >= 2 * w.nbytes


@pytest.mark.parametrize("inference", [False, True])
def test_launches_are_ops_that_compute(inference):
    x, linear = torch.randn(2, 3, 8), torch.nn.Linear(8, 8, bias=False)

    def call():
        with torch.inference_mode(inference), torch.no_grad():
            y = linear(x)  # one mm between reshapes
            a, b = y.transpose(0, 1).chunk(2, dim=-1)
            return torch.empty(2).fill_(0), a.add_(b), y.unflatten(-1, (2, 4)).flatten(0, 1)

    assert count_launches(call, CPU) == 3  # mm, fill_, add_


def test_peers_are_timed_in_turns_and_their_copies_in_rotation():
    seen: list[str] = []

    def calls(name):
        return [lambda i=i: (seen.append(f"{name}{i}"), time.sleep(0.002)) for i in range(2)]

    timings = time_peers({"a": calls("a"), "b": calls("b")}, Plan(samples=3, seconds=0.05, sample_ms=0.1), CPU)
    turns = [name[0] for name in seen[8:]]  # after the warm-up: two calls and two estimates each
    assert turns[:4] == ["a", "b", "b", "a"]
    a = [name for name in seen if name[0] == "a"]
    assert all(first != second for first, second in itertools.pairwise(a))
    assert {name: t.samples for name, t in timings.items()} == {"a": len(turns) // 2, "b": len(turns) // 2}
    for t in timings.values():
        assert t.low_ms <= t.median_ms <= t.high_ms
        assert t.median_ms >= 2


def test_short_calls_are_repeated_within_a_sample():
    count = 0

    def call():
        nonlocal count
        count += 1
        time.sleep(0.001)

    timing = time_peers({"a": [call]}, Plan(samples=3, seconds=0.05, sample_ms=5), CPU)["a"]
    assert count >= 3 * timing.samples
    assert timing.median_ms < 4


def test_disturbed_samples_do_not_count():
    taken = [(1.0, False), (1.1, False), (1.2, False), (9.0, True), (9.0, True), (9.0, True), (9.0, True)]
    timing = measure._timing(taken, only_clean=True)
    assert timing.median_ms == pytest.approx(1100)
    assert (timing.samples, timing.disturbed, timing.reliable) == (7, 4, True)


def test_too_few_undisturbed_samples_are_said_to_be_unreliable():
    timing = measure._timing([(1.0, False), (9.0, True), (9.0, True)], only_clean=False)
    assert timing.median_ms == pytest.approx(9000)
    assert not timing.reliable


def test_an_undisturbed_peer_is_not_held_against_a_disturbed_one(monkeypatch):
    monkeypatch.setattr(measure, "_sample", lambda rotation, iterations, device: next(rotation)())
    # The warm-up takes three: of b's samples only the first is undisturbed.
    b = itertools.chain([(1.0, False)] * 4, itertools.repeat((9.0, True)))
    calls = {"a": [lambda: (1.0, False)], "b": [lambda: next(b)]}
    timings = time_peers(calls, Plan(samples=5, seconds=0.02), CPU)
    assert timings["a"].disturbed == 0
    assert timings["b"].median_ms == 9000  # all samples count, the disturbed too
    assert not timings["b"].reliable


def test_one_sample_is_its_own_median():
    timing = measure._timing([(1.0, True)], only_clean=False)
    assert (timing.low_ms, timing.median_ms, timing.high_ms) == (1000, 1000, 1000)


def test_waiting_for_a_quiet_machine_ends():
    began = time.monotonic()
    measure.wait_until_quiet(began + 0.1)
    assert time.monotonic() - began < 5


def test_run_queue_wait_only_grows():
    before = measure.run_queue_wait()
    assert 0 <= before <= measure.run_queue_wait()


def test_limits():
    limits = Limits(bytes_per_s=10, flops_per_s=100)
    assert limits.seconds(nbytes=20, flops=100) == 2
    assert limits.seconds(nbytes=20, flops=500) == 5
    assert limits.raised(None) == limits
    assert limits.raised(Limits(20, 50)) == Limits(20, 100)


def test_the_machine_has_limits(monkeypatch):
    monkeypatch.setattr(measure, "wait_until_quiet", lambda deadline: None)
    limits = machine_limits(CPU, torch.float32, seconds=0)
    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e15
