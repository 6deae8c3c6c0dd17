"""The models of tables, by the `kind` of the project file.

Each is a function of its settings and of the layout of its inputs that returns a `torch.nn.Module`: its
`forward` is what is served, its `loss` the mean loss of a batch.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from app.data.features import Layout
from app.models import tabular

MODELS: dict[str, Callable[[Any, Layout], nn.Module]] = {
    "linear": tabular.linear,
    "mlp": tabular.mlp,
    "tabm": tabular.tabm,
}
