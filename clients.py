"""The HTTP client of a session: no retries, no redirects, bounded replies, a proxy only if named.

Loaded by api.py once something must be asked.  Batches and jobs are openai's own calls, through
this client; a completion is one POST, for which openai would take half a second to import.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx2

import servers
from replies import InvalidReplyError
from storage import UserError

if TYPE_CHECKING:
    import openai

NO_KEY = "none"  # openai wants a key, but a local server or one with a header of its own does not
MAX_REPLY_BYTES = 64 * 2**20  # many times 1,000 choices of a thousand tokens
MAX_DOWNLOAD_BYTES = 4 * 2**30  # of a batch's results


class BoundedStream(httpx2.AsyncByteStream):
    """A body that ends in InvalidReplyError where it is longer than its limit."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int) -> None:
        self.stream = stream
        self.limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces."""
        size = 0
        async for piece in self.stream:
            size += len(piece)
            if size > self.limit:
                raise InvalidReplyError(f"a reply of more than {self.limit} bytes")
            yield piece

    async def aclose(self) -> None:
        """Close the connection or give it back."""
        await self.stream.aclose()


class BoundedTransport(httpx2.AsyncHTTPTransport):
    """The usual transport, with bounded bodies.

    They come uncompressed, as we ask: a small compressed body may be a huge one.
    """

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; return the response before its body is read."""
        if request.headers.get("authorization") == f"Bearer {NO_KEY}":
            del request.headers["authorization"]
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise InvalidReplyError("a compressed reply, though none was asked for")
        limit = MAX_REPLY_BYTES
        if request.method == "GET" and request.url.path.endswith("/content"):
            limit = MAX_DOWNLOAD_BYTES
        response.stream = BoundedStream(response.stream, limit)
        return response


def make_client(base_url: str, extra_headers: str, proxy: str | None) -> httpx2.AsyncClient:
    """Return a client for the paths below a base URL.

    Redirects are not followed: they would carry extra headers, secrets, to another host.  Raises
    UserError for a key or an address that no request can carry.
    """
    key = servers.api_key()
    if not key.isascii() or not key.isprintable():
        raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
    headers = httpx2.Headers({"accept": "application/json", "accept-encoding": "identity"})
    if key:
        headers["authorization"] = f"Bearer {key}"
    headers.update(servers.read_headers(extra_headers))
    address = servers.read_address(base_url)
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=1000)
    try:
        return httpx2.AsyncClient(
            base_url=address.url,
            params=address.query,
            headers=headers,
            timeout=httpx2.Timeout(None, connect=5.0),  # the whole attempt has one of its own
            transport=BoundedTransport(limits=limits, proxy=proxy),
        )
    except (ValueError, httpx2.InvalidURL, OSError) as e:
        raise UserError(f"no client can be made for {address.url}: {e}") from None


def wrap_client(http: httpx2.AsyncClient, base_url: str, extra_headers: str) -> openai.AsyncOpenAI:
    """Return openai's client around one of make_client, for batches and fine-tuning jobs."""
    import openai

    address = servers.read_address(base_url)
    return openai.AsyncOpenAI(
        api_key=servers.api_key() or NO_KEY,
        base_url=address.url,
        default_query=address.query,
        default_headers=servers.read_headers(extra_headers),
        max_retries=0,
        http_client=http,
    )
