"""Addresses to listen on: as text, and whether they are loopback."""

from __future__ import annotations

import ipaddress


def address(host: str, port: int) -> str:
    """`host:port`, as URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; false for any name but localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
