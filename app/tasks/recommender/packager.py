"""The packager of recommenders."""

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
from app.tasks.recommender.task import USERS_PER_BATCH, Task, evaluate_held_out


class Packager:
    """See `app.tasks.task.Packager`."""

    def __init__(self, task: Task):
        self.task = task

    def export(self, network: nn.Module, folder: Path) -> float:
        assert isinstance(network, networks.Recommender)
        catalogue, seen = self.task.catalogue, self.task.seen_in("train", "validation")
        (folder / interactions.CATALOGUE_FILE).write_text(catalogue.model_dump_json(indent=1))
        graph.export(network, catalogue, seen, self.task.columns.user, folder / "model.onnx")
        users = self.task.frame("test")[USER].to_numpy(dtype=object)
        return graph.difference(network, catalogue, seen, folder / "model.onnx", users)

    def schema(self) -> Schema:
        project, columns = self.task.project, self.task.columns
        users = Input(
            name=columns.user, contract=project.data.columns[columns.user], known=self.task.catalogue.users
        )
        return Schema(
            name=project.name,
            task="ranking",
            inputs=[users],
            missing=project.data.missing,
            label=columns.item,
            num_items=min(MAX_ITEMS, len(self.task.catalogue.items)),
        )

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Evaluate the bundle's network on the test part. `export` has compared it with the graph.

        A bundle that was trained on other data ranks by its own catalogue: a user who is not in it gets the
        most popular items, and an item that is not in it ranks last.
        """
        network, catalogue = _load(bundle)
        test, seen = self.task.frame("test", rows), self.task.seen_in("train", "validation")
        columns = torch.from_numpy(catalogue.item_indices(self.task.catalogue.items))
        popularity = torch.tensor(catalogue.popularity, dtype=torch.float32)
        batches = []
        for start in range(0, len(test), USERS_PER_BATCH):
            batch = test[start : start + USERS_PER_BATCH]
            users = torch.from_numpy(catalogue.user_indices(batch[USER]))
            with torch.no_grad():
                scores = torch.where(users[:, None] > 0, network(users), popularity)[:, columns]
            scores[:, columns < 0] = torch.nan
            test_users = torch.from_numpy(self.task.catalogue.user_indices(batch[USER]))
            test_items = torch.from_numpy(self.task.catalogue.item_indices(batch[ITEM]))
            batches.append(evaluate_held_out(scores, seen[test_users], test_items))
        ranks, _, scores = (torch.cat(part).numpy().astype(np.float64) for part in zip(*batches, strict=True))
        metrics = ranking.evaluate(ranks)
        if self.task.model.feedback == "explicit":
            scores = np.where(np.isnan(scores), catalogue.mean, scores)
            metrics.update(self.task.rating_metrics(scores, test[RATING].to_numpy()))
        return {"model": metrics}


def _load(bundle: Bundle) -> tuple[networks.Recommender, Catalogue]:
    """The network of a bundle in evaluation mode, and its catalogue."""
    from safetensors.torch import load_file

    model = Project.model_validate_json((bundle.path / "project.json").read_text()).model
    assert isinstance(model, Settings)
    catalogue = interactions.read_catalogue(bundle.path)
    network = networks.recommender(model, len(catalogue.users) + 1, len(catalogue.items), catalogue.mean)
    network.load_state_dict(load_file(bundle.path / "model.safetensors"))
    return network.eval(), catalogue
