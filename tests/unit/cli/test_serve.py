"""`raylway status`: hooks without effect."""

from app.state import hooks
from tests.commands import raylway

FAULT = "Ray Train did not call Trainer._create_default_callbacks"


def test_status_shows_hooks_without_effect_also_if_no_cluster_is_up(home):
    hooks.report("training", [FAULT])
    process = raylway("status")
    assert f"without effect: training: {FAULT}" in process.stdout.splitlines()
    assert (process.returncode, "no cluster is up" in process.stderr) == (2, True)
    hooks.report("training", [])
    assert "without effect" not in raylway("status").stdout
