"""A trial as a subclass of Tune's Trainable."""

import inspect
import re

from ray.tune import Trainable

from app.tuning.trial import Trial

CALLED_BY_TUNE = {"setup", "step", "cleanup", "reset_config", "save_checkpoint", "load_checkpoint"}


def attributes(cls: type) -> set[str]:
    """Names that a class defines, and those that its methods assign to `self`."""
    return {*vars(cls), *re.findall(r"\bself\.(\w+)(?::.*?)? = ", inspect.getsource(cls))}


def test_a_trial_overrides_only_what_tune_calls():
    """Private attributes count too: Trainable's `_last_result`, for example, hides a method of that name."""
    shared = attributes(Trial) & attributes(Trainable)
    assert "_last_result" in attributes(Trainable)
    assert {name for name in shared if not name.startswith("__")} == CALLED_BY_TUNE
