import pytest

from clinfuse.callbacks.progress import headline


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (450, 0.4, "Step 450/2400, 13 min left"),
        (0, 6.0, "Step 0/2400, 4.0 h left"),
        (2399, 1.0, "Step 2399/2400, under a minute left"),
    ],
)
def test_the_time_left_is_that_of_the_steps_left(step, seconds, expected):
    assert headline(step, 2400, seconds) == expected


def test_a_training_without_an_end_shows_its_step():
    assert headline(7, float("inf"), 1.0) == "Step 7"
