from pathlib import Path

import pytest

from app.errors import UserError
from app.state import shared


def test_several_nodes_must_see_the_same_folders_and_share_a_database(home, tmp_path, monkeypatch):
    output = tmp_path / "answers"

    def require(*nodes: str, blind_to: Path | None = None) -> None:
        def seen_by(file: Path) -> dict[str, bool]:
            return {node: file.parent != blind_to or node == nodes[0] for node in nodes}

        shared.require_shared(output, seen_by=seen_by)

    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    require("10.0.0.1")
    with pytest.raises(UserError, match="has 2 nodes, which must share a database: set RAYLWAY_DATABASE_URL"):
        require("10.0.0.1", "10.0.0.2")
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", "postgresql://somewhere/raylway")
    require("10.0.0.1", "10.0.0.2")
    with pytest.raises(UserError, match=r"state directory .*10\.0\.0\.2 does not; put RAYLWAY_HOME on"):
        require("10.0.0.1", "10.0.0.2", blind_to=home)
    with pytest.raises(UserError, match=r"see .*answers, but 10\.0\.0\.2 does not; put it on"):
        require("10.0.0.1", "10.0.0.2", blind_to=output)
