from engram_lm.analysis import cells


def test_cells_are_bounded_by_seeds_or_by_what_is_known_of_one():
    assert cells.mean([1.0, 2.0]) == "1.500"
    assert cells.mean([1_234], ",") == "1,234"
    assert cells.mean([0.5, -0.25], "+.3f") == "+0.125"
    for unknown in ([], [None], [1.0, None]):
        assert cells.mean(unknown) == cells.bounded(unknown) == "–"
    assert cells.bounded([1.0]) == "1.000"
    assert cells.bounded([1.0], within=(0.5, 1.25)) == "1.000 (0.500 to 1.250)"
    assert cells.bounded([3.0, 1.0], within=(0.5, 1.25)) == "2.000 (1.000 to 3.000)"
    assert cells.bounded([0.5, 1.0], ".0%") == "75% (50% to 100%)"


def test_an_estimate_tells_its_own_interval_and_several_their_range():
    first = {"mean": 0.5, "low": 0.25, "high": 0.75}
    second = {"mean": 0.75, "low": None, "high": None}
    assert cells.estimated([first]) == "0.500 (0.250 to 0.750)"
    assert cells.estimated([second]) == "0.750"
    assert cells.estimated([first, second]) == "0.625 (0.500 to 0.750)"
    assert cells.estimated([None]) == cells.estimated([first, None]) == "–"
