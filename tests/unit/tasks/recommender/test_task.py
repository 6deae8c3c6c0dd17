import copy
import json
import math
from typing import Any

import numpy as np
import onnxruntime
import orjson
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from app.bundle.bundle import Bundle, write_example
from app.bundle.manifest import BrokenBundle
from app.config import Project
from app.data import interactions, split
from app.data.interactions import AGE, ITEM, RATING, USER, fit, leave_one_out
from app.data.prepare import Prepared
from app.errors import UserError
from app.evaluation import ranking
from app.serving.http import Refused
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Answer, Contract
from app.serving.traffic.variants import common_schema
from app.tasks import baselines_of, task_of
from app.tasks.recommender.graph import LOWEST, difference
from app.tasks.recommender.network import bpr, recommender, softmax
from app.tasks.recommender.packager import Packager
from app.tasks.recommender.task import Task as Recommender

NUM_USERS, NUM_ITEMS = 30, 40
PROJECT: dict[str, Any] = {
    "name": "films",
    "data": {
        "source": {"path": "unused.parquet"},
        "interactions": {"user": "who", "item": "what", "time": "when", "rating": "stars"},
        "columns": {
            "who": {"type": "category", "unseen": "ignore"},
            "what": {"type": "category"},
            "stars": {"type": "number", "min": 1, "max": 5},
        },
    },
    "model": {"kind": "mf", "width": 8, "negatives": 16},
    "training": {"num_workers": 1, "epochs": 1, "batch_size": 32, "learning_rate": 0.05},
    "gate": {"metric": "hr@10", "beat": ["popularity"]},
    "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
}
NCF = {"kind": "ncf", "width": 8, "hidden": [8, 4], "negatives": 16}


def project(**changes: Any) -> Project:
    document = copy.deepcopy(PROJECT)
    document.update(changes)
    return Project.model_validate(document)


def model(**changes: Any) -> Project:
    return project(model={**PROJECT["model"], **changes})


def frame(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    """Interactions (user, item, time), all of three stars."""
    found = pd.DataFrame(rows, columns=[USER, ITEM, split.TIME])
    return found.assign(**{RATING: 3.0})


class Rows:
    """As much of Ray Data as `interactions.build` uses."""

    def __init__(self, table: pa.Table):
        self.table = table

    def map_batches(self, function, fn_args, **_):
        return Rows(function(self.table, *fn_args))

    def to_pandas(self) -> pd.DataFrame:
        return self.table.to_pandas()


def taste() -> pa.Table:
    """Users of two kinds, each of whom had 12 of the 20 items of their kind."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item + user % 2 * NUM_ITEMS // 2}", float(1 + item % 5), float(place))
        for user in range(NUM_USERS)
        for place, item in enumerate(random.permutation(NUM_ITEMS // 2)[:12])
    ]
    return pa.table(
        dict(zip(("who", "what", "stars", "when"), map(list, zip(*rows, strict=True)), strict=True))
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    interactions.build(Rows(taste()), project().data, "some-version", folder)
    return Prepared(folder, cached=False)


def trained(task: Recommender, epochs: int = 30, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = task.network()
        optimizer = torch.optim.AdamW(task.parameter_groups(network), lr=0.05)
        arrays = arrays_of(task, "train")
        for _ in range(epochs):
            for rows in torch.randperm(len(arrays["user"])).split(64):
                optimizer.zero_grad()
                network.loss(*task.batch(arrays, rows)).backward()
                optimizer.step()
    return network.eval()


def arrays_of(task: Recommender, part: str) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(a) for name, a in task.arrays(task.prepared.frame(part)).items()}


def bundle_of(task: Recommender, network: torch.nn.Module, folder) -> Bundle:
    folder.mkdir()
    assert Packager(task).export(network, folder) < 1e-4
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "schema.json").write_text(Packager(task).schema().model_dump_json())
    (folder / "project.json").write_text(task.project.model_dump_json())
    opened = Bundle(folder, sealed=False)
    write_example(opened, task.prepared.frame("test"))
    return opened


@pytest.fixture(scope="module", params=["mf", "ncf"])
def made(request, prepared, tmp_path_factory):
    """A task, its trained network and its bundle."""
    task = Recommender(project(model=NCF if request.param == "ncf" else PROJECT["model"]), prepared)
    network = trained(task)
    return task, network, bundle_of(task, network, tmp_path_factory.mktemp("bundles") / request.param)


# The split


def test_the_last_is_test_and_the_one_before_it_validation():
    parts = leave_one_out(frame([("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("a", "w", 0)]))
    assert parts["test"][ITEM].tolist() == ["x"]
    assert parts["validation"][ITEM].tolist() == ["z"]
    train = parts["train"].set_index(ITEM)[AGE]
    assert train.to_dict() == {"w": 0.5, "y": 0.0}, "one of two came later than w"


def test_who_has_fewer_than_three_is_in_the_training_part_alone():
    parts = leave_one_out(frame([("a", "x", 3), ("a", "y", 1)]))
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (2, 0, 0)
    assert parts["train"].set_index(ITEM)[AGE].to_dict() == {"y": 0.5, "x": 0.0}


def test_of_several_interactions_with_an_item_the_last_counts():
    parts = leave_one_out(frame([("a", "x", 1), ("a", "y", 2), ("a", "z", 3), ("a", "x", 4)]))
    assert parts["test"][ITEM].tolist() == ["x"]
    assert sum(len(part) for part in parts.values()) == 3


def test_ties_do_not_depend_on_the_order_of_rows_nor_favour_an_id():
    rows = [(f"u{user}", f"i{item}", 0.0) for user in range(200) for item in range(4)]
    parts = leave_one_out(frame(rows))
    again = leave_one_out(frame(rows[::-1]))
    for name, part in parts.items():
        pd.testing.assert_frame_equal(part, again[name])
    assert parts["test"][ITEM].value_counts().min() > 25, "each of four about 50 times"


def test_the_catalogue_begins_with_what_most_users_had():
    parts = leave_one_out(frame([(u, i, t) for u in "ab" for t, i in enumerate("xyz")] + [("c", "y", 0)]))
    found = fit(parts)
    assert found.users == ["a", "b", "c"]
    assert found.items == ["y", "x", "z"]
    assert found.popularity == [3, 2, 0], "what was held out for the test does not count"
    assert found.mean == 3
    assert found.user_places(["c", "new", None]).tolist() == [3, 0, 0]
    assert found.item_places(["x", "new"]).tolist() == [1, -1]


def test_too_few_interactions_are_told(tmp_path):
    table = pa.table({"who": ["a", "a"], "what": ["x", "y"], "stars": [1.0, 2.0], "when": [1, 2]})
    with pytest.raises(UserError, match="no user has 3 interactions or more"):
        interactions.build(Rows(table), project().data, "v", tmp_path)


def test_the_prepared_parts_have_the_contracts_names(prepared):
    test = prepared.frame("test")
    assert {"who", "what"} <= set(test.columns)
    assert len(test) == NUM_USERS
    assert prepared.summary["parts"]["validation"] == {"rows": NUM_USERS, "users": NUM_USERS}


# The networks


@pytest.mark.parametrize("kind", ["mf", "ncf"])
def test_pairs_and_all_items_have_the_same_scores(kind):
    network = recommender(project(model=NCF if kind == "ncf" else PROJECT["model"]).model, 5, 7, 2.5).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        users, items = torch.tensor([1, 4, 0]), torch.tensor([6, 0, 2])
        every = network(users)
        assert every.shape == (3, 7)
        torch.testing.assert_close(network.of_pairs(users, items), every.gather(1, items[:, None])[:, 0])


def test_matrix_factorization_by_hand():
    network = recommender(model().model, 3, 2, 0.5).eval()
    with torch.no_grad():
        network.user.weight[1] = 2.0
        network.item.weight[1] = 3.0
        network.item_bias.weight[1] = 0.25
    assert network(torch.tensor([1]))[0, 1].item() == pytest.approx(8 * 2 * 3 + 0.25 + 0.5)
    assert network(torch.tensor([0]))[0, 1].item() == pytest.approx(0.75), "nobody has the zero vector"


def test_with_all_items_as_negatives_softmax_is_the_log_likelihood():
    scores = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    allowed = torch.tensor([[False, True, False, True]])  # item 0 is the row's own, 2 another it has had
    got = softmax(scores[:, 0], scores, allowed, num_items=4)
    own, others = math.exp(1), math.exp(2) + math.exp(-1)
    assert got.item() == pytest.approx(-math.log(own / (own + others)), rel=1e-5)


def test_a_sample_of_negatives_stands_for_all():
    items = torch.zeros(1, 10)
    allowed = torch.ones(1, 10, dtype=torch.bool)
    whole = softmax(torch.zeros(1), items, allowed, num_items=10)
    sample = softmax(torch.zeros(1), items[:, :5], allowed[:, :5], num_items=10)
    torch.testing.assert_close(whole, sample)


def test_bpr_by_hand():
    others, allowed = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    pairs = [math.log1p(math.exp(1 - 2)), math.log1p(math.exp(3 - 2))]
    assert bpr(torch.tensor([2.0]), others, allowed, 3).item() == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize("ranking_loss", [softmax, bpr])
def test_a_row_without_any_negative_teaches_nothing(ranking_loss):
    assert ranking_loss(torch.zeros(1), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), 3).item() == 0


def test_rows_count_by_their_weights():
    network = recommender(model(feedback="explicit").model, 3, 2, 0.0)
    users, items, ratings = torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1.0, 5.0])
    alone = network.loss(users[:1], items[:1], torch.ones(1), ratings[:1])
    both = network.loss(users, items, torch.tensor([2.0, 0.0]), ratings)
    torch.testing.assert_close(alone, both)


# The task


def test_negatives_are_never_what_the_user_had(prepared):
    task = Recommender(model(), prepared)
    arrays = arrays_of(task, "train")
    users, _, _, negatives, allowed = task.batch(arrays, torch.arange(100))
    assert len(set(negatives.tolist())) == 16
    had = {(u, i) for u, i in zip(arrays["user"].tolist(), arrays["item"].tolist(), strict=True)}
    for row, user in enumerate(users.tolist()):
        for item, is_allowed in zip(negatives.tolist(), allowed[row].tolist(), strict=True):
            assert is_allowed == ((user, item) not in had)


def test_recent_interactions_count_more(prepared):
    arrays = Recommender(model(recency=0.3), prepared).arrays(prepared.frame("train"))
    ages = prepared.frame("train")[AGE]
    np.testing.assert_allclose(arrays["weight"], np.exp(-ages / 0.3), rtol=1e-6)
    assert (Recommender(model(), prepared).arrays(prepared.frame("train"))["weight"] == 1).all()


@pytest.mark.parametrize("changes", [{}, {"loss": "bpr"}, {"negatives": 1000}], ids=str)
def test_learns_what_there_is_to_learn(prepared, changes):
    task = Recommender(model(**changes), prepared)
    network = trained(task)
    with torch.no_grad():
        found = task.metrics(*task.outputs(network, arrays_of(task, "validation")))
    # Of one's own kind 10 or 11 items are left, of 30 or 31 in all: chance has 10 / 30.
    assert found["hr@10"] > 0.75
    assert set(found) == {"loss", "hr@10", "ndcg@10", "mrr"}


def test_explicit_feedback_learns_ratings(prepared, tmp_path):
    task = Recommender(model(feedback="explicit"), prepared)
    assert task.score == "r2"
    network = trained(task)
    with torch.no_grad():
        found = task.metrics(*task.outputs(network, arrays_of(task, "validation")))
    assert found["r2"] > 0.5, "an item has the same stars from everyone"
    assert found["loss"] == pytest.approx(found["rmse"] ** 2)
    test = Packager(task).evaluate(bundle_of(task, network, tmp_path / "bundle"))["model"]
    assert {"hr@10", "ndcg@10", "mrr", "rmse", "r2"} == set(test)


def test_validation_ranks_among_what_the_training_part_has_not(prepared):
    task = Recommender(model(), prepared)
    network, arrays = task.network().eval(), arrays_of(task, "validation")
    with torch.no_grad():
        ranks = task.outputs(network, arrays)[0]
        scores = network(arrays["user"]).numpy()
    seen = task.seen[arrays["user"]].numpy()
    assert seen.sum() == NUM_USERS * 10
    np.testing.assert_allclose(ranks, ranking.ranks(scores, seen, arrays["item"].numpy()))


def test_baselines_are_found(prepared):
    found = baselines_of(task_of(model(), prepared))
    assert set(found) == {"popularity", "item_knn", "ease"}
    assert found["ease"]["hr@10"] > 0.75
    assert found["popularity"]["hr@10"] < 0.75


def test_the_kind_of_model_chooses_the_task(prepared):
    assert isinstance(task_of(model(), prepared), Recommender)


# The graph


def test_the_graph_gives_the_networks_best_unseen_items(made):
    task, network, opened = made
    users = [f"u{i}" for i in range(NUM_USERS)]
    found = opened.rank({"who": np.array(users, dtype=object)})
    assert found.items.shape == (NUM_USERS, NUM_ITEMS)
    assert found.known.all()
    seen = task.seen_in("train", "validation").numpy()
    places = task.catalogue.user_places(users)
    with torch.no_grad():
        scores = network(torch.from_numpy(places)).numpy()
    for row, user in enumerate(places):
        left = [i for i in np.argsort(-scores[row], kind="stable") if not seen[user, i]]
        given = [item for item in found.items[row] if item]
        assert given == [task.catalogue.items[i] for i in left]
        assert (found.scores[row, len(left) :] == LOWEST).all()


def test_a_new_user_gets_the_most_popular_items(made):
    task, _, opened = made
    found = opened.rank({"who": np.array(["nobody", None, "u1"], dtype=object)})
    assert found.known.tolist() == [False, False, True]
    for row in (0, 1):
        assert found.items[row].tolist() == task.catalogue.items
        assert found.scores[row].tolist() == task.catalogue.popularity


def test_the_graph_takes_the_user_by_the_columns_name(made):
    _, _, opened = made
    session = onnxruntime.InferenceSession(opened.path / "model.onnx")
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("who", "tensor(string)", ["rows"])]
    assert {o.name: o.type for o in session.get_outputs()} == {
        "items": "tensor(string)", "scores": "tensor(float)", "known": "tensor(bool)"
    }  # fmt: skip


def test_the_graph_of_another_network_is_noticed(made):
    task, network, opened = made
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.item_bias.weight[3] += 0.5
    users = np.array(["u1", "u2"], dtype=object)
    with pytest.raises(RuntimeError, match="differs from the trained model"):
        difference(
            other, task.catalogue, task.seen_in("train", "validation"), opened.path / "model.onnx", users
        )


def test_a_bundle_answers_its_example(made):
    _, _, opened = made
    opened.check_example()
    path = opened.path / "example.json"
    example = json.loads(path.read_text())
    try:
        path.write_text(json.dumps({**example, "scores": (np.array(example["scores"]) + 1).tolist()}))
        with pytest.raises(BrokenBundle, match="its own example"):
            opened.check_example()
    finally:
        path.write_text(json.dumps(example))


def test_a_bundle_is_evaluated_like_its_network(made):
    task, network, opened = made
    found = Packager(task).evaluate(opened)["model"]
    task = Recommender(task.project, task.prepared)
    task.seen = task.seen_in("train", "validation")
    with torch.no_grad():
        expected = task.metrics(*task.outputs(network, arrays_of(task, "test")))
    assert found == pytest.approx({name: expected[name] for name in found})


def test_a_champion_of_other_data_is_ranked_by_its_own_catalogue(made, tmp_path):
    """It does not know some of the users and items, and has others that are gone."""
    task, _, _ = made
    table = taste().filter(pa.compute.not_equal(taste()["who"], "u3"))
    table = table.filter(pa.compute.not_equal(table["what"], "i5"))
    (tmp_path / "other").mkdir()
    interactions.build(Rows(table), task.project.data, "v", tmp_path / "other")
    other = Recommender(task.project, Prepared(tmp_path / "other", cached=False))
    champion = bundle_of(other, trained(other), tmp_path / "champion")
    assert 0.5 < Packager(task).evaluate(champion)["model"]["hr@10"] <= 1


# Requests and answers


@pytest.fixture(scope="module")
def contract(made):
    return Contract(Packager(made[0]).schema(), max_rows=8)


def asked(contract: Contract, **request: Any):
    return rows.parse(orjson.dumps(request), contract)


def answer_of(opened: Bundle, *users: str) -> Answer:
    found = opened.rank({"who": np.array(users, dtype=object)})
    return Answer(model="films", variant="champion", version="1", request_id="r", ranking=found)


def encoded(answer: Answer, *rest: Any) -> bytes:
    return rows.encode(answer, rows.predictions(answer, *rest))


def test_a_request_may_say_how_many(contract):
    assert asked(contract, rows=[{"who": "u1"}]).k is None
    assert asked(contract, rows=[{"who": "u1"}], k=3).k == 3
    assert asked(contract, rows=[{"who": "nobody"}], k=None).k is None


@pytest.mark.parametrize("k", [0, -1, NUM_ITEMS + 1, 2.5, "3", True])
def test_too_many_or_none_is_refused(contract, k):
    with pytest.raises(Refused) as refused:
        asked(contract, rows=[{"who": "u1"}], k=k)
    assert refused.value.status == 422
    assert refused.value.violations[0]["path"] == "k"


@pytest.mark.parametrize("row", [{}, {"who": 17}, {"who": None}, {"who": "u1", "what": "i1"}], ids=str)
def test_a_user_must_be_given_and_nothing_else(contract, row):
    with pytest.raises(Refused) as refused:
        asked(contract, rows=[row])
    assert refused.value.status == 422


def test_an_unknown_user_is_refused_where_the_contract_says_so(prepared):
    document = copy.deepcopy(PROJECT)
    document["data"]["columns"]["who"].pop("unseen")
    task = Recommender(Project.model_validate(document), prepared)
    contract = Contract(Packager(task).schema(), max_rows=8)
    asked(contract, rows=[{"who": "u1"}])
    with pytest.raises(Refused, match="breaks the contract"):
        asked(contract, rows=[{"who": "nobody"}])


def test_the_answer_has_the_best_first_and_says_who_is_new(made):
    task, _, opened = made
    document = orjson.loads(encoded(answer_of(opened, "u1", "nobody"), opened.schema, 3))
    assert document["item"] == "what"
    known, new = document["predictions"]
    assert known["known"] is True
    assert len(known["items"]) == len(known["scores"]) == 3
    assert known["scores"] == sorted(known["scores"], reverse=True)
    assert (new["known"], new["items"]) == (False, task.catalogue.items[:3])
    ten = orjson.loads(encoded(answer_of(opened, "u1"), opened.schema))["predictions"][0]
    assert len(ten["items"]) == 10


def test_who_has_had_nearly_all_gets_what_is_left(made):
    _, _, opened = made
    (prediction,) = orjson.loads(encoded(answer_of(opened, "u1"), opened.schema, NUM_ITEMS))["predictions"]
    assert len(prediction["items"]) == len(prediction["scores"]) == NUM_ITEMS - 11
    assert "" not in prediction["items"]


@pytest.mark.parametrize("binary", [False, True])
def test_open_inference(made, contract, binary):
    _, _, opened = made
    request = {
        "inputs": [{"name": "who", "datatype": "BYTES", "shape": [2, 1], "data": ["u1", "nobody"]}],
        "parameters": {"k": 2, "binary_data_output": binary},
    }
    inference = tensors.parse(orjson.dumps(request), None, contract)
    body, _, headers = tensors.encode(answer_of(opened, "u1", "nobody"), inference)
    end = int(headers.get(tensors.HEADER_LENGTH, len(body)))
    items, scores, known = orjson.loads(body[:end])["outputs"]
    expected = opened.rank({"who": np.array(["u1", "nobody"], dtype=object)})
    assert [(o["name"], o["datatype"], o["shape"]) for o in (items, scores, known)] == [
        ("items", "BYTES", [2, 2]), ("scores", "FP32", [2, 2]), ("known", "BOOL", [2])
    ]  # fmt: skip
    if binary:
        sizes = [o["parameters"]["binary_data_size"] for o in (items, scores, known)]
        assert sum(sizes) == len(body) - end
        first = len(expected.items[0, 0])
        assert body[end + 4 : end + 4 + first].decode() == expected.items[0, 0]
        given = np.frombuffer(body[end + sizes[0] :][: sizes[1]], "<f4")
        assert body[-2:] == b"\x01\x00"
    else:
        assert items["data"] == expected.items[:, :2].ravel().tolist()
        assert known["data"] == [True, False]
        given = np.array(scores["data"], dtype=np.float32)
    np.testing.assert_array_equal(given, expected.scores[:, :2].ravel())


def test_an_output_that_there_is_not_is_refused(contract):
    request = {
        "inputs": [{"name": "who", "datatype": "BYTES", "shape": [1], "data": ["u1"]}],
        "outputs": [{"name": "probability"}],
    }
    with pytest.raises(Refused) as refused:
        tensors.parse(orjson.dumps(request), None, contract)
    assert "items, scores, known" in refused.value.violations[0]["message"]
    request["outputs"] = [{"name": "items"}]
    assert tensors.parse(orjson.dumps(request), None, contract).outputs == {"items": False}


def test_metadata_names_the_outputs(made):
    schema = Packager(made[0]).schema()
    document = orjson.loads(tensors.metadata("films", ["1"], schema))
    assert [o["name"] for o in document["outputs"]] == ["items", "scores", "known"]
    assert common_schema({"a": schema, "b": schema.model_copy(update={"num_items": 7})}).num_items == 7


# The project file


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": {"stars": {"encode": "min_max"}}}, "features: model.kind mf takes none"),
        ({"model": {"kind": "linear"}}, "data.label: model.kind linear needs one"),
        ({"gate": {"metric": "auc"}}, "gate.metric: with model.kind mf, must be one of hr@10, ndcg@10, mrr"),
        (
            {"gate": {"metric": "hr@10", "beat": ["constant"]}},
            "gate.beat: with model.kind mf, must be one of pop",
        ),
        ({"gate": {"metric": "r2"}}, "gate.metric: with model.kind mf, must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told(changes, says):
    with pytest.raises(ValidationError, match=says.replace("(", r"\(")):
        project(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user": "nobody"}, "data.interactions.user: 'nobody' must be a category"),
        ({"item": "stars"}, "data.interactions.item: 'stars' must be a category"),
        ({"rating": "what"}, "data.interactions.rating: 'what' must be a number"),
    ],
)
def test_the_columns_of_interactions_must_be_there(changes, says):
    data = copy.deepcopy(PROJECT["data"])
    data["interactions"].update(changes)
    with pytest.raises(ValidationError, match=says):
        project(data=data)


def test_explicit_feedback_needs_ratings():
    data = copy.deepcopy(PROJECT["data"])
    del data["interactions"]["rating"]
    project(data=data)
    with pytest.raises(ValidationError, match="explicit feedback needs the column of ratings"):
        project(data=data, model={**PROJECT["model"], "feedback": "explicit"})


def test_a_project_survives_json():
    assert Project.model_validate_json(project().model_dump_json()) == project()
