"""A model hub on loopback: the part of the Hugging Face hub that `huggingface_hub` uses.

It answers the API's model info and file listing, and HEAD and GET of files with ETag, commit and
Range. It logs requests, can break a connection, fail, gate a repository and change any answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

ACCEPTED_TOKEN = "hf_accepted"  # of an account that may read gated repositories
OTHER_TOKEN = "hf_other"  # of one that may not
EXPIRED_TOKEN = "hf_expired"

Files = dict[str, bytes]


def commit_of(revision: str) -> str:
    """A revision's commit hash."""
    return hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class Repository:
    """Files by revision name."""

    revisions: dict[str, Files]
    gated: bool = False


class Request(NamedTuple):
    """One line of the log; `path` is decoded, `range` is the header."""

    method: str
    path: str
    range: str | None

    @property
    def file(self) -> str | None:
        """The file name in /owner/name/resolve/commit/file; None for an API request."""
        return None if self.path.startswith("/api/") else self.path.split("/", 5)[-1]


class Answer(NamedTuple):
    """What is sent for a request."""

    status: int
    body: bytes
    headers: dict[str, str]


@dataclass
class HubServer:
    """Serves `repositories` while used as a context manager; `url` is a value for HF_ENDPOINT.

    cut: file name -> bytes after which its next download breaks off, once. The client writes in
        pieces of 10 MiB and resumes after the last complete one.
    failing: files whose contents are answered with status 500.
    pause: seconds before each byte of a body.
    change: gets every request and answer, and returns the answer to send.
    """

    repositories: dict[str, Repository]
    cut: dict[str, int] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    change: Callable[[Request, Answer], Answer] | None = None
    pause: float = 0.0
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """The names of the files whose contents were requested, sorted."""
        return sorted(r.file for r in self.log if r.method == "GET" and r.file)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # of a client that breaks off
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass  # HubServer.log has it

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """/api/models/O/N/revision/R, /api/models/O/N/tree/R or /O/N/resolve/R/FILE."""
        self.hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        self.request_ = Request(self.command, path, self.headers.get("Range"))
        self.hub.log.append(self.request_)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        parts = path.removeprefix("/api/models").split("/")[1:]
        if len(parts) < 4:  # the client also asks for notices and the like
            return self.refuse(404, None, "Not found")
        owner, name, kind, revision, *rest = parts
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if token == EXPIRED_TOKEN:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        commits = {commit_of(r): files for r, files in repository.revisions.items()}
        commit = revision if revision in commits else commit_of(revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = commits[commit]

        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.send_json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings})
        if kind == "tree":
            return self.send_json([_entry(file, data) for file, data in files.items()])
        if repository.gated and token != ACCEPTED_TOKEN:
            return self.refuse(403 if token else 401, "GatedRepo", "Access is restricted")
        file = "/".join(rest)
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if self.command == "GET" and file in self.hub.failing:
            return self.refuse(500, None, "Internal error")
        return self.send_file(file, files[file], commit)

    def send_file(self, file: str, data: bytes, commit: str) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if _is_large(file):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        wanted = self.headers.get("Range")
        first = 0 if wanted is None else int(wanted.removeprefix("bytes=").split("-")[0])
        if wanted is not None:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cut.pop(file, None) if self.command == "GET" else None
        self.send(200 if wanted is None else 206, data[first:], headers, cut)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({} if code is None else {"X-Error-Code": code})
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        if self.hub.change is not None:
            status, body, headers = self.hub.change(self.request_, Answer(status, body, headers))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            if self.hub.pause:
                self.drip(body)
            else:
                self.wfile.write(body[:cut])
            self.close_connection = cut is not None

    def drip(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # until the client has had enough
            for i in range(len(body)):
                time.sleep(self.hub.pause)
                self.wfile.write(body[i : i + 1])


def _is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def _entry(file: str, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    entry = {"type": "file", "path": file, "size": len(data), "oid": digest[:40]}
    if _is_large(file):
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry
