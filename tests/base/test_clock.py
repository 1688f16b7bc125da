"""Test the clock of wall times with a clock that is turned by hand."""

import pytest

from grasp_lora.base.clock import OUTSIDE, PARTS, SUMMARY_COLUMNS, Clock, SpanTotals, time_summary
from hands import Hands


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def clock(hands):
    return Clock(now=hands)


def total(clock: Clock) -> float:
    return sum(s.seconds for parts in clock.times().values() for s in parts.values())


def fail_after(seconds: float, hands: Hands) -> None:
    hands.pass_(seconds)
    raise KeyError


def test_an_inner_span_is_taken_out_of_the_outer_one(clock, hands):
    with clock.stage("search"), clock.span("step"):
        hands.pass_(1)
        with clock.span("masks"):
            hands.pass_(2)
            with clock.span("masks"):
                hands.pass_(4)
        hands.pass_(8)
    found = clock.times()["search"]
    assert found == {"idle": SpanTotals(0, 0), "step": SpanTotals(9, 1), "masks": SpanTotals(6, 2)}


def test_idle_is_the_wall_time_less_all_spans(clock, hands):
    hands.pass_(3)
    with clock.stage("search"):
        hands.pass_(1)
        with clock.span("probe"):
            hands.pass_(5)
        hands.pass_(2)
    hands.pass_(7)
    assert clock.wall() == 18
    assert clock.times() == {
        OUTSIDE: {"idle": SpanTotals(10, 0)},
        "search": {"idle": SpanTotals(3, 0), "probe": SpanTotals(5, 1)},
    }


def test_time_outside_the_stages_has_parts_too(clock, hands):
    with clock.span("load"):
        hands.pass_(2)
    assert clock.times()[OUTSIDE]["load"] == SpanTotals(2, 1)


def test_a_stage_in_a_stage_takes_its_time_along(clock, hands):
    with clock.stage("outer"):
        with clock.stage("inner"), clock.span("step"):
            hands.pass_(2)
        with clock.span("step"):
            hands.pass_(3)
    assert clock.times()["inner"]["step"] == SpanTotals(2, 1)
    assert clock.times()["outer"]["step"] == SpanTotals(3, 1)


def test_a_span_whose_body_raises_is_closed_and_counted(clock, hands):
    with pytest.raises(KeyError), clock.stage("search"), clock.span("probe"):
        fail_after(2, hands)
    hands.pass_(5)
    assert clock.times()["search"]["probe"] == SpanTotals(2, 1)
    assert clock.times()[OUTSIDE]["idle"] == SpanTotals(5, 0)


def test_events_open_and_end_a_span(clock, hands):
    with clock.stage("final"):
        for _ in range(2):
            clock.start("step")
            hands.pass_(2)
            clock.stop("step")
            hands.pass_(1)
    assert clock.times()["final"] == {"idle": SpanTotals(2, 0), "step": SpanTotals(4, 2)}


def test_a_span_left_open_by_an_error_ends_with_the_one_around_it(clock, hands):
    def training() -> None:
        clock.start("step")
        fail_after(2, hands)

    with pytest.raises(KeyError), clock.stage("final"):
        training()
    hands.pass_(5)
    clock.stop("step")
    hands.pass_(6)
    assert clock.times()["final"]["step"] == SpanTotals(2, 1)
    assert clock.times()[OUTSIDE]["idle"] == SpanTotals(11, 0)


def test_ending_a_span_ends_what_is_open_inside_it(clock, hands):
    clock.start("step")
    clock.start("masks")
    hands.pass_(1)
    clock.stop("step")
    hands.pass_(2)
    assert clock.times()[OUTSIDE] == {
        "idle": SpanTotals(2),
        "step": SpanTotals(0, 1),
        "masks": SpanTotals(1, 1),
    }


def test_the_running_span_is_counted_up_to_now(clock, hands):
    with clock.span("load"):
        hands.pass_(4)
        assert clock.times()[OUTSIDE]["load"] == SpanTotals(4, 1)
        assert clock.wall() == 4
        hands.pass_(1)
    assert clock.times()[OUTSIDE]["load"] == SpanTotals(5, 1)


@pytest.mark.parametrize("name", ["Step", "nonsense", "idle"])
def test_only_known_parts_can_be_measured(clock, name):
    with pytest.raises(ValueError, match="name one of step, baseline, probe"), clock.span(name):
        pass
    with pytest.raises(ValueError, match="no part of a run"):
        clock.start(name)


def test_a_detailed_clock_waits_for_the_device_at_both_edges(hands):
    waits: list[float] = []

    def wait() -> None:
        waits.append(hands.time)
        hands.pass_(1)

    clock = Clock(synchronize=wait, now=hands)
    hands.pass_(10)
    with clock.span("step"):
        hands.pass_(20)
    assert waits == [110, 131], "work that was queued before a span is not charged to it"
    assert clock.times()[OUTSIDE]["step"] == SpanTotals(21, 1)


def test_times_of_an_earlier_process_are_added(clock, hands):
    with clock.stage("search"), clock.span("step"):
        hands.pass_(2)
    later = Clock(now=hands)
    later.add(clock.to_json())
    with later.stage("search"), later.span("step"):
        hands.pass_(3)
    hands.pass_(1)
    assert later.times()["search"]["step"] == SpanTotals(5, 2)
    assert later.wall() == total(later) == 6
    assert later.to_json()["resumed"] == 1


def test_a_stage_done_before_keeps_its_added_times_or_has_none(clock, hands):
    with clock.stage("search"), clock.span("step"):
        hands.pass_(2)
    later = Clock(now=hands)
    later.add(clock.to_json())
    later.skip("search")
    later.skip("merged")
    assert later.times()["search"]["step"] == SpanTotals(2, 1)
    assert later.times()["merged"] == {}


def test_times_count_as_synchronized_only_if_all_of_them_are(hands):
    detailed = Clock(synchronize=lambda: None, now=hands)
    assert detailed.to_json()["synchronized"]
    detailed.add(Clock(now=hands).to_json())
    assert not detailed.to_json()["synchronized"]


def test_the_summary_shares_out_the_whole_wall_time(clock, hands):
    hands.pass_(1)
    with clock.stage("search"):
        for part in [name for name in PARTS if name != "idle"]:
            with clock.span(part):
                hands.pass_(1)
    summary = time_summary(clock.to_json())
    assert summary["wall_seconds"] == 11
    assert summary["stages"] == {OUTSIDE: 1, "search": 10}
    assert sum(summary["shares"].values()) == pytest.approx(1)
    assert summary["shares"]["I/O"] == pytest.approx(3 / 11)
    assert summary["shares"]["probe"] == summary["shares"]["evaluation"] == pytest.approx(2 / 11)


def test_the_summary_names_every_part_once():
    assert sorted(part for parts in SUMMARY_COLUMNS.values() for part in parts) == sorted(PARTS)


def test_the_summary_tells_a_stage_without_times_from_a_quick_one(clock, hands):
    hands.pass_(1)
    clock.skip("merged")
    with clock.stage("search"):
        pass
    stages = time_summary(clock.to_json())["stages"]
    assert list(stages.items()) == [("merged", None), ("search", 0), (OUTSIDE, 1)]
