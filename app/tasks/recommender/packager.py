"""Making a bundle of a trained recommender, and measuring it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from app.bundle.bundle import Bundle
from app.bundle.schema import MAX_ITEMS, Input, Schema
from app.config import Project
from app.config.families.recommender import Recommender as Settings
from app.data import interactions
from app.data.interactions import ITEM, RATING, USER, Catalogue
from app.evaluation import ranking
from app.tasks.recommender import graph
from app.tasks.recommender import network as networks
from app.tasks.recommender.task import USERS_AT_ONCE, Task, ranked


class Packager:
    """See `app.tasks.Packager`."""

    def __init__(self, task: Task):
        self.task = task

    def export(self, network: nn.Module, folder: Path) -> float:
        assert isinstance(network, networks.Recommender)
        seen = self.task.seen_in("train", "validation")
        (folder / interactions.CATALOGUE).write_text(self.task.catalogue.model_dump_json(indent=1))
        graph.export(network, self.task.catalogue, seen, self.task.columns.user, folder / "model.onnx")
        users = self.task.frame("test")[USER].to_numpy(dtype=object)
        return graph.difference(network, self.task.catalogue, seen, folder / "model.onnx", users)

    def schema(self) -> Schema:
        user = Input(
            name=self.task.columns.user,
            contract=self.task.project.data.columns[self.task.columns.user],
            known=self.task.catalogue.users,
        )
        return Schema(
            name=self.task.project.name,
            task="ranking",
            inputs=[user],
            missing=self.task.project.data.missing,
            label=self.task.columns.item,
            num_items=min(MAX_ITEMS, len(self.task.catalogue.items)),
        )

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        """The bundle's network, which `difference` holds its graph against, on the test part.

        What was learnt from other data is ranked by its own catalogue: a user whom it does not know gets the
        most popular items, and an item that it does not know comes last.
        """
        network, theirs = _open(bundle)
        test, seen = self.task.frame("test", rows), self.task.seen_in("train", "validation")
        columns = torch.from_numpy(theirs.item_places(self.task.catalogue.items))
        popularity = torch.tensor(theirs.popularity, dtype=torch.float32)
        found = []
        for start in range(0, len(test), USERS_AT_ONCE):
            some = test[start : start + USERS_AT_ONCE]
            places = torch.from_numpy(theirs.user_places(some[USER]))
            with torch.no_grad():
                scores = torch.where(places[:, None] > 0, network(places), popularity)[:, columns]
            scores[:, columns < 0] = torch.nan
            ours = torch.from_numpy(self.task.catalogue.user_places(some[USER]))
            items = torch.from_numpy(self.task.catalogue.item_places(some[ITEM]))
            found.append(ranked(scores, seen[ours], items))
        ranks, _, scores = (torch.cat(part).numpy().astype(np.float64) for part in zip(*found, strict=True))
        metrics = ranking.evaluate(ranks)
        if self.task.model.feedback == "explicit":
            scores = np.where(np.isnan(scores), theirs.mean, scores)
            metrics.update(self.task.rating_metrics(scores, test[RATING].to_numpy()))
        return {"model": metrics}


def _open(bundle: Bundle) -> tuple[networks.Recommender, Catalogue]:
    """A bundle's network, ready to score, and its catalogue."""
    from safetensors.torch import load_file

    model = Project.model_validate_json((bundle.path / "project.json").read_text()).model
    assert isinstance(model, Settings)
    catalogue = interactions.catalogue(bundle.path)
    network = networks.recommender(model, len(catalogue.users) + 1, len(catalogue.items), catalogue.mean)
    network.load_state_dict(load_file(bundle.path / "model.safetensors"))
    return network.eval(), catalogue
