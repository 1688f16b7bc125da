"""Where a chart's points go."""

import math

import pytest

from grasp_lora.report.charts import HEIGHT, WIDTH, Chart, Series, axis, drawing


def test_an_axis_is_linear_and_has_round_ticks_within():
    found = axis([0.0, 0.8], 50, 400)
    (zero, *_), labels = [at for at, _ in found.labels()], [text for _, text in found.labels()]
    assert labels == ["0", "0.2", "0.4", "0.6", "0.8"]
    step = found.at(0.2) - zero
    assert found.at(0.6) == pytest.approx(zero + 3 * step, abs=0.2)
    assert 50 < zero < found.at(0.8) < 400


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [3.0, 3.0, math.inf], [0.0]])
def test_any_values_have_an_axis(values):
    found = axis(values, 0, 100)
    assert found.low < found.high
    assert found.ticks


def test_lines_bands_and_points_are_in_the_picture_and_lost_losses_are_not():
    points = ((0.0, 1.0), (1.0, math.nan), (2.0, 3.0))
    series = Series("a", points, ((0.0, 0.5, 1.5), (1.0, math.nan, 2.0), (2.0, 2.0, 4.0)))
    drawn = drawing(Chart("t", "x", "y", (series,), (5.0, "here")))
    (one,) = drawn.series
    assert [(x, y) for x, y, _ in one.points] == [
        (drawn.x.at(0), drawn.y.at(1)),
        (drawn.x.at(2), drawn.y.at(3)),
    ]
    assert one.path == f"M{drawn.x.at(0):g},{drawn.y.at(1):g}L{drawn.x.at(2):g},{drawn.y.at(3):g}"
    assert one.band.count("L") == 3
    assert one.band.endswith("Z")
    assert drawn.y.at(4) < drawn.y.at(1), "higher values are higher up"
    assert 0 < drawn.x.at(0) < drawn.x.at(5) < WIDTH
    assert 0 < drawn.y.at(4) < drawn.y.at(0.5) < HEIGHT


def test_layers_and_steps_are_counted_and_ratios_are_not():
    def labels(*xs: float) -> list[str]:
        series = Series("a", tuple((x, 1.0) for x in xs))
        return [text for _, text in drawing(Chart("t", "x", "y", (series,))).x.labels()]

    assert labels(0, 1) == ["0", "1"]
    assert labels(0, 39) == ["0", "10", "20", "30", "40"]
    assert labels(0.0, 0.5) == ["0", "0.2", "0.4"]
