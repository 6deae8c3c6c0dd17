from app.serving.backoff import FIRST_DELAY_S, MAX_DELAY_S, Backoff


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_delays_double_up_to_a_bound():
    clock = Clock()
    backoff = Backoff(clock)
    delays = []
    for _ in range(10):
        assert backoff.due()
        backoff.failed()
        failed_at = clock.now
        while not backoff.due():
            clock.now += 0.5
        delays.append(clock.now - failed_at)
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays[-1] == MAX_DELAY_S


def test_after_a_success_the_next_try_is_due_and_delays_start_anew():
    clock = Clock()
    backoff = Backoff(clock)
    for _ in range(5):
        backoff.failed()
    backoff.succeeded()
    assert backoff.due()
    backoff.failed()
    clock.now += FIRST_DELAY_S
    assert backoff.due()
