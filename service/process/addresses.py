"""Addresses to listen on: as text, as sockets, and whether they are loopback."""

from __future__ import annotations

import ipaddress
import socket


def address(host: str, port: int) -> str:
    """`host:port`, as URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def bound(host: str, port: int, *, share: bool = False) -> socket.socket:
    """A socket that holds the port and does not listen; with `share`, others that share it can have it too. Raises
    `OSError`.
    """
    holder = socket.socket(family(host))
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if share else socket.SO_REUSEADDR, 1)
        holder.bind((host, port))
    except OSError:
        holder.close()
        raise
    return holder


def cannot_listen(host: str, port: int, why: Exception) -> OSError:
    return OSError(f"cannot listen on {address(host, port)}: {why}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; false for any name but localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
