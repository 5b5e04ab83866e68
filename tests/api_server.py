"""A small OpenAI-style server on loopback that logs every request, and misbehaves on demand.

    with ApiServer() as server:
        server.answer = lambda request: Reply(429)  # or None: as usual

As a program it answers until it is killed:  python tests/api_server.py [seconds of delay]
prints its base URL.
"""

import asyncio
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Request(NamedTuple):
    time: float  # of arrival, time.monotonic()
    method: str
    path: str  # without /v1
    key: str  # X-Client-Request-Id
    body: Any  # JSON, or bytes
    headers: dict[str, str]


class Reply(NamedTuple):
    status: int = 200
    body: Any = b""  # bytes as they are, anything else as JSON
    headers: dict[str, Any] = {}
    delay: float = 0  # seconds before the first byte
    drip: float = 0  # seconds between two bytes
    cut: int | None = None  # close after so many bytes of the body
    reset: bool = False  # close with RST instead of any reply
    close: bool = False  # close without a reply
    then_close: bool = False  # close after the reply


def usual_text(request: Request) -> str:
    """Return a text that depends on what was asked and on its key alone; an answer is yes or no."""
    asked = request.body.get("messages") or request.body.get("prompt")
    digest = hashlib.sha256(json.dumps([asked, request.key]).encode()).hexdigest()
    answer = "no."
    if int(digest, 16) % 2:
        answer = "yes."
    body = json.dumps(request.body)
    if "Therefore, the answer is" in body:
        return answer
    if "The answer is" in body:
        return f"Because {digest[:8]}. The answer is {answer}"
    return f"Because {digest[:8]}. "


def make_choice(request: Request, index: int, text: str | None, finish_reason: str | None) -> dict:
    if isinstance(text, str) and index:
        text = f"{text}{index}"
    said: dict[str, Any] = {"text": text}
    if "messages" in request.body:
        said = {"message": {"role": "assistant", "content": text}}
    return {"index": index, "finish_reason": finish_reason, **said}


def completion(
    request: Request, text: Any = ..., finish_reason: str | None = "stop", **changes: Any
) -> dict[str, Any]:
    """Return the usual reply to a request for completions, with changes; ... removes a column."""
    if text is ...:
        text = usual_text(request)
    count = request.body.get("n") or 1
    kind = "text_completion"
    if "messages" in request.body:
        kind = "chat.completion"
    body = {
        "id": "x",
        "object": kind,
        "created": 0,
        "model": request.body["model"] + "-0613",
        "choices": [make_choice(request, i, text, finish_reason) for i in range(count)],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    return {name: value for name, value in (body | changes).items() if value is not ...}


def as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return json.dumps(value).encode()


class ApiServer:
    """The server, in a thread of its own."""

    def __init__(self, delay: float = 0.0) -> None:
        self.log: list[Request] = []
        self.answer: Callable[[Request], Reply | None] = lambda request: None
        self.delay = delay
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []
        self.batch_output: Callable[[dict, list[dict]], object] = lambda batch, lines: None
        self.jobs: list[dict[str, Any]] = []
        self.open_now = 0
        self.most_open = 0

    def __enter__(self) -> "ApiServer":
        started = threading.Event()
        self.thread = threading.Thread(target=self.serve, args=(started,), daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def serve(self, started: threading.Event) -> None:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        listening = asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=1000)
        self.server = self.loop.run_until_complete(listening)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        started.set()
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    def asked(self, path: str = "completions") -> list[Request]:
        """Return the requests whose path ends so."""
        return [request for request in self.log if request.path.endswith(path)]

    # ---- the wire

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_open = True
        try:
            while is_open:
                request = await self.read_request(reader)
                self.log.append(request)
                self.open_now += 1
                self.most_open = max(self.most_open, self.open_now)
                try:
                    reply = self.answer(request) or self.usual(request)
                    is_open = await self.respond(writer, reply)
                finally:
                    self.open_now -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def read_request(self, reader: asyncio.StreamReader) -> Request:
        head = await reader.readuntil(b"\r\n\r\n")
        arrived = time.monotonic()
        first, *lines = head.decode("latin1").split("\r\n")
        method, path, _ = first.split(" ")
        pairs = [line.split(": ", 1) for line in lines if line]
        headers = {name.lower(): value for name, value in pairs}
        body: Any = await reader.readexactly(int(headers.get("content-length", 0)))
        if body and "json" in headers.get("content-type", ""):
            body = json.loads(body)
        path = path.removeprefix("/v1").partition("?")[0]
        return Request(arrived, method, path, headers.get("x-client-request-id", ""), body, headers)

    async def respond(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        """Send a reply; return whether the connection stays open."""
        await asyncio.sleep(reply.delay or self.delay)
        if reply.reset:
            linger = struct.pack("ii", 1, 0)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        if reply.reset or reply.close:
            return False
        body = as_bytes(reply.body)
        headers = {"content-type": "application/json", "content-length": len(body), **reply.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode())
        if reply.drip:
            for byte in body:
                writer.write(bytes([byte]))
                await asyncio.sleep(reply.drip)
        else:
            writer.write(body[: reply.cut])
        await writer.drain()
        return reply.cut is None and not reply.then_close

    # ---- what a healthy server does

    def usual(self, request: Request) -> Reply:
        """Answer as documented: completions, files, batches and fine-tuning jobs."""
        path = request.path
        if path in ("/chat/completions", "/completions"):
            return Reply(body=completion(request))
        if path == "/files":
            return self.upload(request)
        if path == "/batches" and request.method == "POST":
            return self.create_batch(request)
        if path == "/fine_tuning/jobs" and request.method == "POST":
            return self.create_job(request)
        if match := re.fullmatch(r"/batches/(.*)/cancel", path):
            batch = next(one for one in self.batches if one["id"] == match[1])
            batch["status"] = "cancelling"
            return Reply(body=batch)
        if match := re.fullmatch(r"/files/(.*)/content", path):
            headers = {"content-type": "application/octet-stream"}
            return Reply(body=self.files[match[1]], headers=headers)
        for prefix, made in (("/batches", self.batches), ("/fine_tuning/jobs", self.jobs)):
            if path == prefix:
                return Reply(body={"object": "list", "data": made[::-1], "has_more": False})
            if path.startswith(prefix):
                return Reply(body=next(one for one in made if path.endswith("/" + one["id"])))
        return Reply(404, {"error": {"message": f"no such path {path}"}})

    def upload(self, request: Request) -> Reply:
        boundary = request.headers["content-type"].partition("boundary=")[2].encode()
        part = rb'name="(\w+)"[^\r]*\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--' + re.escape(boundary)
        parts = dict(re.findall(part, request.body, re.DOTALL))
        name = f"file-{len(self.files)}"
        self.files[name] = parts[b"file"]
        body = {"id": name, "object": "file", "bytes": len(parts[b"file"]), "created_at": 0}
        body |= {"filename": "x", "purpose": parts[b"purpose"].decode(), "status": "processed"}
        return Reply(body=body)

    def create_batch(self, request: Request) -> Reply:
        content = self.files[request.body["input_file_id"]].decode()
        lines = [json.loads(line) for line in content.split("\n") if line]
        batch = {
            "id": f"batch_{len(self.batches)}",
            "object": "batch",
            "status": "in_progress",
            "created_at": int(time.time()),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            **request.body,
        }
        self.batches.append(batch)
        self.batch_output(batch, lines)
        return Reply(body=batch)

    def finish_batch(
        self,
        batch: dict,
        lines: list | None,
        status: str = "completed",
        errors: list | None = None,
        **changes: object,
    ) -> None:
        """End a batch with the lines of its output and of its error file."""
        for kind, content in (("output", lines), ("error", errors)):
            if content is not None:
                name = f"{batch['id']}-{kind}"
                self.files[name] = b"".join(as_bytes(line).rstrip() + b"\n" for line in content)
                batch[f"{kind}_file_id"] = name
        batch.update(status=status, **changes)

    def create_job(self, request: Request) -> Reply:
        job = {
            "id": f"ftjob-{len(self.jobs)}",
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "status": "succeeded",
            "fine_tuned_model": f"ft:{request.body['model']}:x",
            "organization_id": "o",
            "result_files": [],
            "seed": 0,
            "hyperparameters": {},
            **request.body,
        }
        self.jobs.append(job)
        return Reply(body=job)


def batch_line(line: dict[str, Any]) -> dict[str, Any]:
    """Return the usual line of a batch's output file for a line of its input."""
    request = Request(0, "POST", line["url"], line["custom_id"], line["body"], {})
    response = {"status_code": 200, "request_id": "q", "body": completion(request)}
    return {"id": "r", "custom_id": line["custom_id"], "response": response, "error": None}


if __name__ == "__main__":
    with ApiServer(float((sys.argv[1:] or [0])[0])) as server:
        print(server.url, flush=True)
        threading.Event().wait()
