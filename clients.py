"""The HTTP client of a session: no retries, no redirects, bounded replies, a proxy only if named.

Loaded by api.py when a session begins: openai takes half a second to import.
"""

from collections.abc import AsyncIterator

import httpx2
import openai

import servers
from replies import InvalidReplyError
from storage import UserError

NO_KEY = "none"  # openai wants a key, but a local server or one with a header of its own does not
OPENAI = "https://api.openai.com/v1"
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


def make_client(base_url: str | None, extra_headers: str, proxy: str | None) -> openai.AsyncOpenAI:
    """Return a client without retries of its own: see api.call_with_retries.

    Redirects are not followed: they would carry extra headers, secrets, to another host.  Raises
    UserError for a key or an address that no request can carry.
    """
    key = servers.api_key()
    if not key.isascii() or not key.isprintable():
        raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
    headers = servers.read_headers(extra_headers)
    address = servers.read_address(base_url or OPENAI)
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=1000)
    try:
        transport = BoundedTransport(limits=limits, proxy=proxy)
        http_client = httpx2.AsyncClient(
            transport=transport, headers={"accept-encoding": "identity"}
        )
        return openai.AsyncOpenAI(
            api_key=key or NO_KEY,
            base_url=address.url,
            default_query=address.query,
            default_headers=headers,
            max_retries=0,
            http_client=http_client,
        )
    except (ValueError, httpx2.InvalidURL, OSError) as e:
        raise UserError(f"no client can be made for {address.url}: {e}") from None
