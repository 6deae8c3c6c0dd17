"""A trial as a subclass of Tune's Trainable."""

import inspect
import re

from ray.tune import Trainable

from app.tuning.trial import Trial

CALLED_BY_TUNE = {"setup", "step", "cleanup", "reset_config", "save_checkpoint", "load_checkpoint"}


def attributes(of: type) -> set[str]:
    """Names that a class defines, and those that its methods assign to `self`."""
    return {*vars(of), *re.findall(r"\bself\.(\w+)(?::.*?)? = ", inspect.getsource(of))}


def test_a_trial_overrides_only_what_tune_calls():
    """Neither a private attribute: Trainable's `_last_result`, for example, hides a method of this name."""
    shared = attributes(Trial) & attributes(Trainable)
    assert "_last_result" in attributes(Trainable)
    assert {name for name in shared if not name.startswith("__")} == CALLED_BY_TUNE
