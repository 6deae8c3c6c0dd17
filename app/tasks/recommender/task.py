"""The task of recommenders, which rank a held-out item of each user among all items."""

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

USERS_PER_BATCH = 64
"""Number of users in a forward pass outside training, which scores all items for each user."""


class Task:
    """See `app.tasks.task.Task`."""

    def __init__(self, project: Project, prepared: Prepared):
        assert isinstance(project.model, Settings)
        assert project.data.interactions
        self.project = project
        self.score = project.model.score
        self.prepared = prepared
        self.model = project.model
        self.columns = project.data.interactions
        self.catalogue = interactions.read_catalogue(prepared.path)
        self.seen = self.seen_in("train")

    def seen_in(self, *parts: str) -> Tensor:
        """The items that each user has in some parts, bool (users, items). User 0 stands for unknown users
        and has none."""
        seen = torch.zeros(len(self.catalogue.users) + 1, len(self.catalogue.items), dtype=torch.bool)
        for part in parts:
            frame = self.frame(part)
            users = torch.from_numpy(self.catalogue.user_indices(frame[USER]))
            seen[users, torch.from_numpy(self.catalogue.item_indices(frame[ITEM]))] = True
        return seen

    def frame(self, part: str, rows: np.ndarray | None = None) -> pd.DataFrame:
        """A part with the columns USER, ITEM, RATING and AGE; with `rows`, only where this mask is true."""
        return self._renamed(self.prepared.frame(part, rows))

    def _renamed(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.rename(columns={self.columns.user: USER, self.columns.item: ITEM})

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """`user` and `item`, indices in the catalogue; `weight` and `rating`, float32; all (rows,)."""
        frame = self._renamed(frame)
        age = frame[AGE].to_numpy(np.float32)
        recency = self.model.recency
        return {
            "user": self.catalogue.user_indices(frame[USER]),
            "item": self.catalogue.item_indices(frame[ITEM]),
            "weight": np.exp(-age / recency) if recency else np.ones_like(age),
            "rating": frame[RATING].to_numpy(np.float32),
        }

    def network(self) -> networks.Recommender:
        catalogue = self.catalogue
        mean = catalogue.mean if self.model.feedback == "explicit" else 0.0
        return networks.recommender(self.model, len(catalogue.users) + 1, len(catalogue.items), mean)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(network.parameters())}]

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        return order

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `networks.Recommender.loss`. Draws the batch's negatives without replacement."""
        users, items, weight = arrays["user"][rows], arrays["item"][rows], arrays["weight"][rows]
        if self.model.feedback == "explicit":
            return users, items, weight, arrays["rating"][rows]
        self.seen = self.seen.to(users.device)
        negatives = torch.randperm(len(self.catalogue.items), device=users.device)[: self.model.negatives]
        return users, items, weight, negatives, ~self.seen[users][:, negatives]

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """Rank, log loss, score and rating of each held-out item, (rows,) each. See `evaluate_held_out`."""
        held_out = (arrays[name].split(USERS_PER_BATCH) for name in ("user", "item"))
        batches = [
            evaluate_held_out(
                network(users).float().cpu(), self.seen[users.to(self.seen.device)].cpu(), items.cpu()
            )
            for users, items in zip(*held_out, strict=True)
        ]
        device = arrays["user"].device
        return *(torch.cat(part).to(device) for part in zip(*batches, strict=True)), arrays["rating"]

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """The loss, HR@10, NDCG@10 and MRR; with explicit feedback also RMSE and R2."""
        ranks, losses, scores, ratings = (output.numpy().astype(np.float64) for output in outputs)
        ranking_metrics = ranking.evaluate(ranks)
        if self.model.feedback == "implicit":
            return {"loss": float(losses.mean()), **ranking_metrics}
        rating_metrics = self.rating_metrics(scores, ratings)
        return {"loss": rating_metrics["rmse"] ** 2, **ranking_metrics, **rating_metrics}

    def rating_metrics(self, scores: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
        """RMSE, and R2 relative to the mean rating of the training part; both arguments are (rows,)."""
        error = float(np.mean((scores - ratings) ** 2))
        variance = float(np.mean((ratings - self.catalogue.mean) ** 2))
        return {"rmse": math.sqrt(error), "r2": 1 - error / variance if variance else 0.0}


def evaluate_held_out(scores: Tensor, seen: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank, log loss and score of each user's held-out item, (users,) each.

    Rank and log loss are among the items that the user has not had. `scores` float and `seen` bool are
    (users, items); `items`, the indices of the held-out items, are (users,).
    """
    ranks = ranking.ranks(scores.numpy(), seen.numpy(), items.numpy())
    own = scores.gather(1, items[:, None]).squeeze(1)
    return torch.from_numpy(ranks), scores.masked_fill(seen, -torch.inf).logsumexp(dim=1) - own, own
