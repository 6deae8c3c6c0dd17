"""The ONNX graph of a recommender: from user ids to the best items that they have not had."""

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
from app.tasks.onnx import exported, inner_prefix, require_equal, write

USERS_AT_ONCE = 64
LOWEST = torch.finfo(torch.float32).min
"""The score of what is not to be recommended."""


class _Best(nn.Module):
    """The best items that a user has not had; for the new user, 0, the most popular ones."""

    def __init__(self, network: nn.Module, catalogue: Catalogue, seen: Tensor):
        super().__init__()
        self.network = network
        self.count = min(MAX_ITEMS, len(catalogue.items))
        self.register_buffer("seen", seen)
        self.register_buffer("popularity", torch.tensor(catalogue.popularity, dtype=torch.float32))

    def forward(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and places of items (users, count), best first, and whether users are known (users,)."""
        known = users > 0
        scores = torch.where(known[:, None], self.network(users), self.popularity)
        scores = scores.masked_fill(self.seen[users], LOWEST)
        best, items = scores.topk(self.count)
        return best, items, known


def export(network: nn.Module, catalogue: Catalogue, seen: Tensor, user: str, path: Path) -> None:
    """Write the graph: the string input `user` (rows,) to ITEMS, SCORES (rows, n) and KNOWN (rows,).

    `seen` bool (users, items): what is not recommended. Where a user has not n items left to recommend, the
    rest are empty strings with the score LOWEST.
    """
    best = _Best(network.cpu().eval(), catalogue, seen.cpu())
    shapes = {"users": {0: torch.export.Dim("rows", min=1)}}
    network_graph = exported(best, (torch.tensor([0, 1]),), ["users"], [SCORES, "places", KNOWN], shapes)
    inner = inner_prefix([user])
    middle = onnx.compose.add_prefix(network_graph, f"{inner}/", rename_inputs=False, rename_outputs=False)
    users, places, items, nothing, lowest, named, left = (
        f"{inner}{name}" for name in ("users", "places", "items", "nothing", "lowest", "named", "left")
    )
    names = {"users": users, "places": places}
    for node in middle.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del middle.graph.input[:], middle.graph.output[:]
    lookup = helper.make_node(
        "LabelEncoder",
        [user],
        [users],
        domain="ai.onnx.ml",
        keys_strings=catalogue.users,
        values_int64s=list(range(1, len(catalogue.users) + 1)),
        default_int64=0,
    )
    middle.graph.node.insert(0, lookup)
    for name, value in (
        (items, np.array(catalogue.items, dtype=object)),
        (nothing, np.array("", dtype=object)),
        (lowest, np.array(LOWEST, dtype=np.float32)),
    ):
        middle.graph.initializer.append(numpy_helper.from_array(value, name))
    middle.graph.node.extend(
        [
            helper.make_node("Gather", [items, places], [named]),
            helper.make_node("Greater", [SCORES, lowest], [left]),
            helper.make_node("Where", [left, named, nothing], [ITEMS]),
        ]
    )
    middle.graph.input.append(helper.make_tensor_value_info(user, TensorProto.STRING, ["rows"]))
    for name, kind, shape in (
        (ITEMS, TensorProto.STRING, ["rows", best.count]),
        (SCORES, TensorProto.FLOAT, ["rows", best.count]),
        (KNOWN, TensorProto.BOOL, ["rows"]),
    ):
        middle.graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    middle.opset_import.append(helper.make_opsetid("ai.onnx.ml", 4))
    write(middle, path)


def difference(
    network: nn.Module, catalogue: Catalogue, seen: Tensor, path: Path, users: np.ndarray
) -> float:
    """The largest difference between the graph's scores and PyTorch's, over users (rows,) and a new one.

    Compared are the scores in their order, and that each item has the score that the network gives it: items
    with the same score may change places. Raises RuntimeError if it exceeds MAX_DIFFERENCE, relative to the
    size of the scores.
    """
    graph, best, worst = open_graph(path), _Best(network.cpu().eval(), catalogue, seen.cpu()), 0.0
    users = np.append(users, "")
    for start in range(0, len(users), USERS_AT_ONCE):
        asked = users[start : start + USERS_AT_ONCE].astype(object)
        (name,) = (item.name for item in graph.get_inputs())
        items, scores = graph.run([ITEMS, SCORES], {name: asked})
        places = torch.from_numpy(catalogue.user_places(asked))
        with torch.no_grad():
            expected, _, known = best(places)
            every = torch.where(known[:, None], best.network(places), best.popularity).numpy()
        given = scores > LOWEST
        at = np.where(given, catalogue.item_places(items.ravel()).reshape(items.shape), 0)
        own = np.where(given, np.take_along_axis(every, at, axis=1), LOWEST)
        size = np.maximum(1, np.abs(own))
        for other in (expected.numpy(), own):
            worst = max(worst, float((np.abs(scores - other) / size).max()))
        if (given & np.take_along_axis(best.seen[places].numpy(), at, axis=1)).any():
            raise RuntimeError("the exported graph recommends what a user has had")
    return require_equal(worst)
