"""Runs img2dataset so that a list of addresses can't turn it on us: https to public hosts only, bounded bodies.

An audit hook sees each address at the moment of connecting: after its name was resolved, on every redirect, and no code can take it off.
img2dataset's worker processes start from this file as well, and so carry it too. Standard library only: another environment runs this.
"""

import http.client
import ipaddress
import socket
import sys
import time
from typing import Any

MAX_BYTES = 50_000_000  # of one picture
MAX_SECONDS = 60.0  # for one picture
BLOCK = 1 << 16


class Refused(OSError):
    """An address or a body that this process does not take."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook. Raises Refused for a request that is not https, and for a connection to an address that is not public."""
    if event == "urllib.Request" and not str(arguments[0]).lower().startswith("https://"):
        raise Refused("expected an https address")
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX and not is_public(str(arguments[1][0])):
        raise Refused(f"{arguments[1][0]} is not a public address")


def is_public(host: str) -> bool:
    """Whether a numeric address is one of the open internet's; a name is none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def read_bounded(response: http.client.HTTPResponse, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The whole body.

    Raises:
        Refused: it is larger, or takes longer.
        http.client.IncompleteRead: it ended before its announced length.
    """
    body, began, announced = bytearray(), time.monotonic(), response.length
    while announced is None or len(body) < announced:
        block = response.read1(BLOCK)
        if not block:
            break
        body += block
        if len(body) > max_bytes or time.monotonic() - began > max_seconds:
            raise Refused(f"{len(body)} bytes in {time.monotonic() - began:.0f} s; allowed: {max_bytes} bytes in {max_seconds:.0f} s")
    response.close()
    if announced is not None and len(body) < announced:
        raise http.client.IncompleteRead(bytes(body), announced - len(body))
    return bytes(body)


def stand_guard() -> None:
    """From here on, this process is held to the rules above."""
    read_part = http.client.HTTPResponse.read

    def read(response: http.client.HTTPResponse, amt: int | None = None) -> bytes:
        return read_bounded(response) if amt is None else read_part(response, amt)

    http.client.HTTPResponse.read = read  # type: ignore[method-assign, assignment]
    sys.addaudithook(refuse)


if __name__ in ("__main__", "__mp_main__"):  # the second name is that of a spawned worker
    stand_guard()

if __name__ == "__main__":
    from img2dataset.main import main

    main()
