"""Hub names, against a server on loopback; each client is a process of its own, because
huggingface_hub reads its environment variables when it is imported."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mqa_gpt import GPT, CheckpointError
from mqa_gpt.checkpoints.hub import resolve
from tests.helpers import our_model, reference_model, tiny_config
from tests.hub_server import (
    ACCEPTED_TOKEN,
    EXPIRED_TOKEN,
    OTHER_TOKEN,
    Answer,
    Files,
    HubServer,
    Repository,
    Request,
    commit_of,
)

pytestmark = pytest.mark.slow

NAME = "someone/tiny"
EXAMPLES = int(os.environ.get("MQA_GPT_FUZZ", "0"))  # what `make fuzz` asks for


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    config = tiny_config()
    return {seed: our_model(reference_model(config, seed=i), config) for i, seed in enumerate("ab")}


@pytest.fixture(scope="module")
def files(models: dict[str, GPT], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The files of two checkpoints: "a" in one file, "b" in shards."""
    saved = {}
    for name, size in (("a", "5GB"), ("b", 20_000)):
        folder = tmp_path_factory.mktemp(name)
        models[name].save_pretrained(folder, max_shard_size=size)
        saved[name] = {file.name: file.read_bytes() for file in folder.iterdir()}
        saved[name]["tokenizer.json"] = b"{}"
    return saved


@pytest.fixture
def hub(files: dict[str, Files]) -> Iterator[HubServer]:
    never = {
        "pytorch_model.bin": b"\x80\x02pickle",
        "modeling.py": b"raise SystemExit('code from a checkpoint was run')",
        "README.md": b"#",
        "training/model.safetensors": b"in a sub-folder",
        ".gitattributes": b"",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
    }
    repositories = {
        NAME: Repository({"main": files["a"] | never, "sharded": files["b"]}),
        "someone/gated": Repository({"main": files["a"]}, gated=True),
        "someone/pickles": Repository({"main": {"config.json": files["a"]["config.json"]} | never}),
    }
    with HubServer(repositories) as server:
        yield server


class Client:
    """Runs code in a new process with a hub cache of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, code: str, endpoint: str, **variables: str) -> str:
        """What `code` prints; `resolve` is imported, and an error prints as type and message."""
        script = (
            "from mqa_gpt.errors import InputError\n"
            "from mqa_gpt.checkpoints.hub import resolve\n"
            "try:\n"
            f"    {code}\n"
            "except InputError as error:\n"
            "    print(type(error).__name__ + ':', error)\n"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.home),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def resolve(
        self, name: str, endpoint: str, revision: str | None = None, **variables: str
    ) -> str:
        """The folder that `resolve` finds, or the error it raises."""
        return self.run(f"print(resolve({name!r}, {revision!r}))", endpoint, **variables)

    def resolve_each(self, names: list[str], endpoint: str) -> list[str]:
        """What `resolve` finds or raises for each name, in one process."""
        code = (
            f"for name in {names!r}:\n"
            "        try: print(resolve(name))\n"
            "        except InputError as error: print(f'{type(error).__name__}: {error}')"
        )
        lines = self.run(code, endpoint).splitlines()
        assert len(lines) == len(names)
        return lines


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "home")


def same_weights(model: GPT, other: GPT) -> bool:
    mine, its = model.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)


def test_a_hub_name_is_downloaded_and_loads_by_name(client: Client, hub: HubServer) -> None:
    printed = client.run(
        f"from mqa_gpt import GPT; print(GPT.from_pretrained({NAME!r}).config.n_embd)", hub.url
    )
    assert printed == str(tiny_config().n_embd)


def test_only_what_is_read_is_asked_for(
    client: Client, hub: HubServer, models: dict[str, GPT]
) -> None:
    folder = client.resolve(NAME, hub.url)
    assert same_weights(GPT.from_pretrained(folder), models["a"])
    wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert hub.downloads() == wanted
    assert {request.file for request in hub.log if request.file} <= set(wanted)
    listings = {"revision/main", f"tree/{commit_of('main')}"}
    about_models = {r.path for r in hub.log if r.path.startswith("/api/models/")}
    assert about_models <= {f"/api/models/{NAME}/{listing}" for listing in listings}
    # A name from the cache is a folder of links to files elsewhere, which is not an escape.
    assert (Path(folder) / "model.safetensors").is_symlink()


def test_a_revision_is_that_revision(
    client: Client, hub: HubServer, models: dict[str, GPT]
) -> None:
    folder = client.resolve(NAME, hub.url, "sharded")
    assert same_weights(GPT.from_pretrained(folder), models["b"])
    by_commit = client.resolve(NAME, hub.url, commit_of("sharded"))
    assert by_commit == folder


def test_what_is_cached_is_not_downloaded_again_and_works_offline(
    client: Client, hub: HubServer
) -> None:
    folder = client.resolve(NAME, hub.url)
    before = hub.downloads()
    assert client.resolve(NAME, hub.url) == folder
    assert hub.downloads() == before
    requests = len(hub.log)
    assert client.resolve(NAME, hub.url, HF_HUB_OFFLINE="1") == folder
    assert len(hub.log) == requests
    unused_port = "http://127.0.0.1:9"
    assert client.resolve(NAME, unused_port) == folder


def test_offline_and_not_cached_says_so(client: Client, hub: HubServer) -> None:
    message = client.resolve(NAME, hub.url, HF_HUB_OFFLINE="1")
    assert message.startswith(f"CheckpointError: there is no folder {NAME} here")
    assert "HF_HUB_OFFLINE is set: unset it" in message
    assert not hub.log


def test_no_network_and_not_cached_says_so(client: Client) -> None:
    message = client.resolve(NAME, "http://127.0.0.1:9")
    assert message.startswith(f"CheckpointError: there is no folder {NAME} here")
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert "check the network" in message


def test_a_broken_connection_is_resumed_where_it_broke(client: Client, hub: HubServer) -> None:
    piece = 10 * 2**20  # the client writes that much at a time
    weights = random.Random(0).randbytes(piece + 1000)
    hub.repositories[NAME].revisions["main"]["model.safetensors"] = weights
    hub.cut["model.safetensors"] = piece + 100
    folder = client.resolve(NAME, hub.url)
    if "run the same again" in folder:  # huggingface_hub 1.x leaves the rest to the next run
        folder = client.resolve(NAME, hub.url)
    ranges = [r.range for r in hub.log if r.method == "GET" and r.file == "model.safetensors"]
    assert ranges == [None, f"bytes={piece}-"]
    assert (Path(folder) / "model.safetensors").read_bytes() == weights


def test_after_a_failed_download_the_complete_files_are_kept(
    client: Client, hub: HubServer, models: dict[str, GPT]
) -> None:
    hub.failing.add("model.safetensors")
    message = client.resolve(NAME, hub.url)
    assert message == (
        f"CheckpointError: downloading {NAME} failed: {hub.url} answers with status 500 (Internal "
        "Server Error): run the same again later; the files that are complete are kept"
    )
    assert len(message.splitlines()) == 1

    offline = client.resolve(NAME, hub.url, HF_HUB_OFFLINE="1")
    if offline.startswith("CheckpointError"):
        assert f"there is no folder {NAME} here" in offline
    else:  # huggingface_hub 1.x does not notice
        with pytest.raises(CheckpointError, match="get the rest if files are missing"):
            GPT.from_pretrained(offline)

    hub.failing.clear()
    hub.log.clear()
    folder = client.resolve(NAME, hub.url)
    assert "config.json" not in hub.downloads()
    assert same_weights(GPT.from_pretrained(folder), models["a"])


@pytest.mark.parametrize("token", [None, OTHER_TOKEN])
def test_a_gated_model_names_the_licence_page_and_the_login(
    client: Client, hub: HubServer, token: str | None
) -> None:
    variables = {} if token is None else {"HF_TOKEN": token}
    message = client.resolve("someone/gated", hub.url, **variables)
    assert message == (
        "CheckpointError: someone/gated is gated: accept its licence at "
        "https://huggingface.co/someone/gated, then run `hf auth login` with a token of that "
        "account"
    )


def test_a_gated_model_loads_with_the_token_of_an_account_that_may(
    client: Client, hub: HubServer, models: dict[str, GPT]
) -> None:
    folder = client.resolve("someone/gated", hub.url, HF_TOKEN=ACCEPTED_TOKEN)
    assert same_weights(GPT.from_pretrained(folder), models["a"])
    assert client.resolve("someone/gated", hub.url, HF_HUB_OFFLINE="1") == folder


def test_an_expired_token_is_named_as_the_cause(client: Client, hub: HubServer) -> None:
    message = client.resolve(NAME, hub.url, HF_TOKEN=EXPIRED_TOKEN)
    assert "refuses the access token" in message
    assert "hf auth login" in message


def test_a_missing_model_is_neither_folder_nor_model(client: Client, hub: HubServer) -> None:
    message = client.resolve("someone/nothing", hub.url)
    assert message.startswith(
        "CheckpointError: someone/nothing is neither a folder here nor a model on the hub"
    )


def test_a_wrong_revision_names_the_revision(client: Client, hub: HubServer) -> None:
    message = client.resolve(NAME, hub.url, "v9")
    assert message.startswith(f"CheckpointError: {NAME} has no revision 'v9'")


def test_a_repository_of_pickles_is_refused_without_downloading_them(
    client: Client, hub: HubServer
) -> None:
    folder = client.resolve("someone/pickles", hub.url)
    assert hub.downloads() == ["config.json"]
    with pytest.raises(CheckpointError, match=r"opening a pickle .* can run code, so convert"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", ["a b/c", "a//b", "-x", "a/b\0", "x" * 5000, "", " ", "a..b/c"])
def test_an_invalid_name_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor a hub name|no folder"):
        resolve(name)


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in (
        "./models/x",
        "../x",
        "/nowhere/x",
        "~/nowhere/x",
        "~nobody/x",
        "models/x/y",
        Path("x"),
    ):
        with pytest.raises(CheckpointError, match="there is no folder"):
            resolve(path)


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigcode" / "starcoder").mkdir(parents=True)
    assert resolve("bigcode/starcoder") == Path("bigcode/starcoder")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/bigcode") == tmp_path / "bigcode"


def test_a_folder_of_the_owners_name_does_not_hide_the_model_but_one_of_its_name_does(
    client: Client, hub: HubServer, tmp_path: Path
) -> None:
    owner = NAME.split("/")[0]
    (tmp_path / owner).mkdir()
    printed = client.run(
        f"import os; os.chdir({str(tmp_path)!r}); print(resolve({NAME!r})); "
        f"os.mkdir({NAME!r}); print(resolve({NAME!r}))",
        hub.url,
    )
    assert printed.splitlines() == [str(next(client.home.glob("hub/*/snapshots/*"))), NAME]


@pytest.mark.parametrize(
    "revision",
    ["", "../main", "a..b", "a\0b", "\ud800", "a\nb", "/etc/passwd", "a//b", ".", "a\\b"],
)
def test_an_invalid_revision_is_refused_without_asking_the_hub(revision: str) -> None:
    with pytest.raises(CheckpointError, match=r"revision is '.*': it must be a br"):
        resolve(NAME, revision)


def test_a_login_page_is_not_taken_for_the_hub(client: Client, hub: HubServer) -> None:
    hub.change = lambda *_: Answer(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})
    message = client.resolve(NAME, hub.url)
    assert message == (
        "CheckpointError: http://127.0.0.1 answers '<html>Welcome</html>', not as a hub does: "
        "check HF_ENDPOINT, and whether the network asks for a login"
    )


@pytest.mark.parametrize(
    "variables",
    [{"HF_ENDPOINT": "http://["}, {"HF_ENDPOINT": "nowhere"}, {"HF_HUB_DOWNLOAD_TIMEOUT": "long"}],
)
def test_an_invalid_setting_is_an_error(client: Client, variables: dict[str, str]) -> None:
    message = client.resolve(NAME, "http://127.0.0.1:9", **variables)
    assert message.startswith("CheckpointError: ")
    assert len(message.splitlines()) == 1


def test_a_broken_link_in_the_cache_is_reported_and_repaired_online(
    client: Client, hub: HubServer, models: dict[str, GPT]
) -> None:
    folder = client.resolve(NAME, hub.url)
    (Path(folder) / "model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"is a link to '.*blobs.*get the file again"):
        GPT.from_pretrained(folder)
    assert client.resolve(NAME, hub.url) == folder
    assert same_weights(GPT.from_pretrained(folder), models["a"])


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"revision is 'main' but .* is a folder"):
        resolve(tmp_path, "main")


def test_a_file_in_place_of_its_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file: give the folder that holds it"):
        resolve(file)


def test_a_folder_needs_neither_the_hub_library_nor_a_compiler(
    tmp_path: Path, files: dict[str, Files]
) -> None:
    for name, data in files["a"].items():
        (tmp_path / name).write_bytes(data)
    heavy = ("huggingface_hub.hf_api", "transformers", "sympy", "typer")
    printed = Client(tmp_path / "home").run(
        f"from mqa_gpt import GPT; GPT.from_pretrained({str(tmp_path)!r}); import sys, json; "
        f"print(json.dumps([m for m in {heavy!r} if m in sys.modules]))",
        "http://127.0.0.1:9",
    )
    assert json.loads(printed) == []


# ------------------------------------------------------------------- answers that no hub gives

Change = Callable[[Request, Answer], Answer]


def with_header(name: str, value: str) -> Change:
    return lambda _, answer: answer._replace(headers=answer.headers | {name: value})


def with_listing(change: Callable[[Any], Any], kind: str = "revision") -> Change:
    """Changes the model info or, with "tree", the list of files."""

    def changed(request: Request, answer: Answer) -> Answer:
        if not request.path.startswith("/api/models/") or f"/{kind}/" not in request.path:
            return answer
        body = change(json.loads(answer.body))
        return answer._replace(body=body if isinstance(body, bytes) else json.dumps(body).encode())

    return changed


def every_entry(**values: Any) -> Change:
    return with_listing(lambda entries: [entry | values for entry in entries], "tree")


@pytest.mark.parametrize("path", ["{outside}", "../../../../outside", "..", "a/b", "x\\y", ""])
def test_no_answer_becomes_a_path_outside_the_cache(
    client: Client, hub: HubServer, tmp_path: Path, path: str
) -> None:
    path = path.format(outside=tmp_path / "outside")
    changes = [
        with_header("X-Repo-Commit", path),
        with_header("ETag", f'"{path}"'),
        with_header("X-Linked-Etag", f'W/"{path}"'),
        with_listing(lambda info: info | {"sha": path}),
        every_entry(oid=path),
        every_entry(lfs={"oid": path, "size": 1, "pointerSize": 1}),
        every_entry(xetHash=path),
    ]
    names = [f"someone/case{i}" for i in range(len(changes))]
    for name in names:
        hub.repositories[name] = hub.repositories[NAME]

    def changed(request: Request, answer: Answer) -> Answer:
        found = re.search(r"/someone/case(\d)/", request.path)
        return changes[int(found[1])](request, answer) if found else answer

    hub.change = changed
    for name, message in zip(names, client.resolve_each(names, hub.url), strict=True):
        assert message.startswith("CheckpointError: http://127.0.0.1 names the "), name
        assert message.endswith("whether the network asks for a login"), name
    assert not list(client.home.glob("hub/**/blobs/*"))
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


def test_malformed_answers_are_typed_errors(client: Client, hub: HubServer) -> None:
    forms: list[Any] = [
        None, [], {}, 5, "sha", {"sha": None}, {"sha": ["a"]}, [None], [[]], b"[" * 100_000,
        b"{", b"\xff", b"", {"sha": "0" * 40, "siblings": 5}, [{"type": "file"}],
        [{"type": "file", "path": 5, "size": "x", "oid": "0"}], [{"path": "a", "lfs": [1]}],
    ]  # fmt: skip
    names = [f"someone/{kind}{i}" for i in range(len(forms)) for kind in ("revision", "tree")]
    for name in names:
        hub.repositories[name] = hub.repositories[NAME]

    def changed(request: Request, answer: Answer) -> Answer:
        found = re.match(r"/api/models/someone/(revision|tree)(\d+)/\1/", request.path)
        if not found:
            return answer
        form = forms[int(found[2])]
        return answer._replace(body=form if isinstance(form, bytes) else json.dumps(form).encode())

    hub.change = changed
    lines = client.resolve_each(names, hub.url)
    for name, line in zip(names, lines, strict=True):
        if name != "someone/tree1":  # which lists no files
            assert line.startswith("CheckpointError: "), name


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (403, "answers with status 403 (Forbidden): it refuses access: check what the access"),
        (429, "answers with status 429 (Too Many Requests): it limits the rate of requests"),
        (500, "answers with status 500 (Internal Server Error): run the same again later"),
        (599, "answers with status 599 (unknown): run the same again later"),
    ],
)
def test_a_refusal_is_named_with_its_status(
    client: Client, hub: HubServer, code: int, expected: str
) -> None:
    hub.change = lambda _, answer: answer._replace(status=code)
    assert f"; {hub.url} {expected}" in client.resolve(NAME, hub.url)


@pytest.mark.parametrize("header", [("Retry-After", "259200"), ("RateLimit", '"api";r=0;t=259200')])
def test_a_wait_of_days_is_an_error(
    client: Client, hub: HubServer, header: tuple[str, str]
) -> None:
    change = with_header(*header)
    hub.change = lambda *exchange: change(*exchange)._replace(status=429)
    assert client.resolve(NAME, hub.url) == (
        "CheckpointError: http://127.0.0.1 answers with status 429 and asks to wait 259,200 "
        "seconds: run the same again after that time"
    )


def test_an_answer_that_trickles_is_an_error(client: Client, hub: HubServer) -> None:
    hub.pause = 0.05
    code = "from mqa_gpt.checkpoints import answers; answers.PATIENCE = 0.5"
    message = client.run(f"{code}; print(resolve({NAME!r}))", hub.url)
    assert re.fullmatch(
        r"CheckpointError: http://127\.0\.0\.1 sent \d+ bytes in 1 seconds: run the same again "
        "when it is faster",
        message,
    )


def test_a_server_that_never_answers_is_an_error(client: Client, hub: HubServer) -> None:
    hub.change = lambda _, answer: answer._replace(status=100)  # and the client waits for another
    code = "from mqa_gpt.checkpoints import answers; answers.PATIENCE = 0.5"
    message = client.run(f"{code}; print(resolve({NAME!r}))", hub.url)
    assert f"{hub.url} cannot be reached (ReadTimeout: timed out): check the network" in message


def test_a_listing_without_end_is_an_error(client: Client, hub: HubServer) -> None:
    hub.change = with_listing(lambda info: info | {"padding": "x" * 21_000_000})
    message = client.resolve(NAME, hub.url)
    assert message.startswith("CheckpointError: http://127.0.0.1 lists more than 20,000,000 bytes")


def test_passwords_and_tokens_are_not_printed(client: Client, hub: HubServer) -> None:
    token = "hf_" + "s3cret" * 4
    hub.change = lambda _, answer: answer._replace(
        status=400, headers=answer.headers | {"X-Error-Message": f"\x1b[2J token {token} mine"}
    )
    endpoint = hub.url.replace("//", "//user:p4ssword@")
    for mode in ("0", "1"):
        message = client.resolve(NAME, endpoint, HF_TOKEN=token, HF_HUB_OFFLINE=mode)
        assert message.startswith("CheckpointError: ")
        assert "p4ssword" not in message
        assert "s3cret" not in message
        assert message.isprintable()


def test_a_corrupted_download_is_deleted_and_fetched_again(
    client: Client, hub: HubServer, models: dict[str, GPT]
) -> None:
    def changed(request: Request, answer: Answer) -> Answer:
        if request.method == "HEAD" or request.file != "model.safetensors":
            return answer
        return answer._replace(body=answer.body[:-1] + b"?")

    hub.change = changed
    message = client.resolve(NAME, hub.url)
    assert message.startswith("CheckpointError: a downloaded file does not have the SHA-256")
    hub.change = None
    folder = client.resolve(NAME, hub.url)
    assert same_weights(GPT.from_pretrained(folder), models["a"])


def test_a_hub_error_hides_the_errors_that_caused_it(client: Client, hub: HubServer) -> None:
    code = (
        f"from mqa_gpt import LLM\n    try: LLM.load({NAME!r})\n"
        "    except InputError as error: print(error.__cause__, error.__context__)"
    )
    assert client.run(code, hub.url, HF_HUB_OFFLINE="1") == "None None"


def mutated(answer: Answer, chance: random.Random) -> Answer:
    """The answer with one thing wrong in its status, headers or body."""
    junk = [None, [], {}, "", "../../x", "/etc/x", -1, 2**70, 0.5, True, "\x1b[2J", "x" * 10_000]
    match chance.randrange(5):
        case 0:
            statuses = [100, 204, 206, 301, 302, 400, 401, 403, 404, 416, 418, 429, 500, 503, 599]
            return answer._replace(status=chance.choice(statuses))
        case 1:
            names = [
                *answer.headers,
                "Location",
                "X-Error-Code",
                "Link",
                "X-Xet-Hash",
                "X-Repo-Commit",
            ]
            texts = ["", "../../x", "/etc/x", "-1", "9" * 40, "a b", '"', "http://127.0.0.1:9/x"]
            values = {chance.choice(names): chance.choice(texts)}
            return answer._replace(headers=answer.headers | values)
        case 2:
            kept = chance.sample(sorted(answer.headers), len(answer.headers) // 2)
            return answer._replace(headers={name: answer.headers[name] for name in kept})
        case 3:
            place = chance.randrange(len(answer.body) + 1)
            return answer._replace(body=answer.body[:place] + chance.randbytes(chance.randrange(9)))
    try:
        values = json.loads(answer.body)
    except ValueError:
        return answer._replace(body=b"")
    inside = values
    while isinstance(inside, dict | list) and inside:
        key = chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if chance.random() < 0.4 or not isinstance(inside[key], dict | list):
            inside[key] = chance.choice(junk)
            break
        inside = inside[key]
    return answer._replace(body=json.dumps(values).encode())


@pytest.mark.fuzz
@pytest.mark.slow
def test_whatever_a_hub_answers_is_a_folder_or_a_typed_error(
    client: Client, hub: HubServer, tmp_path: Path
) -> None:
    names = [f"someone/fuzz{i}" for i in range(max(60, EXAMPLES // 100))]
    for name in names:
        hub.repositories[name] = hub.repositories[NAME]
    counts: Counter[str] = Counter()

    def changed(request: Request, answer: Answer) -> Answer:
        found = re.search(r"/someone/fuzz\d+/", request.path)
        if not found:
            return answer
        counts[found[0]] += 1
        chance = random.Random(f"{found[0]} {counts[found[0]]}")
        return mutated(answer, chance) if chance.random() < 0.4 else answer

    hub.change = changed
    lines = []
    for first in range(0, len(names), 100):
        code = (
            "import time; from mqa_gpt.checkpoints import answers\n"
            "    time.sleep = lambda seconds: None\n"  # before a retry
            "    answers.PATIENCE = 0.5\n"
            f"    for name in {names[first : first + 100]!r}:\n"
            "        try: print(resolve(name))\n"
            "        except InputError as error: print(f'{type(error).__name__}: {error}')"
        )
        printed = client.run(code, hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
        lines += printed.splitlines()
    kinds = Counter(line.split(":")[0] == "CheckpointError" for line in lines)
    assert kinds[True] + kinds[False] == len(names)
    assert kinds[True] > len(names) / 5
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


def test_the_log_lines_of_the_library_are_masked_too(client: Client) -> None:
    code = (
        "import logging, sys; from mqa_gpt.checkpoints.answers import check_answers\n"
        "    check_answers(); log = logging.getLogger('huggingface_hub')\n"
        "    log.handlers[0].setStream(sys.stdout)\n"
        "    log.getChild('x').warning('GET %s', 'http://user:p4ssword@host/x')"
    )
    assert client.run(code, "http://127.0.0.1:9") == "GET http://***@host/x"
