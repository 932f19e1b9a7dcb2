"""What a hub answers, checked before `huggingface_hub` uses it, and made fit to print.

huggingface_hub joins the commit hash and the ETag that a server names to its cache folder, and
waits for as long as a server asks. So every answer of a request that it makes in this process is
looked at first, by a hook of its HTTP client.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from mqa_gpt.errors import CheckpointError, shown

COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r'(W/)?"?[0-9A-Za-z_][0-9A-Za-z_.+=:-]{0,127}"?')

LONGEST_PAUSE = 60  # seconds that an answer may ask to wait
PATIENCE = 60  # seconds without a byte, or before a body must have come at this rate
MIN_BYTES_PER_SECOND = 100
MAX_LISTING_BYTES = 20_000_000

NO_HUB = "check HF_ENDPOINT, and whether the network asks for a login"


def check_answers() -> None:
    """Have huggingface_hub's HTTP client, in this process, check every answer first."""
    from huggingface_hub.utils import _http

    make_client: Any = _http._GLOBAL_CLIENT_FACTORY  # the user may have set one
    if getattr(make_client, "checks_answers", False):
        return

    def checking_client() -> Any:
        client = make_client()
        hooks, ours = client.event_hooks, {"request": _limit_waiting, "response": _check_answer}
        client.event_hooks = {when: [*hooks.get(when, []), hook] for when, hook in ours.items()}
        return client

    checking_client.checks_answers = True  # type: ignore[attr-defined]
    _http.set_client_factory(checking_client)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_mask_record)


def _limit_waiting(request: Any) -> None:
    """Give up on a connection on which nothing comes; the client asks for no limit."""
    limits = request.extensions.setdefault("timeout", {})
    for kind in ("connect", "read", "write"):
        limits[kind] = limits.get(kind) or PATIENCE


def _check_answer(response: Any) -> None:
    """CheckpointError for an answer whose values must not become file names, or that never ends.

    Args:
        response: httpx's, with headers and before its body is read.
    """
    headers, url = response.headers, response.request.url
    place = masked(f"{url.scheme}://{url.host}")
    commit, *tags = (headers.get(name) for name in ("X-Repo-Commit", "X-Linked-Etag", "ETag"))
    _require_name(place, "commit", commit, COMMIT)
    if response.request.method == "HEAD":  # the only answers whose ETag is used
        for tag in tags:
            _require_name(place, "ETag", tag, ETAG)
    pauses = re.findall(r"^\s*(\d+)\s*$", headers.get("Retry-After", ""))
    pauses += re.findall(r"\bt=(\d+)", headers.get("RateLimit", ""))
    pause = max((int(digits[:9]) for digits in pauses), default=0)
    if response.status_code >= 400 and pause > LONGEST_PAUSE:
        raise CheckpointError(
            f"{place} answers with status {response.status_code} and asks to wait {pause:,} "
            "seconds: run the same again after that time"
        )
    listing = re.search(r"/api/models/.+/(revision|tree)/", url.path)
    response.stream = _watched(response.stream, place, MAX_LISTING_BYTES if listing else None)
    if listing and response.status_code == 200:
        response.read()
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = response.text
        _check_listing(place, listing[1], answer)


def _check_listing(place: str, kind: str, answer: Any) -> None:
    """CheckpointError unless the API's answer is a model's info ("revision") or files ("tree")."""
    if kind == "revision" and isinstance(answer, dict):
        _require_name(place, "commit", str(answer.get("sha")), COMMIT)
        return
    if kind != "tree" or not isinstance(answer, list):
        raise CheckpointError(f"{place} answers {shown(answer)}, not as a hub does: {NO_HUB}")
    for entry in answer:
        large = entry.get("lfs") if isinstance(entry, dict) else None
        if not (isinstance(entry, dict) and isinstance(large, dict | None)):
            raise CheckpointError(f"{place} answers {shown(entry)}, not as a hub does: {NO_HUB}")
        for value in (entry.get("oid"), (large or {}).get("oid"), entry.get("xetHash")):
            _require_name(place, "digest", value, ETAG)


def _require_name(place: str, what: str, value: Any, pattern: re.Pattern[str]) -> None:
    """CheckpointError unless a value, if there is one, is such as a hub gives."""
    if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
        raise CheckpointError(
            f"{place} names the {what} {shown(value)}, which no hub does: nothing was stored; "
            f"{NO_HUB}"
        )


def _watched(stream: Any, place: str, max_bytes: int | None) -> Any:
    """An answer's body that ends with CheckpointError where it is too long or hardly proceeds."""
    base: Any = next(cls for cls in type(stream).__mro__ if cls.__name__ == "SyncByteStream")

    class Watched(base):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            start, received = time.monotonic(), 0
            for chunk in stream:
                received += len(chunk)
                seconds = time.monotonic() - start
                if seconds > PATIENCE and received < MIN_BYTES_PER_SECOND * seconds:
                    raise CheckpointError(
                        f"{place} sent {received:,} bytes in {seconds:.0f} seconds: run the same "
                        "again when it is faster"
                    )
                if max_bytes is not None and received > max_bytes:
                    raise CheckpointError(f"{place} lists more than {max_bytes:,} bytes: {NO_HUB}")
                yield chunk

        def close(self) -> None:
            stream.close()

    return Watched()


def one_line(error: BaseException) -> str:
    """An error's type and message, `masked`."""
    return masked(f"{type(error).__name__}: {error}").removesuffix(": ")


def masked(text: str) -> str:
    """Text that may come from a hub, in one line of at most 500 printable characters.

    Passwords in addresses and access tokens are replaced by `***`.
    """
    text = re.sub(r"//[^/@\s]*@", "//***@", " ".join(text.split()))
    text = re.sub(r"\bhf_[0-9A-Za-z]{8,}", "***", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token, "***")
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 500 else text[:497] + "..."


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = masked(record.getMessage()), ()
    return True
