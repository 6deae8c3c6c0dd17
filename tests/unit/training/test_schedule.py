import itertools

import pytest

from app.config import Training
from app.training.schedule import peak, rate


def training(**settings) -> Training:
    return Training(num_workers=4, epochs=10, batch_size=8, learning_rate=0.2, **settings)


def rates(settings: Training, count: int = 100) -> list[float]:
    """The learning rate at so many moments of a training and at its end."""
    return [rate(settings, 4, settings.epochs * i / count) for i in range(count + 1)]


@pytest.mark.parametrize(("scaling", "expected"), [("none", 0.2), ("sqrt", 0.4), ("linear", 0.8)])
def test_the_peak_grows_with_the_workers(scaling, expected):
    assert peak(training(scale_learning_rate=scaling), 4) == pytest.approx(expected)
    assert peak(training(scale_learning_rate=scaling), 1) == pytest.approx(0.2)


def test_the_cosine_falls_from_the_peak_to_0():
    values = rates(training())
    assert values[0] == 0.2
    assert values[50] == pytest.approx(0.1)
    assert values[25] == pytest.approx(0.2 * 0.8535533905932737)
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert all(before > after for before, after in itertools.pairwise(values))


def test_the_linear_schedule_falls_evenly():
    assert rates(training(schedule="linear"), 4) == pytest.approx([0.2, 0.15, 0.1, 0.05, 0])


def test_a_constant_rate_stays():
    assert set(rates(training(schedule="constant"))) == {0.2}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_0_to_the_peak_where_the_schedule_begins(schedule):
    settings = training(schedule=schedule, warmup_epochs=2.5, scale_learning_rate="sqrt")
    values = rates(settings, 4)
    assert values[0] == 0
    assert values[1] == pytest.approx(0.4)
    assert rate(settings, 4, 1.25) == pytest.approx(0.2)
    assert rate(settings, 4, 2.4999) == pytest.approx(0.4, rel=1e-3)
    assert values[4] == pytest.approx(0.4 if schedule == "constant" else 0, abs=1e-12)


def test_a_training_may_be_all_warm_up():
    settings = training(warmup_epochs=10)
    assert rate(settings, 1, 9.99) == pytest.approx(0.2, rel=1e-2)
