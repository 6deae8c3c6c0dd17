"""Run every command of the README and the manual, in one shell on one cluster.

The pages that train come first, because an endpoint takes CPUs from a training. A training that two pages
show is run once. Commands that need several machines or a long time are marked in the document;
tests/unit/test_documents.py parses them, and no test runs them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pandas as pd
import pytest

from app.data.sources import samples
from tests import documents
from tests.documents import README, ROOT

pytestmark = pytest.mark.integration

ORDER = (
    *("docs/training.md", "docs/sweeps.md", "docs/texts.md", "docs/recommendations.md", "README.md"),
    *("docs/serving.md", "docs/security.md", "CONTRIBUTING.md", "docs/operations.md"),
)
ONCE = re.compile(r"raylway (?:up|train|sweep)\b|ray job submit")
"""Commands that take long and change nothing when they are repeated."""


def commands() -> Iterator[str]:
    """The commands of all documents, without `make`: its targets have their own tests, or run this one."""
    seen = set()
    for name in ORDER:
        for block in documents.blocks(ROOT / name, "sh"):
            for command in [] if block.mark else block.commands():
                words = re.sub(r"\s+# .*", "", command)
                if words.startswith("make ") or (ONCE.search(words) and words in seen):
                    continue
                seen.add(words)
                yield f"# {block}\n{command}"


def test_no_document_with_commands_is_left_out():
    with_commands = {document for document in documents.DOCUMENTS if documents.blocks(document, "sh")}
    assert {ROOT / name for name in ORDER} == with_commands
    assert README in with_commands


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout without ignored files, with a link to the virtual environment."""
    top = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for file in files:
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, top / file)
    # The documents predict for a user's file rows.parquet.
    pd.read_parquet(samples.path("adult")).head(500).to_parquet(top / "rows.parquet")
    (top / ".venv").mkdir()
    (top / ".venv" / "bin").symlink_to(ROOT / ".venv" / "bin")
    # An HTTP error ends the script, and curl prints the body.
    (top / ".curlrc").write_text("fail-with-body\n")
    return top


@pytest.mark.timeout(1500)  # it trains nine times
def test_every_command_of_the_documents_works(checkout, tmp_path):
    prefixes = ("RAY", "MLFLOW")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    environment["CURL_HOME"] = str(checkout)
    # Each line of the log begins with the seconds since the start.
    script = "\n".join(
        ["PS4='+ $SECONDS s: '", "set -euxo pipefail", "trap '.venv/bin/raylway down' EXIT", *commands()]
    )
    # Not in the checkout, which must not change while Ray packs it twice for a job.
    log = tmp_path / "log"
    with log.open("w") as file:
        done = subprocess.run(
            ["bash", "-c", script], cwd=checkout, env=environment, stdout=file, stderr=file, timeout=1400
        )
    output = log.read_text()
    assert done.returncode == 0, output[-6000:]
    assert "smoke version 1 (champion)" in output
    assert "(challenger)" in output
    assert "500 rows" in output
    assert re.search(r'"predictions":\[\{"probability":0\.\d+', output)
    assert re.findall(r'{"request_id":"(r-1|order-17)","status":"stored"}', output) == ["r-1", "order-17"]
    assert re.search(r"stopped the cluster at", output)
    assert (checkout / "docs" / "keys.md").read_text() == (ROOT / "docs" / "keys.md").read_text()
