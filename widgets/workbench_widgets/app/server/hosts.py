"""At which addresses a server answers. A page of another name that DNS turns to this machine is not one of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import gethostname
from typing import Any

from bokeh.server.auth_provider import NullAuth
from bokeh.server.util import check_allowlist
from tornado.httputil import split_host_and_port
from tornado.web import HTTPError, RequestHandler

from workbench.errors import BadParameter

_HOST = re.compile(r"([\w.*-]+|\[[0-9a-fA-F:.]+\])(:(\d{1,5}|\*))?")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Hosts:
    """What the Host of a request may be.

    named: `host:port` in lower case, or `host` at any port; `*` stands for anything, or for one part of a name.
    numbers: the port at which any IP address is one, of a server that listens on all of its machine's; None where it
    does not. Numbers are no risk: only a name can be turned to another machine than its page came from.
    """

    named: tuple[str, ...]
    numbers: int | None = None

    @classmethod
    def of(cls, address: str, port: int, allowed: Iterable[str] = ()) -> Hosts:
        """Those of a server on `address` and `port`: this machine's own names, the address, and what is `allowed`.

        Raises BadParameter for what is not "name" or "name:port".
        """
        allowed = list(allowed)
        for host in allowed:
            if not _HOST.fullmatch(host):
                raise BadParameter(f"host {host[:80]!r} is not a name, or a name and a port, like lab.example:8000")
        names = [*_LOOPBACK, gethostname() if is_unspecified(address) else _bracketed(address)]
        named = dict.fromkeys(host.lower() for host in [*(f"{name}:{port}" for name in names), *allowed])
        return cls(tuple(named), port if is_unspecified(address) else None)

    def admits(self, host: str) -> bool:
        """Whether a request with this Host is answered."""
        host = host.lower()
        if check_allowlist(host, self.named):
            return True
        name, port = split_host_and_port(host)
        return self.numbers is not None and port in (self.numbers, None) and _number(name) is not None

    @property
    def origins(self) -> list[str]:
        """For Bokeh, which compares them with a socket's Origin where it differs from the Host; it knows no IPv6."""
        return [host for host in self.named if "[" not in host]


class HostCheck(NullAuth):
    """Asks no one who they are, but answers only requests for hosts that are admitted: HTTP and sockets alike."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        super().__init__()

    @property
    def get_user_async(self) -> Callable[[Any], Awaitable[Any]]:  # Bokeh gives a handler, and calls it a request
        async def visitor(handler: RequestHandler) -> str:
            host = handler.request.headers.get("Host", "")
            if not self._hosts.admits(host):
                raise HTTPError(
                    403, reason="This host is not served here: whoever started the workbench can --allow-host it"
                )
            return "visitor"

        return visitor

    @property
    def login_url(self) -> str:
        return "/"  # Bokeh wants one beside `get_user_async`; nobody is sent there


def is_this_machine(host: str) -> bool:
    """Whether only this machine reaches a host, with or without a port. A name but "localhost" may be anyone's."""
    name = host if _number(host) is not None else split_host_and_port(host)[0]
    number = _number(name)
    if number is None:
        return name.lower() == "localhost"
    return bool((getattr(number, "ipv4_mapped", None) or number).is_loopback)


def is_unspecified(address: str) -> bool:
    """Whether an address stands for all of a machine's."""
    number = _number(address)
    return not address or (number is not None and number.is_unspecified)


def _number(name: str) -> IPv4Address | IPv6Address | None:
    """The IP address that a host is written as; None for a name."""
    try:
        return ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return None


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
