"""Media that a request names by address, from hosts that the operator allows by name.

Never from an address of this machine or of a private network, whatever a name or a redirect leads
to: each hop's name is resolved here, and the connection goes to the address that was looked at.
"""

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
from collections.abc import Collection
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import httpx

from plait.service.errors import ServiceError

MOST_REDIRECTS = 3
SECONDS, TOGETHER_SECONDS = 30.0, 120.0
"""For an answer, and for all of a file."""

_UPLOAD = re.compile(r"sha256:([0-9a-f]{64})")
_DATA = re.compile(r"data:(?P<type>[\w.+/-]*)(?P<options>(?:;[^,;]+)*),", re.ASCII)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SPECIAL = ipaddress.IPv4Network("192.0.0.0/24")


def _is_public(text: str) -> bool:
    """Whether an address is of the open network, and so is the one that it may stand for."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and address not in _SPECIAL
    inner = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    inside = inner is None or _is_public(str(inner))
    return address.is_global and inside and address.teredo is None


class Fetcher:
    """
    Args:
        hosts: From which media may be fetched.
        most: Bytes of one file.
    """

    def __init__(self, hosts: Collection[str], most: int) -> None:
        self._hosts, self._most = {host.lower() for host in hosts}, most

    async def bytes_of(self, url: str) -> bytes | str:
        """What an address holds; of an upload, its SHA-256.

        Raises:
            ServiceError: it is none that may be read, or cannot be.
        """
        if upload := _UPLOAD.fullmatch(url):
            return upload[1]
        if url.startswith("data:"):
            return self._data(url)
        if not self._hosts or not url.startswith(("http://", "https://")):
            raise ServiceError(
                "media come as data: addresses, or as sha256:... of an upload"
                + ("; http(s) addresses of hosts that the operator allows" if self._hosts else "")
            )
        try:
            async with asyncio.timeout(TOGETHER_SECONDS):
                return await self._fetched(url)
        except TimeoutError as error:
            raise ServiceError(f"{url[:80]} takes too long; upload it instead") from error
        except (ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceError(f"{url[:80]} cannot be read; upload it instead") from error

    def _data(self, url: str) -> bytes:
        head = _DATA.match(url)
        if head is None:
            raise ServiceError("a data: address has the form data:image/png;base64,...")
        content = url[head.end() :]
        if len(content) > 2 * self._most:
            raise self._too_large()
        if "base64" not in head["options"].split(";"):
            return unquote_to_bytes(content)
        try:
            return base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise ServiceError(f"a data: address does not hold base64: {error}") from error

    async def _fetched(self, url: str) -> bytes:
        async with httpx.AsyncClient(timeout=SECONDS, trust_env=False) as client:
            for _ in range(MOST_REDIRECTS + 1):
                request, host = await self._request(client, url)
                try:
                    response = await client.send(request, stream=True)
                except httpx.HTTPError as error:
                    raise ServiceError(f"{host} does not answer") from error
                try:
                    if not response.is_redirect:
                        return await self._content(response, host)
                    url = urljoin(url, response.headers.get("location", ""))
                finally:
                    await response.aclose()
        raise ServiceError(f"media may be redirected {MOST_REDIRECTS} times; this was more often")

    async def _request(self, client: httpx.AsyncClient, url: str) -> tuple[httpx.Request, str]:
        """To the address that was looked at, with the name that was asked for."""
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or host not in self._hosts:
            raise ServiceError(f"media may not be fetched from {host or url[:80]!r}", 403)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ServiceError("an address has a port that is none") from error
        address = await self._public_address(host, port)
        shown = f"[{address}]" if ":" in address else address
        target = parts._replace(netloc=f"{shown}:{port}").geturl()
        named = host if parts.port is None else f"{host}:{port}"
        request = client.build_request(
            "GET",
            target,
            headers={"Host": named, "Accept-Encoding": "identity"},
            extensions={"sni_hostname": host},
        )
        return request, host

    async def _public_address(self, host: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ServiceError(f"there is no host {host}") from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not _is_public(address.partition("%")[0]):
                raise ServiceError(f"{host} is not a public host; it may not be read from", 403)
        return addresses[0]

    async def _content(self, response: httpx.Response, host: str) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise ServiceError(f"{host} answers {response.status_code} for this file")
        data = bytearray()
        async for block in response.aiter_raw():
            data += block
            if len(data) > self._most:
                raise self._too_large()
        return bytes(data)

    def check(self, size: int) -> None:
        """
        Raises:
            ServiceError: media of so many bytes are too large.
        """
        if size > self._most:
            raise self._too_large()

    def _too_large(self) -> ServiceError:
        return ServiceError(f"a file has up to {self._most} bytes; upload it instead", 413)


class Together:
    """The media of one request, which are in memory at the same time."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher, self._size = fetcher, 0

    async def bytes_of(self, url: str) -> bytes | str:
        """As `Fetcher.bytes_of`.

        Raises:
            ServiceError: with those before it, it is too large.
        """
        found = await self._fetcher.bytes_of(url)
        if isinstance(found, bytes):
            self._size += len(found)
            self._fetcher.check(self._size)
        return found
