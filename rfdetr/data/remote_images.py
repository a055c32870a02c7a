"""Files by http(s) URL for a server that answers strangers: allow-list, addresses, limits.

A URL in a request makes the server connect to an address that a stranger chose. So only listed
hosts are contacted; every address that a name resolves to and every redirect is checked; the
connection goes to the address that was checked; and all URLs of a request share one time limit.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from urllib.parse import SplitResult, urljoin, urlsplit

LATE = "did not arrive in time"
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 16
REDIRECTS = {301, 302, 303, 307, 308}
PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BusyError(RuntimeError):
    """Too many requests are fetching URLs at this moment."""


def listed(variable: str, separator: str) -> list[str]:
    """The entries of a list in an environment variable of the serving process."""
    return [word.strip() for word in os.environ.get(variable, "").split(separator) if word.strip()]


class UrlFetcher:
    """Fetches URLs of listed hosts.

    `allowed` entries are host names (`images.example.com`), patterns (`*.example.com`, `*`),
    addresses or networks (`10.1.0.0/16`). A private address is refused unless its network or the
    exact name of its host is listed. At most `slots` calls of `fetch` run at a time; each takes at
    most `seconds` and each file at most `max_bytes`. Proxies are not used.
    """

    def __init__(
        self, allowed: Sequence[str], *, max_bytes: int, seconds: float = 20.0, slots: int = 2
    ) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._slots = threading.BoundedSemaphore(slots)
        self._names = {entry.lower() for entry in allowed if not _network(entry)}
        self._networks = [found for found in map(_network, allowed) if found]

    def fetch(self, urls: Sequence[str]) -> list[bytes | ValueError]:
        """The content of each URL, or why it is missing.

        Raises BusyError at once if all slots are taken, so that slow hosts block nobody else.
        """
        if not self._slots.acquire(blocking=False):
            raise BusyError
        found: list[bytes | ValueError] = [ValueError(LATE) for _ in urls]
        deadline = time.monotonic() + self.seconds

        def work() -> None:
            try:
                for index, url in enumerate(urls):
                    found[index] = self._try(url, deadline)
            finally:
                self._slots.release()

        # A resolver has no time limit, so the request does not wait for the thread itself.
        thread = threading.Thread(target=work, name="fetch-urls", daemon=True)
        thread.start()
        thread.join(self.seconds + 1.0)  # the sockets are closed at the deadline
        return list(found)

    def _try(self, url: str, deadline: float) -> bytes | ValueError:
        try:
            content = self._follow(url, deadline)
            # A response whose connection was closed at the deadline looks complete.
            return content if time.monotonic() < deadline else ValueError(LATE)
        except ValueError as error:
            return error
        except (OSError, http.client.HTTPException):
            return ValueError("cannot be fetched")

    def _follow(self, url: str, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            answer = self._request(parts, self._addresses(parts), deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise ValueError(f"has more than {MAX_REDIRECTS} redirects")

    def _addresses(self, parts: SplitResult) -> list[str]:
        """The addresses of the URL's host, all of them checked. Raises ValueError."""
        host = (parts.hostname or "").rstrip(".").lower()
        refusal = ValueError("is not on the list of allowed hosts")
        exact, literal = host in self._names, _network(host)
        named = exact or any(fnmatchcase(host, name) for name in self._names)
        if parts.scheme not in PORTS or not (named or (host and literal)):
            raise refusal
        found = socket.getaddrinfo(host, _port(parts), type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if exact or all(self._is_allowed(_ip(text), named=named) for text in addresses):
            return addresses
        raise refusal

    def _is_allowed(self, address: Address, *, named: bool) -> bool:
        public = address.is_global and not address.is_multicast
        return (named and public) or any(address in network for network in self._networks)

    def _request(self, parts: SplitResult, addresses: list[str], deadline: float) -> bytes | str:
        """The content, or the address of a redirect."""
        connection = http.client.HTTPConnection(str(parts.hostname), _port(parts))
        connection.sock = stream = _connect(parts, addresses, deadline)
        with contextlib.closing(connection), _stopped_at(deadline, stream):
            target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
            connection.request("GET", target, headers={"User-Agent": "rfdetr"})
            response = connection.getresponse()
            if response.status in REDIRECTS and (location := response.getheader("Location")):
                return str(location)
            if response.status != 200:
                raise ValueError("cannot be fetched")
            return self._read(response)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        data = bytearray()
        while chunk := response.read(CHUNK_BYTES):
            data += chunk
            if len(data) > self.max_bytes:
                raise ValueError(f"is larger than {self.max_bytes >> 20} MiB")
        return bytes(data)


def _connect(parts: SplitResult, addresses: list[str], deadline: float) -> socket.socket:
    """A connection to one of the checked addresses; no name is resolved again."""
    error: OSError = TimeoutError()
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            plain = socket.create_connection((address, _port(parts)), timeout=left)
            if parts.scheme == "http":
                return plain
            context = ssl.create_default_context()
            return context.wrap_socket(plain, server_hostname=parts.hostname)
        except OSError as found:
            error = found
    raise error


@contextlib.contextmanager
def _stopped_at(deadline: float, stream: socket.socket) -> Iterator[None]:
    """End a transfer at the deadline, however slowly its bytes arrive."""

    def stop() -> None:
        with contextlib.suppress(OSError):  # closed already
            stream.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _port(parts: SplitResult) -> int:
    return parts.port or PORTS[parts.scheme]


def _ip(text: str) -> Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The network of an address or CIDR block; None for a name."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
