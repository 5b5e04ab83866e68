"""A small OpenAI-style server on loopback for tests: it logs every request with its arrival time, and misbehaves on demand.

    with ApiServer() as server:
        server.answer = lambda request: Reply(429, headers={"retry-after": "1"}) if len(server.log) < 3 else None   # None: as usual

As a program it answers until it is killed:  python tests/api_server.py [seconds of delay]  prints its base URL."""

import asyncio
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from typing import NamedTuple


class Request(NamedTuple):
    time: float  # of arrival, time.monotonic()
    method: str
    path: str  # without /v1
    key: str  # x-client-request-id
    body: object  # JSON, or bytes
    headers: dict


class Reply(NamedTuple):
    status: int = 200
    body: object = b""  # bytes as they are, anything else as JSON
    headers: dict = {}
    delay: float = 0  # seconds before the first byte
    drip: float = 0  # seconds between two bytes
    cut: int = None  # close after so many bytes of the body
    reset: bool = False  # close with RST instead of any reply
    close: bool = False  # close without a reply, or, with keep_alive_close, after it
    then_close: bool = False


def usual_text(request):
    """Deterministic: what was asked and its key decide; the answer after "Therefore" is yes or no."""
    digest = hashlib.sha256(
        json.dumps(
            [request.body.get("messages") or request.body.get("prompt"), request.key]
        ).encode()
    ).hexdigest()
    said = json.dumps(request.body)
    if "Therefore, the answer is" in said:
        return "yes." if int(digest, 16) % 2 else "no."
    return f"Because {digest[:8]}. " + (
        "The answer is " + ("yes." if int(digest, 16) % 2 else "no.")
        if "The answer is" in said
        else ""
    )


def completion(request, text=..., finish_reason="stop", choices=None, **changes):
    """The body of a usual reply to a request for a completion, with changes."""
    text = usual_text(request) if text is ... else text
    chat = "messages" in request.body
    if choices is None:
        choices = []
        for i in range(request.body.get("n") or 1):
            said = f"{text}{i or ''}" if isinstance(text, str) else text
            choices.append(
                {
                    "index": i,
                    "finish_reason": finish_reason,
                    **(
                        {"message": {"role": "assistant", "content": said}}
                        if chat
                        else {"text": said}
                    ),
                }
            )
    body = {
        "id": "x",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.body["model"] + "-0613",
        "choices": choices,
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    return {k: v for k, v in (body | changes).items() if v is not ...}


class ApiServer:
    def __init__(self, delay=0.0):
        self.log, self.answer, self.delay = [], lambda request: None, delay
        self.files, self.batches, self.jobs, self.batch_output = (
            {},
            [],
            [],
            lambda batch, requests: None,
        )
        self.open_now = self.most_open = 0

    def __enter__(self):
        started = threading.Event()

        def serve():
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
            self.server = self.loop.run_until_complete(
                asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=1000)
            )
            self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
            started.set()
            self.loop.run_forever()
            for task in (tasks := asyncio.all_tasks(self.loop)):
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.close()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *error):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def asked(self, path="completions"):
        """The requests whose path ends so."""
        return [request for request in self.log if request.path.endswith(path)]

    async def connection(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                arrived = time.monotonic()
                first, *lines = head.decode("latin1").split("\r\n")
                method, path, _ = first.split(" ")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if "json" in headers.get("content-type", ""):
                    body = json.loads(body)
                path, _, self.query = path.removeprefix("/v1").partition("?")
                request = Request(
                    arrived, method, path, headers.get("x-client-request-id", ""), body, headers
                )
                self.log.append(request)
                self.open_now += 1
                self.most_open = max(self.most_open, self.open_now)
                try:
                    if not await self.respond(writer, self.answer(request) or self.usual(request)):
                        return
                finally:
                    self.open_now -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def respond(self, writer, reply):
        """Send it; -> whether the connection stays open."""
        await asyncio.sleep(reply.delay or self.delay)
        if reply.reset:
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
            return False
        if reply.close:
            return False
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"content-type": "application/json", "content-length": len(body), **reply.headers}
        lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode())
        for byte in body if reply.drip else ():
            writer.write(bytes([byte]))
            await asyncio.sleep(reply.drip)
        if not reply.drip:
            writer.write(body[: reply.cut])
        await writer.drain()
        return reply.cut is None and not reply.then_close

    # -- what a healthy server does

    def usual(self, request):
        if request.path in ("/chat/completions", "/completions"):
            return Reply(body=completion(request))
        if request.path == "/files":
            return self.upload(request)
        if match := re.fullmatch(r"/files/(.*)/content", request.path):
            return Reply(
                body=self.files[match[1]], headers={"content-type": "application/octet-stream"}
            )
        if request.path == "/batches":
            return (
                self.create_batch(request)
                if request.method == "POST"
                else Reply(body={"object": "list", "data": self.batches[::-1], "has_more": False})
            )
        if match := re.fullmatch(r"/batches/(.*)", request.path):
            return Reply(body=next(b for b in self.batches if b["id"] == match[1]))
        if request.path == "/fine_tuning/jobs":
            return (
                self.create_job(request)
                if request.method == "POST"
                else Reply(body={"object": "list", "data": self.jobs[::-1], "has_more": False})
            )
        if match := re.fullmatch(r"/fine_tuning/jobs/(.*)", request.path):
            return Reply(body=next(j for j in self.jobs if j["id"] == match[1]))
        return Reply(404, {"error": {"message": f"no such path {request.path}"}})

    def upload(self, request):
        boundary = request.headers["content-type"].partition("boundary=")[2].encode()
        parts = dict(
            re.findall(
                rb'name="(\w+)"[^\r]*\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--' + re.escape(boundary),
                request.body,
                re.S,
            )
        )
        name = f"file-{len(self.files)}"
        self.files[name] = parts[b"file"]
        return Reply(
            body={
                "id": name,
                "object": "file",
                "bytes": len(parts[b"file"]),
                "created_at": 0,
                "filename": "x",
                "purpose": parts[b"purpose"].decode(),
                "status": "processed",
            }
        )

    def create_batch(self, request):
        lines = [
            json.loads(line)
            for line in self.files[request.body["input_file_id"]].decode().split("\n")
            if line
        ]
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

    def finish_batch(self, batch, lines, status="completed", errors=None, **changes):
        """Set a batch's end: lines of its output and of its error file (bytes as they are, objects as JSON)."""
        for kind, content in (("output", lines), ("error", errors)):
            if content is not None:
                self.files[f"{batch['id']}-{kind}"] = b"".join(
                    c if isinstance(c, bytes) else json.dumps(c).encode() + b"\n" for c in content
                )
                batch[f"{kind}_file_id"] = f"{batch['id']}-{kind}"
        batch.update(status=status, **changes)

    def create_job(self, request):
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


def batch_line(line, status=200, **changes):
    """One line of a batch's output file, the usual answer to a line of its input."""
    request = Request(0, "POST", line["url"], line["custom_id"], line["body"], {})
    return {
        "id": "r",
        "custom_id": line["custom_id"],
        "response": {"status_code": status, "request_id": "q", "body": completion(request)},
        "error": None,
    } | changes


if __name__ == "__main__":
    with ApiServer(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0) as server:
        print(server.url, flush=True)
        threading.Event().wait()
