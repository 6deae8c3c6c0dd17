"""The Ray Serve deployment that runs the watch. It answers no requests, so a crash touches none."""

from app.monitoring.watch import Watch, WatchReport
from app.serving.control.applications import deployment, run
from app.serving.control.status import ask_replicas, statuses
from app.serving.names import WATCH


class Monitor:
    """The only replica of the deployment: runs the watch for the cluster. Serve restarts it if it dies."""

    def __init__(self) -> None:
        self._watch = Watch(statuses)
        self._watch.start()

    def __del__(self) -> None:
        self._watch.stop()

    def check_health(self) -> None:
        """Raise RuntimeError if the watch has ended. Called by Serve, which then replaces the replica."""
        if not self._watch.is_alive():
            raise RuntimeError("the thread that watches the endpoints has ended")

    def report(self) -> WatchReport:
        """State of the watch. Called by `raylway status`."""
        return self._watch.report()


def start() -> None:
    """Start the deployment, or replace it if its code has changed. Raises UserError if Serve cannot."""
    monitor = deployment(Monitor, WATCH, [], ray_actor_options={"num_cpus": 0})
    run(monitor.bind(), WATCH, WATCH, None)


def report() -> WatchReport | None:
    """State of the watch; None if it does not answer."""
    reports = ask_replicas(WATCH, WATCH, "report")
    return reports[0] if reports else None
