"""Each pair of the commands that write, at once, as processes of their own: whatever each says, the state is
whole afterwards. RAYLWAY_PAIRS=2 has each pair run twice."""

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
from tests.integration import whole
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAME = "pairs"
REPEATS = int(os.environ.get("RAYLWAY_PAIRS", "1"))
DONE, USER, GATE = 0, 2, 3
"""How a command may end: a mistake is told in one line, and a candidate may not pass."""

# What the watch does every few seconds, at this moment and in a process of its own.
LOOK = f"""
from app.cluster.session import session
from app.state.audit import Audit
from app.state.records import Records
with session(log_to_driver=False):
    from app.monitoring import bandit
    from app.serving.traffic import traffic
    from app.monitoring.follow import Follower
    audit = Audit()
    held = traffic.read_current(audit, {NAME!r})
    if held is not None:
        {{}}
"""
SCRIPTS = {
    "follow": LOOK.format(f"Follower().follow(audit, {NAME!r}, held)"),
    "bandit": LOOK.format(
        f"bandit.rebalance(audit, Records(), {NAME!r}, "
        'held._replace(traffic=held.traffic.model_copy(update={"policy": "bandit"})))'
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
        """Of the first version."""
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

    def must(self, command: str) -> subprocess.CompletedProcess:
        done = self.run(command)
        assert done.returncode == DONE, f"{command}: {done.stdout}{done.stderr}"
        return done

    def reset(self) -> None:
        """A champion, a challenger, and an endpoint that serves both."""
        while versions.find(NAME, versions.CHALLENGER) is None:
            self.must("train")
            self.bundle = versions.resolve(NAME, "1").path
        self.must("serve")


COMMANDS = (
    "train", "promote", "serve", "traffic", "compress", "sign", "token", "predict", "sweep", "undeploy",
    "follow", "bandit",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(ray_cluster, home, tmp_path_factory):
    made = Pairs(home, tmp_path_factory.mktemp("pairs"))
    projectfile.load(made.file, [])
    made.reset()
    yield made
    made.run("undeploy")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("one", "other"),
    [pytest.param(*pair, id="-".join(pair)) for pair in itertools.combinations_with_replacement(COMMANDS, 2)],
)
def test_two_commands_at_once_leave_everything_whole(pairs, one, other):
    for _ in range(REPEATS):
        pairs.reset()
        with ThreadPoolExecutor(2) as both:
            ended = dict(enumerate(both.map(pairs.run, (one, other))))
        for command, done in zip((one, other), ended.values(), strict=True):
            said = f"{command} beside {(one, other)}: {done.returncode}\n{done.stdout}{done.stderr}"
            assert done.returncode in (DONE, USER, GATE), said
            assert "Traceback" not in done.stderr, said
            if done.returncode == USER:
                assert done.stderr.strip().splitlines()[-1].startswith("error: "), said
        whole.check_log_and_registry(NAME)
        whole.check_endpoint(NAME)
        for command, done in zip((one, other), ended.values(), strict=True):
            if command == "token":
                public = KeySet.import_key_set(json.loads(issuer.jwks().read_text()))
                jwt.decode(done.stdout.strip(), public)
            elif command == "predict" and done.returncode == DONE:
                newest = max(pairs.folder.glob("out-*"), key=lambda path: path.stat().st_mtime)
                assert len(pd.read_parquet(newest)) == 300
