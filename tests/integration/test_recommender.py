"""A recommender from interactions to recommendations: two Horovod workers, the gate, and HTTP."""

import json

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from app.cluster.ports import free_ports
from app.config import projectfile
from app.serving.control import deploy
from app.serving.control.undeploy import undeploy_all
from app.serving.traffic import registered

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
NUM_USERS, NUM_ITEMS = 60, 40
TEXT = """\
name: films
data:
  source: {{path: {path}}}
  interactions: {{user: who, item: what, time: when}}
  columns:
    who: {{type: category, unseen: ignore}}
    what: {{type: category}}
model: {{kind: ncf, width: 8, hidden: [8], negatives: 40}}
training: {{num_workers: 2, epochs: 8, batch_size: 32, learning_rate: 0.03}}
gate: {{metric: hr@10, minimum: {{hr@10: 0.5}}, beat: [popularity]}}
serving:
  port: {port}
  variants:
    champion: {{version: champion, weight: 1}}
"""


@pytest.fixture(scope="module")
def rows():
    """Interactions of users of two kinds, each with 12 of the 20 items of that kind; times often tie."""
    random = np.random.default_rng(0)
    return [
        (f"u{user}", f"i{item + user % 2 * NUM_ITEMS // 2}", position // 2)
        for user in range(NUM_USERS)
        for position, item in enumerate(random.permutation(NUM_ITEMS // 2)[:12])
    ]


@pytest.fixture
def file(tmp_path, rows):
    columns = dict(zip(("who", "what", "when"), zip(*rows, strict=True), strict=True))
    parquet.write_table(
        pa.table({n: list(values) for n, values in columns.items()}), tmp_path / "rows.parquet"
    )
    file = tmp_path / "films.yaml"
    (port,) = free_ports(1)
    file.write_text(TEXT.format(path=tmp_path / "rows.parquet", port=port))
    return file


def test_a_recommender_is_trained_registered_and_served(raylway, ray_cluster, file, rows):
    done = raylway("train", str(file), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600 train, 60 validation, 60 test rows" in done.stdout
    assert "films version 1 (champion)" in done.stdout

    project = projectfile.load(file)
    traffic, _ = registered.registered_traffic(project.name, project.serving)
    card = (traffic.variants["champion"].path / "card.md").read_text()
    assert "which `what` a `who` takes next" in card
    assert "| ease |" in card
    test = json.loads((traffic.variants["champion"].path / "metrics.json").read_text())
    assert test["model"]["hr@10"] > test["baselines"]["popularity"]["hr@10"]

    url = deploy.deploy(project.serving, project.name, traffic)
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
            check_answers(client, rows)
    finally:
        undeploy_all()


def check_answers(client: httpx.Client, rows: list[tuple[str, str, int]]) -> None:
    predict = "/v2/models/films/predict"
    answer = client.post(predict, json={"rows": [{"who": "u3"}, {"who": "nobody"}], "k": 5}).json()
    known_user, new_user = answer["predictions"]
    assert (known_user["known"], new_user["known"]) == (True, False)
    assert len(known_user["items"]) == len(new_user["items"]) == 5
    of_kind = [f"i{item + NUM_ITEMS // 2}" for item in range(NUM_ITEMS // 2)]
    assert set(known_user["items"]) <= set(of_kind), "items of the other kind"
    interacted = [what for who, what, when in rows if who == "u3" and when < 5]
    assert not set(known_user["items"]) & set(interacted), "items from the user's training interactions"

    request = {
        "inputs": [{"name": "who", "datatype": "BYTES", "shape": [1, 1], "data": ["u3"]}],
        "parameters": {"k": 5},
    }
    items = client.post("/v2/models/films/infer", json=request).json()["outputs"][0]
    assert (items["name"], items["data"]) == ("items", known_user["items"])

    for body, path in (
        ({"rows": [{"who": "u3"}], "k": 0}, "k"),
        ({"rows": [{"who": 3}]}, "rows.0.who"),
        ({"rows": [{}]}, "rows.0.who"),
    ):
        refused = client.post(predict, json=body)
        assert (refused.status_code, refused.json()["violations"][0]["path"]) == (422, path)
