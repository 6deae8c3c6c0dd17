"""Ports of this machine that a cluster can have for itself."""

import random
import socket
from collections.abc import Iterator
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that the kernel gives to nobody who asks for any port.

    What is started minutes from now still finds them free: the ports of Ray's workers come from the kernel.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(*_never_given())
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


def free_block(size: int) -> int:
    """The first of `size` ports in a row, as `free_ports`: nobody uses one of them now. Two blocks are equal
    or have no port in common."""
    lowest, beyond = _never_given()
    blocks = list(range(lowest, beyond - size + 1, size))
    random.SystemRandom().shuffle(blocks)
    used = {port for table in ("tcp", "tcp6") for port in _local_ports(Path("/proc/net") / table)}
    # Used if all are taken: Serve tries the next port when one is in use.
    return next((first for first in blocks if used.isdisjoint(range(first, first + size))), blocks[0])


def _never_given() -> tuple[int, int]:
    """Bounds of the ports below those that the kernel gives to whoever asks for any port."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return max(1024, lowest - 20_000), lowest


def _local_ports(table: Path) -> Iterator[int]:
    if table.exists():
        for line in table.read_text().splitlines()[1:]:
            yield int(line.split()[1].rpartition(":")[2], 16)
