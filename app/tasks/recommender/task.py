"""Users, items, and which items a user will want next."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from app import store
from app.bundle import MAX_ITEMS, Bundle, Input, Schema
from app.config import Project
from app.config.model import Recommender as Settings
from app.data import interactions
from app.data.interactions import AGE, ITEM, RATING, USER, Catalogue
from app.data.prepare import Prepared
from app.evaluation import ranking
from app.tasks import Arrays
from app.tasks.recommender import baselines as ranking_baselines
from app.tasks.recommender import network as networks

USERS_AT_ONCE = 64
"""In one forward pass outside training: each takes all items."""
EASE_PENALTIES = (50.0, 100.0, 200.0, 400.0, 800.0)

Baseline = Callable[[sparse.csr_matrix], np.ndarray]


class Recommender:
    """Users, items, and which items a user will want next."""

    def __init__(self, project: Project, prepared: Prepared):
        assert isinstance(project.model, Settings)
        self.project = project
        self.prepared = prepared
        self.model = project.model
        of = project.data.interactions
        assert of
        self.columns = of
        self.catalogue = interactions.catalogue(prepared.path)
        self.seen = self._seen("train")
        self.score = project.score

    def _seen(self, *parts: str) -> Tensor:
        """Which items each user has in the parts, bool (users, items); the new user, 0, has none."""
        seen = torch.zeros(len(self.catalogue.users) + 1, len(self.catalogue.items), dtype=torch.bool)
        for part in parts:
            frame = self._frame(part)
            users = torch.from_numpy(self.catalogue.user_places(frame[USER]))
            seen[users, torch.from_numpy(self.catalogue.item_places(frame[ITEM]))] = True
        return seen

    def _frame(self, part: str) -> pd.DataFrame:
        return self._named(self.prepared.frame(part))

    def _named(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.rename(columns={self.columns.user: USER, self.columns.item: ITEM})

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """`user` and `item`, places; `weight` and `rating`, float32; all (rows,)."""
        frame = self._named(frame)
        age = frame[AGE].to_numpy(np.float32)
        recency = self.model.recency
        return {
            "user": self.catalogue.user_places(frame[USER]),
            "item": self.catalogue.item_places(frame[ITEM]),
            "weight": np.exp(-age / recency) if recency else np.ones_like(age),
            "rating": frame[RATING].to_numpy(np.float32),
        }

    def network(self) -> networks.Recommender:
        found = self.catalogue
        mean = found.mean if self.model.feedback == "explicit" else 0.0
        return networks.recommender(self.model, len(found.users) + 1, len(found.items), mean)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(network.parameters())}]

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        return order

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """As `networks.Recommender.loss` takes it; negatives are drawn here, without replacement."""
        users, items, weight = arrays["user"][rows], arrays["item"][rows], arrays["weight"][rows]
        if self.model.feedback == "explicit":
            return users, items, weight, arrays["rating"][rows]
        self.seen = self.seen.to(users.device)
        negatives = torch.randperm(len(self.catalogue.items), device=users.device)[: self.model.negatives]
        return users, items, weight, negatives, ~self.seen[users][:, negatives]

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """Of each held-out item its rank, log loss among all that were not seen, score and rating."""
        held_out = (arrays[name].split(USERS_AT_ONCE) for name in ("user", "item"))
        found = [
            _ranked(network(users).float().cpu(), self.seen[users.to(self.seen.device)].cpu(), items.cpu())
            for users, items in zip(*held_out, strict=True)
        ]
        device = arrays["user"].device
        return *(torch.cat(part).to(device) for part in zip(*found, strict=True)), arrays["rating"]

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """The loss, HR@10, NDCG@10, MRR, and of explicit feedback RMSE and R2."""
        ranks, losses, scores, ratings = (output.numpy().astype(np.float64) for output in outputs)
        found = ranking.evaluate(ranks)
        if self.model.feedback == "implicit":
            return {"loss": float(losses.mean()), **found}
        ratings_found = self._of_ratings(scores, ratings)
        return {"loss": ratings_found["rmse"] ** 2, **found, **ratings_found}

    def _of_ratings(self, scores: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
        """RMSE, and R2 against the mean rating of the training part."""
        error = float(np.mean((scores - ratings) ** 2))
        spread = float(np.mean((ratings - self.catalogue.mean) ** 2))
        return {"rmse": math.sqrt(error), "r2": 1 - error / spread if spread else 0.0}

    def export(self, network: nn.Module, folder: Path) -> float:
        from app.tasks.recommender import graph

        assert isinstance(network, networks.Recommender)
        seen = self._seen("train", "validation")
        (folder / interactions.CATALOGUE).write_text(self.catalogue.model_dump_json(indent=1))
        graph.export(network, self.catalogue, seen, self.columns.user, folder / "model.onnx")
        users = self._frame("test")[USER].to_numpy(dtype=object)
        return graph.difference(network, self.catalogue, seen, folder / "model.onnx", users)

    def schema(self) -> Schema:
        user = Input(
            name=self.columns.user,
            contract=self.project.data.columns[self.columns.user],
            known=self.catalogue.users,
        )
        return Schema(
            name=self.project.name,
            task="ranking",
            inputs=[user],
            missing=self.project.data.missing,
            label=self.columns.item,
            num_items=min(MAX_ITEMS, len(self.catalogue.items)),
        )

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        """The bundle's network, which `difference` holds its graph against, on the test part.

        What was learnt from other data is ranked by its own catalogue: a user whom it does not know gets the
        most popular items, and an item that it does not know comes last.
        """
        network, theirs = _open(bundle)
        test, seen = self._frame("test"), self._seen("train", "validation")
        if rows is not None:
            test = test[rows].reset_index(drop=True)
        columns = torch.from_numpy(theirs.item_places(self.catalogue.items))
        popularity = torch.tensor(theirs.popularity, dtype=torch.float32)
        found = []
        for start in range(0, len(test), USERS_AT_ONCE):
            some = test[start : start + USERS_AT_ONCE]
            places = torch.from_numpy(theirs.user_places(some[USER]))
            with torch.no_grad():
                scores = torch.where(places[:, None] > 0, network(places), popularity)[:, columns]
            scores[:, columns < 0] = torch.nan
            ours = torch.from_numpy(self.catalogue.user_places(some[USER]))
            items = torch.from_numpy(self.catalogue.item_places(some[ITEM]))
            found.append(_ranked(scores, seen[ours], items))
        ranks, _, scores = (torch.cat(part).numpy().astype(np.float64) for part in zip(*found, strict=True))
        metrics = ranking.evaluate(ranks)
        if self.model.feedback == "explicit":
            scores = np.where(np.isnan(scores), theirs.mean, scores)
            metrics.update(self._of_ratings(scores, test[RATING].to_numpy()))
        return {"model": metrics}

    def baselines(self, *, fresh: bool) -> dict[str, dict[str, float]]:
        """Fitted on the training and the validation part; EASE's penalty is chosen on the validation part."""
        key = store.key("baselines", {"prepared": self.prepared.key}, __name__)
        target = store.folder("baselines", key)

        def build(draft: Path) -> None:
            (draft / "metrics.json").write_text(json.dumps(self._baselines(), indent=1))

        store.produce(target, build, fresh=fresh)
        return json.loads((target / "metrics.json").read_text())

    def _baselines(self) -> dict[str, dict[str, float]]:
        def metrics(part: str, seen: Tensor, baseline: Baseline) -> dict[str, float]:
            frame = self._frame(part)
            users, items = self.catalogue.user_places(frame[USER]), self.catalogue.item_places(frame[ITEM])
            scores = baseline(sparse.csr_matrix(seen.numpy(), dtype=np.float64))
            return ranking.evaluate(ranking.ranks(scores[users], seen.numpy()[users], items))

        train, seen = self._seen("train"), self._seen("train", "validation")
        tried: list[Baseline] = [
            functools.partial(ranking_baselines.ease, penalty=penalty) for penalty in EASE_PENALTIES
        ]
        # BLAS's threads spin while they wait for each other, which on busy cores takes longer than the sums.
        with threadpool_limits(1):
            chosen: dict[str, Baseline] = {
                "popularity": ranking_baselines.popularity,
                "item_knn": ranking_baselines.item_knn,
                "ease": max(tried, key=lambda ease: metrics("validation", train, ease)["hr@10"]),
            }
            return {name: metrics("test", seen, baseline) for name, baseline in chosen.items()}


def _ranked(scores: Tensor, seen: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each held-out item's rank, log loss among all that were not seen, and score, (users,).

    `scores` and `seen` (users, items), `items` (users,).
    """
    ranks = ranking.ranks(scores.numpy(), seen.numpy(), items.numpy())
    own = scores.gather(1, items[:, None]).squeeze(1)
    return torch.from_numpy(ranks), scores.masked_fill(seen, -torch.inf).logsumexp(dim=1) - own, own


def _open(bundle: Bundle) -> tuple[networks.Recommender, Catalogue]:
    """A bundle's network, ready to score, and its catalogue."""
    from safetensors.torch import load_file

    model = Project.model_validate_json((bundle.path / "project.json").read_text()).model
    assert isinstance(model, Settings)
    catalogue = interactions.catalogue(bundle.path)
    network = networks.recommender(model, len(catalogue.users) + 1, len(catalogue.items), catalogue.mean)
    network.load_state_dict(load_file(bundle.path / "model.safetensors"))
    return network.eval(), catalogue
