"""State that all nodes of a cluster must share: the state directory, and a database."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from app.errors import UserError
from app.state.home import database_url, home, make_private


def require_shared(*folders: Path, seen_by: Callable[[Path], Mapping[str, bool]] | None = None) -> None:
    """Check that all nodes of the cluster see the state directory and `folders`, and can share a database.
    Needs Ray.

    `seen_by` returns for each node's address whether the node sees a file. Raises UserError, which names the
    nodes that do not see a folder, since the files that their tasks write would be lost. Raises UserError for
    SQLite with several nodes: its locks do not work between machines on a shared file system.
    """
    make_private(home())
    for folder in (home(), *folders):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as marker:
            nodes = (seen_by or _seen_by_nodes)(Path(marker.name))
        if blind_nodes := [address for address, sees in nodes.items() if not sees]:
            name, setting = ("the state directory ", "RAYLWAY_HOME") if folder == home() else ("", "it")
            raise UserError(
                f"every node must see {name}{folder}, but {', '.join(blind_nodes)} does not; put {setting} "
                "on a file system that all nodes mount (NFS, EFS, Lustre)"
            )
        if len(nodes) > 1 and database_url("production.db").startswith("sqlite"):
            raise UserError(
                f"this cluster has {len(nodes)} nodes, which must share a database: set RAYLWAY_DATABASE_URL "
                "to a PostgreSQL database; SQLite is for one node"
            )


def _seen_by_nodes(file: Path) -> dict[str, bool]:
    """Whether each node sees a file, by the node's address; empty if there is only one node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return {}
    task = ray.remote(num_cpus=0)(lambda: file.exists())
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    results = ray.get([task.options(scheduling_strategy=strategy).remote() for strategy in strategies])
    return {node["NodeManagerAddress"]: sees for node, sees in zip(nodes, results, strict=True)}
