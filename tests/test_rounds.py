"""Rounds: who is measured when, and what is made of the times."""

from pipeline.bench.rounds import Spread, interleave, ratio


def test_everything_is_called_in_turn_round_by_round():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    interleave(calls, {"a": 3, "b": 1, "c": 2}, pause_s=0)
    assert called == ["a", "b", "c", "a", "c", "a"]


def test_seconds_are_those_of_the_call_alone():
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    calls = {"short": lambda: take(1.0), "long": lambda: take(2.5)}
    seconds = interleave(calls, {"short": 2, "long": 2}, pause_s=0, clock=lambda: now[0])
    assert seconds == {"short": [1.0, 1.0], "long": [2.5, 2.5]}


def test_no_calls_take_no_rounds():
    assert interleave({}, {}) == {}


def test_a_ratio_is_the_median_over_rounds_not_that_of_medians():
    ours, rival = [1.0, 2.0, 4.0], [3.0, 4.0, 20.0]  # round by round 3, 2, 5 times
    assert ratio(ours, rival) == 3.0


def test_a_ratio_leaves_out_the_rounds_of_one_alone():
    assert ratio([1.0, 1.0, 100.0], [2.0, 4.0]) == 3.0
    assert ratio([1.0], [2.0, 400.0]) == 2.0


def test_a_spread_is_median_least_and_most():
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)
