"""Commands for this machine: up, down, demo."""

from app.cli.command import running
from app.console import Console


def up() -> None:
    """Start a Ray cluster on this machine that stays until `raylway down`, and show how to reach it."""
    from app.cluster import local

    Console().print(str(local.up()))


def down() -> None:
    """Stop the cluster that `raylway up` started, and no other."""
    from app.cluster import local

    stopped = local.down()
    Console().print(f"stopped the cluster at {stopped.address}" if stopped else "no cluster is up")


def demo() -> None:
    """Show a model's whole life on the census sample, in about two minutes; leaves nothing running."""
    from app.jobs import demo

    with demo.demo_home(), running("demo") as console:
        demo.run(console)
