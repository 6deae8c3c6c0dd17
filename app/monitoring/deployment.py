"""The Ray Serve deployment that runs the watch. It answers no requests, so a crash affects none."""

from app.monitoring.watch import Watch, WatchReport
from app.serving.control.applications import create_deployment, run_application
from app.serving.control.replicas import try_broadcast
from app.serving.control.status import application_statuses
from app.serving.names import WATCH


class Monitor:
    """The only replica of the deployment: runs the watch for the cluster. Serve restarts it if it dies."""

    def __init__(self) -> None:
        self._watch = Watch(application_statuses)
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
    """Start the deployment, or replace it if its code has changed.

    Raises UserError if Serve cannot start it.
    """
    monitor = create_deployment(Monitor, WATCH, [], ray_actor_options={"num_cpus": 0})
    run_application(monitor.bind(), WATCH, WATCH, None)


def report() -> WatchReport | None:
    """State of the watch; None if it does not answer."""
    reports = try_broadcast(WATCH, WATCH, "report")
    return reports[0] if reports else None
