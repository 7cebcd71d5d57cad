from engram_lm.analysis import cells


def test_cells_are_bounded_by_seeds_or_by_what_is_known_of_one():
    assert cells.mean([1.0, 2.0]) == "1.500"
    assert cells.mean([1_234], ",") == "1,234"
    assert cells.mean([0.5, -0.25], "+.3f") == "+0.125"
    for unknown in ([], [None], [1.0, None]):
        assert cells.mean(unknown) == cells.bounded(unknown) == "–"
    assert cells.bounded([1.0]) == "1.000"
    assert cells.bounded([1.0], within=(0.5, 1.25)) == "1.000 (0.500 to 1.250)"
    # Of three values 4.303 standard errors to each side, of two 12.706.
    assert cells.bounded([3.0, 1.0, 2.0], within=(0.5, 1.25)) == "2.000 (-0.484 to 4.484)"
    assert cells.bounded([0.7, 0.8], ".0%") == "75% (11% to 139%)"
    assert cells.ranged([3.0, 1.0, 1.0], ".1f") == "1.7 (1.0 to 3.0)"
    assert cells.ranged([], ".1f") == "–"


def test_an_estimate_tells_its_own_interval_and_several_that_of_their_mean():
    first = {"mean": 0.5, "low": 0.25, "high": 0.75}
    second = {"mean": 0.75, "low": None, "high": None}
    assert cells.estimated([first]) == "0.500 (0.250 to 0.750)"
    assert cells.estimated([second]) == "0.750"
    assert cells.estimated([first, second]) == "0.625 (-0.963 to 2.213)"
    assert cells.estimated([None]) == cells.estimated([first, None]) == "–"
