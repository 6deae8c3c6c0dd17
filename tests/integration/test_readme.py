"""Every command of the README is run, in its order, by one shell."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from app.data import samples
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration

MAKE = {"make demo", "make test"}
"""Run by test_demo.py (the command behind it), and by whoever runs this."""


def commands() -> str:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).splitlines()
    assert set(lines) >= MAKE
    return "\n".join(line for line in lines if line not in MAKE)


@pytest.fixture
def checkout(tmp_path):
    """A checkout that nothing was run in, with this one's environment."""
    top = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for file in files:
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, top / file)
    # What its user has: rows to be answered.
    pd.read_parquet(samples.path("adult")).head(500).to_parquet(top / "rows.parquet")
    (top / ".venv").mkdir()
    (top / ".venv" / "bin").symlink_to(ROOT / ".venv" / "bin")
    return top


@pytest.mark.timeout(1200)  # it trains eight times
def test_every_command_of_the_readme_works(checkout, tmp_path):
    ours = ("RAY", "MLFLOW")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    script = f"set -euxo pipefail\ntrap '.venv/bin/raylway down' EXIT\n{commands()}"
    # Not in the checkout: Ray packs that twice for a job, and it has to be the same both times.
    log = tmp_path / "log"
    with log.open("w") as file:
        done = subprocess.run(
            ["bash", "-c", script], cwd=checkout, env=environment, stdout=file, stderr=file, timeout=1100
        )
    said = log.read_text()
    assert done.returncode == 0, said[-6000:]
    assert "income version 2 (challenger)" in said
    assert "smoke version 1 (champion)" in said
    assert "500 rows" in said
    assert re.search(r'"predictions":\[\{"probability":0\.\d+', said)


def test_the_tree_in_the_readme_is_the_tree():
    """Each file and folder that the README's tree names is there, and none of app/ is left out."""
    (tree,) = re.findall(r"```\n(app/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = {line.split()[0] for line in tree.splitlines() if re.match(r"  \S", line)}
    there = {f"{p.name}/" if p.is_dir() else p.name for p in Path(ROOT / "app").iterdir()}
    assert named == there - {"__init__.py", "__main__.py", "__pycache__/"}
    top = {line.split()[0].rstrip("/") for line in tree.splitlines() if not line.startswith(" ")}
    assert all((ROOT / name).exists() for name in top)
