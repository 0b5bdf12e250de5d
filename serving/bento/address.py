"""Where the service listens: options, else HOST and PORT of the environment, as platforms that run containers set them."""

import contextlib
import ipaddress
import os
import socket
import sys

HOST, PORT = "127.0.0.1", 3000


class AddressError(RuntimeError):
    """The service cannot listen where it is told to; the message says what to do."""


def chosen_host(given: str | None) -> str:
    """The IP address to listen at. `given` may be a name; HOST counts only as an address or localhost, because shells keep
    the machine's name there, and who lets it be does not ask to be reached from the network.

    Raises:
        AddressError: the name has no address.
    """
    stated = os.environ.get("HOST", "").strip()
    if given is None and stated and not _is_address(stated) and stated != "localhost":
        print(f"HOST={stated!r} is no IP address: listening at {HOST}; --host takes a name, too", file=sys.stderr)
        return HOST
    return _resolved(given or stated or HOST)


def chosen_port(given: int | None) -> int:
    """The TCP port. Raises AddressError where PORT is no number from 1 to 65535."""
    if given is not None:
        return given
    stated = os.environ.get("PORT", "").strip()
    if not stated:
        return PORT
    if not (stated.isascii() and stated.isdigit() and 1 <= int(stated) <= 65535):
        raise AddressError(f"PORT={stated[:40]!r} is no port; set a number from 1 to 65535, or use --port")
    return int(stated)


def check_free(host: str, port: int, hint: str) -> None:
    """Raises AddressError where nobody can listen at `host`:`port`; `hint` says how to choose another place."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AddressError(f"cannot listen at {host} port {port} ({error.strerror}); {hint}") from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolved(host: str) -> str:
    if _is_address(host):  # BentoML listens at addresses only
        return host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"{host!r} has no address ({error.strerror}); use such as 127.0.0.1 or 0.0.0.0") from error
    first = sorted(found, key=lambda item: item[0] != socket.AF_INET)[0]  # IPv4 before IPv6: most callers try it, too
    return str(first[4][0])
