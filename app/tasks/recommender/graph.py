"""The ONNX graph of a recommender, from user ids to the best items that each user has not had."""

from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.bundle.bundle import ITEMS, KNOWN, SCORES, open_graph
from app.bundle.schema import MAX_ITEMS
from app.data.interactions import Catalogue
from app.tasks.onnx import export_graph, inner_prefix, require_close, write

USERS_PER_BATCH = 64
"""Number of users in a run of the graph and a forward pass, which are compared."""
LOWEST = torch.finfo(torch.float32).min
"""Score of an item that is not recommended."""


class _TopItems(nn.Module):
    """A network for the best items that a user has not had; for unknown users, the most popular ones."""

    def __init__(self, network: nn.Module, catalogue: Catalogue, seen: Tensor):
        super().__init__()
        self.network = network
        self.num_items = min(MAX_ITEMS, len(catalogue.items))
        self.register_buffer("seen", seen)
        self.register_buffer("popularity", torch.tensor(catalogue.popularity, dtype=torch.float32))

    def scores(self, users: Tensor) -> Tensor:
        """The scores of all items, (users, items), for user indices (users,); popularity for user 0."""
        return torch.where(users[:, None] > 0, self.network(users), self.popularity)

    def forward(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and indices of items (users, num_items), best first, and whether users are known
        (users,)."""
        scores, items = self.scores(users).masked_fill(self.seen[users], LOWEST).topk(self.num_items)
        return scores, items, users > 0


def export(network: nn.Module, catalogue: Catalogue, seen: Tensor, user: str, path: Path) -> None:
    """Write the graph, from the string input `user` (rows,) to ITEMS and SCORES (rows, n) and KNOWN (rows,).

    n is MAX_ITEMS, or the size of a smaller catalogue. `seen` bool (users, items) marks items that are not
    recommended. If fewer than n items are left for a user, the rest of the row is empty strings with the
    score LOWEST.
    """
    top = _TopItems(network.cpu().eval(), catalogue, seen.cpu())
    shapes = {"users": {0: torch.export.Dim("rows", min=1)}}
    outputs = [SCORES, "indices", KNOWN]
    whole = export_graph(top, (torch.tensor([0, 1]),), ["users"], outputs, shapes)
    prefix = inner_prefix([user])
    whole = onnx.compose.add_prefix(whole, f"{prefix}/", rename_inputs=False, rename_outputs=False)
    users, indices, items, empty, lowest, names, is_left = (
        f"{prefix}{name}" for name in ("users", "indices", "items", "empty", "lowest", "names", "left")
    )
    renamed = {"users": users, "indices": indices}
    for node in whole.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del whole.graph.input[:], whole.graph.output[:]
    lookup = helper.make_node(
        "LabelEncoder",
        [user],
        [users],
        domain="ai.onnx.ml",
        keys_strings=catalogue.users,
        values_int64s=list(range(1, len(catalogue.users) + 1)),
        default_int64=0,
    )
    whole.graph.node.insert(0, lookup)
    for name, value in (
        (items, np.array(catalogue.items, dtype=object)),
        (empty, np.array("", dtype=object)),
        (lowest, np.array(LOWEST, dtype=np.float32)),
    ):
        whole.graph.initializer.append(numpy_helper.from_array(value, name))
    whole.graph.node.extend(
        [
            helper.make_node("Gather", [items, indices], [names]),
            helper.make_node("Greater", [SCORES, lowest], [is_left]),
            helper.make_node("Where", [is_left, names, empty], [ITEMS]),
        ]
    )
    whole.graph.input.append(helper.make_tensor_value_info(user, TensorProto.STRING, ["rows"]))
    for name, kind, shape in (
        (ITEMS, TensorProto.STRING, ["rows", top.num_items]),
        (SCORES, TensorProto.FLOAT, ["rows", top.num_items]),
        (KNOWN, TensorProto.BOOL, ["rows"]),
    ):
        whole.graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    whole.opset_import.append(helper.make_opsetid("ai.onnx.ml", 4))
    write(whole, path)


def difference(
    network: nn.Module, catalogue: Catalogue, seen: Tensor, path: Path, users: np.ndarray
) -> float:
    """The largest difference between the graph's scores and PyTorch's, relative to those above 1.

    `users` (rows,) are ids, to which an unknown one is added. Compares the sorted scores, and the score of
    each recommended item, but not the order of the items: those with equal scores may change places. Raises
    RuntimeError if the difference exceeds MAX_DIFFERENCE, or the graph recommends an item that a user has
    had.
    """
    graph, top, largest = open_graph(path), _TopItems(network.cpu().eval(), catalogue, seen.cpu()), 0.0
    (column,) = (item.name for item in graph.get_inputs())
    users = np.append(users, "")
    for start in range(0, len(users), USERS_PER_BATCH):
        batch = users[start : start + USERS_PER_BATCH].astype(object)
        items, scores = graph.run([ITEMS, SCORES], {column: batch})
        indices = torch.from_numpy(catalogue.user_indices(batch))
        with torch.no_grad():
            top_scores, _, _ = top(indices)
            all_scores = top.scores(indices).numpy()
        is_left = scores > LOWEST
        columns = np.where(is_left, catalogue.item_indices(items.ravel()).reshape(items.shape), 0)
        item_scores = np.where(is_left, np.take_along_axis(all_scores, columns, axis=1), LOWEST)
        magnitude = np.maximum(1, np.abs(item_scores))
        for expected_scores in (top_scores.numpy(), item_scores):
            largest = max(largest, float((np.abs(scores - expected_scores) / magnitude).max()))
        if (is_left & np.take_along_axis(top.seen[indices].numpy(), columns, axis=1)).any():
            raise RuntimeError("the exported graph recommends an item that the user has had")
    return require_close(largest)
