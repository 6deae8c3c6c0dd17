"""For all tests: the exit status, and who runs which test if there are several processes."""

import signal

import pytest

from app.cli.finish import Finish

_FINISH = Finish()  # the process exits with the status of the tests, even if a thread of Ray aborts at exit


def pytest_sessionstart(session):
    # A process of pytest-xdist ignores Ctrl-C, and every process that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session, exitstatus):
    _FINISH.status = int(exitstatus)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process runs all integration tests, which share a cluster; the others take files of unit tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "integration" if file.startswith("tests/integration/") else file

    return Scheduler(config, log)
