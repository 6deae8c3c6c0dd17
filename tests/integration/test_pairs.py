"""Run each pair of commands that write at the same time, in two processes. Whether a command succeeds or is
refused, the state is consistent afterwards. RAYLWAY_PAIRS=2 runs each pair twice."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import yaml
from joserfc import jwt
from joserfc.jwk import KeySet

from app.cluster.ports import free_ports
from app.config import projectfile
from app.data.sources import samples
from app.registry import versions
from app.serving.gateway import issuer
from tests.integration import consistency
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAME = "pairs"
REPEATS = int(os.environ.get("RAYLWAY_PAIRS", "1"))
DONE, USER_ERROR, GATE_REFUSED = 0, 2, 3
"""Exit codes that a command may have; a user error is one line."""

# What the watch does every few seconds, here at the same time as another command and in its own process.
WATCH = f"""
from app.cluster.session import session
from app.state.audit import Audit
from app.state.records import Records
with session(log_to_driver=False):
    from app.monitoring import bandit
    from app.serving.traffic import traffic
    from app.monitoring.follow import Follower
    audit = Audit()
    current = traffic.read_current(audit, {NAME!r})
    if current is not None:
        {{}}
"""
SCRIPTS = {
    "follow": WATCH.format(f"Follower().follow(audit, {NAME!r}, current)"),
    "bandit": WATCH.format(
        f"bandit.rebalance(audit, Records(), {NAME!r}, "
        'current._replace(traffic=current.traffic.model_copy(update={"policy": "bandit"})))'
    ),
}


class Pairs:
    """A project on the shared cluster, and its commands."""

    def __init__(self, home: Path, folder: Path):
        self.home, self.folder = home, folder
        self.file = folder / "pairs.yaml"
        self.file.write_text(yaml.safe_dump(self._project()))
        self.key = folder / "signing.pem"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", self.key], check=True)
        self.rows = folder / "rows.parquet"
        pd.read_parquet(samples.path("adult")).head(300).to_parquet(self.rows)
        self.bundle: Path | None = None
        """Bundle of the first version."""
        self.count, self.trials = itertools.count(1), itertools.count(1)

    def _project(self) -> dict:
        project = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
        project["name"] = NAME
        project["data"]["source"]["limit"] = 1500
        project["training"] |= {"num_workers": 1, "num_cpus": 0.2, "epochs": 1}
        project["sweep"]["set"] = {"training.batch_size": 64, "training.num_cpus": 0.2}
        project["gate"] = {"beat": [], "tolerance": 1.0}
        project["compression"] = {"max_loss": 0.5}
        project["serving"] |= {"port": free_ports(1)[0], "num_cpus": 0.1, "follow": True}
        return project

    def arguments(self, command: str) -> list[str]:
        number = next(self.count)
        file = str(self.file)
        return {
            "train": ["train", file, "--set", f"seed={number}"],
            "promote": ["promote", NAME, versions.CHALLENGER],
            "serve": ["serve", file],
            "traffic": ["traffic", NAME, "--champion", str(10 + number)],
            "compress": ["compress", str(self.bundle), "--register"],
            "sign": ["sign", f"{NAME}@champion"],
            "token": ["token", f"user-{number}", "--new-key"],
            "predict": [
                "predict",
                NAME,
                "--input",
                str(self.rows),
                "--output",
                str(self.folder / f"out-{number}"),
            ],
            "sweep": ["sweep", file, "--trials", str(next(self.trials))],
            "undeploy": ["undeploy", NAME],
        }[command]

    def run(self, command: str) -> subprocess.CompletedProcess:
        program = ["-c", SCRIPTS[command]] if command in SCRIPTS else ["-m", "app", *self.arguments(command)]
        environment = {**os.environ, "RAYLWAY_HOME": str(self.home), "RAYLWAY_SIGNING_KEY": str(self.key)}
        return subprocess.run(
            [sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )

    def run_successfully(self, command: str) -> subprocess.CompletedProcess:
        done = self.run(command)
        assert done.returncode == DONE, f"{command}: {done.stdout}{done.stderr}"
        return done

    def reset(self) -> None:
        """Ensure a champion, a challenger, and an endpoint that serves both."""
        while versions.find(NAME, versions.CHALLENGER) is None:
            self.run_successfully("train")
            self.bundle = versions.resolve(NAME, "1").path
        self.run_successfully("serve")


COMMANDS = (
    "train", "promote", "serve", "traffic", "compress", "sign", "token", "predict", "sweep", "undeploy",
    "follow", "bandit",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(ray_cluster, home, tmp_path_factory):
    pairs = Pairs(home, tmp_path_factory.mktemp("pairs"))
    projectfile.load(pairs.file, [])
    pairs.reset()
    yield pairs
    pairs.run("undeploy")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("one", "other"),
    [pytest.param(*pair, id="-".join(pair)) for pair in itertools.combinations_with_replacement(COMMANDS, 2)],
)
def test_two_commands_at_once_leave_a_consistent_state(pairs, one, other):
    for _ in range(REPEATS):
        pairs.reset()
        with ThreadPoolExecutor(2) as pool:
            processes = list(pool.map(pairs.run, (one, other)))
        for command, done in zip((one, other), processes, strict=True):
            output = f"{command} of {(one, other)}: {done.returncode}\n{done.stdout}{done.stderr}"
            assert done.returncode in (DONE, USER_ERROR, GATE_REFUSED), output
            assert "Traceback" not in done.stderr, output
            if done.returncode == USER_ERROR:
                assert done.stderr.strip().splitlines()[-1].startswith("error: "), output
        consistency.check_log_and_registry(NAME)
        consistency.check_endpoint(NAME)
        for command, done in zip((one, other), processes, strict=True):
            if command == "token":
                keys = KeySet.import_key_set(json.loads(issuer.jwks().read_text()))
                jwt.decode(done.stdout.strip(), keys)
            elif command == "predict" and done.returncode == DONE:
                newest = max(pairs.folder.glob("out-*"), key=lambda path: path.stat().st_mtime)
                assert len(pd.read_parquet(newest)) == 300
