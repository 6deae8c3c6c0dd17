"""Kill a promotion before or after one of its writes."""

from mlflow.tracking import MlflowClient

from app.registry import promotion
from app.state.audit import Audit


class Killed(BaseException):
    """Raised instead of killing the process."""


def kill_at(monkeypatch, write, when):
    """Kill a promotion before or after one of its writes: raise Killed there."""
    owner, name = {
        "intent": (Audit, "add"),
        "champion": (MlflowClient, "set_registered_model_alias"),
        "challenger": (MlflowClient, "delete_registered_model_alias"),
        "end": (Audit, "add"),
    }[write]
    original = getattr(owner, name)

    def killed(self, *arguments, **options):
        if owner is Audit and (arguments[0] == promotion.PROMOTING) != (write == "intent"):
            return original(self, *arguments, **options)
        if when == "after":
            original(self, *arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, killed)
