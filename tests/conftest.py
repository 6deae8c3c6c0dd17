"""For all tests: the process that ran them ends as they did, whatever Ray's threads do meanwhile."""

from app.cli.finish import Finish

_FINISH = Finish()


def pytest_sessionfinish(session, exitstatus):
    _FINISH.status = int(exitstatus)
