"""The models, by the `kind` of the project file.

Each is a function of its settings and the matrix's layout that returns a `torch.nn.Module`, which takes
a float32 matrix (rows, layout.width) and gives logits (rows,).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from app.data.features import Layout
from app.models import tabular

MODELS: dict[str, Callable[[Any, Layout], nn.Module]] = {"linear": tabular.linear, "mlp": tabular.mlp}
