"""Images by their address: fetched only where the daemon was told that it may.

Enters: http(s) addresses in a request to /v1/embeddings. Leaves: the bytes behind them, or the item's error.
Called by `embedding.py`. Whoever can name an address can make the daemon send a request: so hosts are those
of a list, a name is looked up once and its address judged and then connected to (a second look-up could be
answered with another one), every redirect is judged anew, and size, time and number are bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from cliptune.errors import ImageDecodeError, InvalidInputError, RequestTooLargeError

_SCHEMES: Final = {"http": 80, "https": 443}
_HOST_RULE: Final = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.IGNORECASE)
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_READ_BYTES: Final = 64 * 1024
_SHOWN_CHARS: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlRules:
    """From where images are fetched, and how much of them."""

    hosts: tuple[str, ...] = ()
    """ "images.example.com", or "*.example.com" for all below it. Empty: nothing is fetched."""
    private: bool = False
    """Also from addresses that are not public: the machine itself, the local network, a cloud's metadata."""
    limit_bytes: int = 20 * 1024 * 1024
    """Of one image."""
    timeout_s: float = 10.0
    """For one image, redirects included."""
    max_redirects: int = 3
    at_a_time: int = 16
    """Fetched together, of all requests."""
    per_request: int = 64

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST_RULE.fullmatch(host):
                raise InvalidInputError(
                    f"{host!r} is no host to fetch images from, such as images.example.com or *.example.com"
                )
        if self.limit_bytes < 1 or self.timeout_s <= 0 or self.max_redirects < 0 or self.at_a_time < 1:
            raise InvalidInputError(f"limits of fetching images make no sense: {self}")

    def allow(self, host: str) -> bool:
        """Whether a host is on the list."""
        lowered = host.lower().rstrip(".")
        return any(
            lowered.endswith(rule[1:].lower()) if rule.startswith("*.") else lowered == rule.lower()
            for rule in self.hosts
        )


class ImageUrls:
    """Fetches by the rules."""

    def __init__(self, rules: UrlRules) -> None:
        self._rules: Final = rules
        self._turns: Final = asyncio.Semaphore(rules.at_a_time)
        self._tls: ssl.SSLContext | None = None

    def check(self, urls: Sequence[tuple[int, str]]) -> None:
        """`InvalidInputError` for addresses that are not to be fetched, before anything is looked up.

        `RequestTooLargeError` for too many.
        """
        for place, url in urls:
            self._judge(url, f"input[{place}]")
        limit = self._rules.per_request
        if len(urls) > limit:
            raise RequestTooLargeError(
                f"the request holds {len(urls):,} addresses of images; at most {limit} are fetched at a time",
                limit=limit,
            )

    async def fetch(self, url: str, place: str) -> bytes:
        """The bytes behind an address.

        `InvalidInputError`: it may not be fetched. `ImageDecodeError`: it could not be.
        """
        limit_s = self._rules.timeout_s
        try:
            async with self._turns, asyncio.timeout(limit_s):
                return await self._follow(url, place)
        except TimeoutError:
            raise _failed(url, f"no answer within {limit_s:g} s") from None
        except (OSError, UnicodeError, h11.ProtocolError) as error:
            raise _failed(url, f"{type(error).__name__}") from error

    async def _follow(self, url: str, place: str) -> bytes:
        for _ in range(self._rules.max_redirects + 1):
            parts = self._judge(url, place)
            found = await self._get(url, parts, place)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise _failed(url, f"more than {self._rules.max_redirects} redirects")

    def _judge(self, url: str, place: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidInputError(f"{place}: {_short(url)} is no address: {error}", path=place) from None
        if not self._rules.hosts:
            raise InvalidInputError(
                f"{place}: addresses are not fetched; send the image itself (a daemon fetches from hosts that"
                " it was started with: --image-host)",
                path=place,
            )
        if parts.scheme not in _SCHEMES or not host or parts.username is not None:
            raise InvalidInputError(
                f"{place}: {_short(url)} is no http or https address without a user in it", path=place
            )
        if port not in (None, *_SCHEMES.values()) and not self._rules.private:
            raise InvalidInputError(f"{place}: port {port} is not fetched from; allowed: 80, 443", path=place)
        if not self._rules.allow(host):
            allowed = ", ".join(self._rules.hosts)
            raise InvalidInputError(
                f"{place}: images are not fetched from {_short(host)}; allowed: {allowed}",
                path=place,
                allowed=allowed,
            )
        return parts

    async def _address(self, host: str, port: int, place: str) -> str:
        """The IP address to connect to; all that the name has must be public."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if not self._rules.private and not all(map(_is_public, addresses)):
            raise InvalidInputError(f"{place}: {_short(host)} is not a public address", path=place)
        return addresses[0]

    async def _get(self, url: str, parts: SplitResult, place: str) -> bytes | str:
        """The body, or where a redirect leads."""
        host = parts.hostname or ""
        port = parts.port or _SCHEMES[parts.scheme]
        address = await self._address(host, port, place)
        tls = self._context() if parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            address, port, ssl=tls, server_hostname=host if tls else None
        )
        try:
            return await self._ask(url, parts, reader, writer)
        finally:
            writer.close()

    async def _ask(
        self, url: str, parts: SplitResult, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = [
            ("Host", parts.netloc),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "cliptune"),
            ("Connection", "close"),
        ]
        request = connection.send(h11.Request(method="GET", target=target.encode("ascii"), headers=headers))
        writer.write((request or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                told = {bytes(key).lower(): bytes(value) for key, value in event.headers}
                if event.status_code in _REDIRECTS and b"location" in told:
                    return told[b"location"].decode("latin-1")
                if event.status_code != 200:
                    raise _failed(url, f"status {event.status_code}")
                if told.get(b"content-encoding", b"identity") != b"identity":
                    raise _failed(url, "the answer is compressed")
                if int(told.get(b"content-length", b"0")) > self._rules.limit_bytes:
                    raise self._too_large(url)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._rules.limit_bytes:
                    raise self._too_large(url)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                raise _failed(url, "the connection ended")

    def _too_large(self, url: str) -> ImageDecodeError:
        return _failed(url, f"more than {self._rules.limit_bytes:,} bytes")

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def is_url(text: str) -> bool:
    """Whether a string is meant as an address rather than as an image."""
    return text[:8].lower().startswith(("http://", "https://"))


async def fetch_all(urls: ImageUrls, wanted: Sequence[tuple[int, str]]) -> list[bytes | ImageDecodeError]:
    """The bytes of each, or its own error; `InvalidInputError` when one of them may not be fetched at all."""
    urls.check(wanted)
    found = await asyncio.gather(
        *(urls.fetch(url, f"input[{place}]") for place, url in wanted), return_exceptions=True
    )
    outcomes: list[bytes | ImageDecodeError] = []
    for outcome in found:
        if isinstance(outcome, BaseException) and not isinstance(outcome, ImageDecodeError):
            raise outcome
        outcomes.append(outcome)
    return outcomes


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (mapped is None or mapped.is_global)


def _failed(url: str, why: str) -> ImageDecodeError:
    return ImageDecodeError(f"the image at {_short(url)} could not be fetched: {why}")


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")
