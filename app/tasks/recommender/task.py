"""Users, items, and which items a user will want next."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from app.config import Project
from app.config.families.recommender import Recommender as Settings
from app.data import interactions
from app.data.interactions import AGE, ITEM, RATING, USER
from app.data.prepare import Prepared
from app.evaluation import ranking
from app.tasks import Arrays
from app.tasks.recommender import network as networks

USERS_AT_ONCE = 64
"""In one forward pass outside training: each takes all items."""


class Task:
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
        self.seen = self.seen_in("train")
        self.score = project.model.score

    def seen_in(self, *parts: str) -> Tensor:
        """Which items each user has in the parts, bool (users, items); the new user, 0, has none."""
        seen = torch.zeros(len(self.catalogue.users) + 1, len(self.catalogue.items), dtype=torch.bool)
        for part in parts:
            frame = self.frame(part)
            users = torch.from_numpy(self.catalogue.user_places(frame[USER]))
            seen[users, torch.from_numpy(self.catalogue.item_places(frame[ITEM]))] = True
        return seen

    def frame(self, part: str, rows: np.ndarray | None = None) -> pd.DataFrame:
        """One part, or its rows where the mask `rows` is true; the columns are USER, ITEM, RATING and AGE."""
        return self._named(self.prepared.frame(part, rows))

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
            ranked(network(users).float().cpu(), self.seen[users.to(self.seen.device)].cpu(), items.cpu())
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
        ratings_found = self.rating_metrics(scores, ratings)
        return {"loss": ratings_found["rmse"] ** 2, **found, **ratings_found}

    def rating_metrics(self, scores: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
        """RMSE, and R2 against the mean rating of the training part."""
        error = float(np.mean((scores - ratings) ** 2))
        spread = float(np.mean((ratings - self.catalogue.mean) ** 2))
        return {"rmse": math.sqrt(error), "r2": 1 - error / spread if spread else 0.0}


def ranked(scores: Tensor, seen: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each held-out item's rank, log loss among all that were not seen, and score, (users,).

    `scores` and `seen` (users, items), `items` (users,).
    """
    ranks = ranking.ranks(scores.numpy(), seen.numpy(), items.numpy())
    own = scores.gather(1, items[:, None]).squeeze(1)
    return torch.from_numpy(ranks), scores.masked_fill(seen, -torch.inf).logsumexp(dim=1) - own, own
