import os

import pytest

from app.jobs.demo import demo_home
from app.state.home import home


@pytest.mark.parametrize("is_set", [True, False])
def test_the_demo_has_an_empty_state_directory_of_its_own(tmp_path, monkeypatch, is_set):
    monkeypatch.chdir(tmp_path)
    if is_set:
        monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "mine"))
    else:
        monkeypatch.delenv("RAYLWAY_HOME", raising=False)
    outer = home()
    (outer / "demo" / "old").mkdir(parents=True)
    with demo_home():
        assert home() == outer / "demo"
        assert not home().exists()
    assert home() == outer
    assert ("RAYLWAY_HOME" in os.environ) == is_set
