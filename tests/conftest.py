"""For all tests: the process exits with the status of the tests, even if a thread of Ray aborts at exit."""

from app.cli.finish import Finish

_FINISH = Finish()


def pytest_sessionfinish(session, exitstatus):
    _FINISH.status = int(exitstatus)
