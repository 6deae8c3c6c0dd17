"""Reading cells: what a value of a table, a request or a tensor is under the contract of its column.

Training, `predict` on tables, JSON rows, tensors, gRPC, `api.predict` and explanations all read their values
here, so that they agree on what is missing, what is a number and what breaks the contract.
"""

from collections.abc import Sequence

from app.config import Column, Number
from app.data.cells.base import Cells
from app.data.cells.numbers import NumberCells
from app.data.cells.strings import StringCells


def cells_of(contract: Column, markers: Sequence[str] = (), allowed: Sequence[str] | None = None) -> Cells:
    """The reader of a column's cells.

    `markers` are the texts that stand for a missing value (`data.missing`), `allowed` the values that a
    category may have (None: any).
    """
    if isinstance(contract, Number):
        return NumberCells(contract, markers)
    return StringCells(contract, markers, allowed)
