"""Free TCP ports of this machine for the processes of a cluster."""

import random
import socket
from collections.abc import Iterator
from pathlib import Path

NUM_CANDIDATE_PORTS = 20_000
"""Size of the range below the kernel's ephemeral ports from which ports are chosen."""


def free_ports(count: int) -> list[int]:
    """`count` ports that no process listens on, outside the kernel's ephemeral range.

    They are still free when a process that starts minutes later binds them: Ray's workers ask the kernel for
    any port, and the kernel assigns only ephemeral ones.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(*_candidate_range())
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


def free_block(size: int) -> int:
    """The first of `size` consecutive ports that no process uses, outside the kernel's ephemeral range.

    Two blocks of the same size are identical or disjoint.
    """
    first_port, end = _candidate_range()
    blocks = list(range(first_port, end - size + 1, size))
    random.SystemRandom().shuffle(blocks)
    used = {port for table in ("tcp", "tcp6") for port in _used_ports(Path("/proc/net") / table)}
    # If every block has a port in use, take any: Serve skips ports that are in use.
    return next((first for first in blocks if used.isdisjoint(range(first, first + size))), blocks[0])


def _candidate_range() -> tuple[int, int]:
    """First and end (exclusive) of the ports just below the kernel's ephemeral range."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return max(1024, first_ephemeral - NUM_CANDIDATE_PORTS), first_ephemeral


def _used_ports(table: Path) -> Iterator[int]:
    """Local ports in one of the kernel's socket tables."""
    if table.exists():
        for line in table.read_text().splitlines()[1:]:
            yield int(line.split()[1].rpartition(":")[2], 16)
