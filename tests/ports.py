"""Ports for servers that are told where to listen, or that listen there again after a while."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

HANDED_TO_NOBODY = range(20_000, 32_000)
"""Below those that Linux gives to whoever asks for any (net.ipv4.ip_local_port_range, 32768 to 60999 as it comes),
such as the other tests running at the same time; above those of Ray's workers (10002 to 19999)."""


def free_ports(number: int) -> list[int]:
    """Different ports of loopback that nobody listens on, and that nobody gets by asking for any."""
    chance = random.SystemRandom()  # two processes seeded alike would choose alike
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < number:
            try:
                listener = held.enter_context(socket.create_server(("127.0.0.1", chance.choice(HANDED_TO_NOBODY))))
            except OSError:  # taken
                continue
            ports.append(listener.getsockname()[1])
    return ports
