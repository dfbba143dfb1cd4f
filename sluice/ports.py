"""Ports of this machine: is one free, which one is."""

from __future__ import annotations

import socket

from contracts.errors import SluiceError


def check_port(host: str, port: int) -> None:
    """SluiceError when nobody could listen on this port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise SluiceError(f"cannot listen on {authority(host)}:{port}: {error.strerror or error}. Free it, or name another with --port") from None


def free_port(host: str) -> int:
    """A port that nobody uses now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


def authority(host: str) -> str:
    """The host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
