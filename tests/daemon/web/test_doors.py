"""Which requests pass the middleware, called as a server would."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from framepackd.settings.config import Config, ConfigError, load_config
from framepackd.web import uploads
from framepackd.web.doors import BODY_BYTES, Doors
from framepackd.web.origins import Hosts
from framepackd.web.passwords import FREE, LONGEST_WAIT, MOST_A_MINUTE, MOST_ADDRESSES, Tries
from framepackd.web.uploads import KEPT_SECONDS, LEAST_BYTES, Uploads, own_folder

Headers = list[tuple[bytes, bytes]]
HERE: Headers = [(b"host", b"localhost:7860")]
FORM = (b"content-type", b"multipart/form-data; boundary=x")
JSON = (b"content-type", b"application/json")
LOGIN = (b"content-type", b"application/x-www-form-urlencoded")
LOCAL = Hosts("127.0.0.1", (), others=False)


def config_in(state: Path) -> Config:
    """Give a configuration of defaults."""
    path = state.parent / "config.toml"
    path.write_text(f'state_dir = "{state}"\n')
    return load_config(path)


class Behind:
    """Stands in for the page: reads a body and answers 200, or as told."""

    def __init__(self, folder: Path | None = None, status: int = 200) -> None:
        self.reached = 0
        self.body = b""
        self.status = status
        self.folder = folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached += 1
        if scope["type"] == "websocket":
            return
        self.body = b""
        more = True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
            if self.folder is not None:  # as gradio: what has come lies there, whatever happens next
                (self.folder / "tmp12345").write_bytes(self.body)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})


def make_doors(
    folder: Path,
    behind: Callable[..., Awaitable[None]],
    hosts: Hosts = LOCAL,
    tries: Tries | None = None,
    **bounds: int,
) -> Doors:
    kept = Uploads(folder, **({"limit": 10 * LEAST_BYTES, "quota": 20 * LEAST_BYTES} | bounds))
    for below in (uploads.received, uploads.temporary):
        below(folder).mkdir(exist_ok=True)
    ends = {"upload": "/upload", "login": "/login", "changing": ("/logout",)}
    return Doors(behind, hosts=hosts, uploads=kept, tries=tries or Tries(), **ends)


class Answer:
    """What came back."""

    def __init__(self, sent: list[dict[str, Any]], read: int) -> None:
        self.status: int = sent[0]["status"]
        self.headers = dict(sent[0]["headers"])
        self.text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        self.read = read  # how many pieces of the body were asked for


def ask(
    doors: Doors,
    method: str = "GET",
    path: str = "/config",
    headers: Headers = HERE,
    body: tuple[bytes, ...] = (b"",),
    **scope: Any,
) -> Answer:
    sent: list[dict[str, Any]] = []
    left = list(body)
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        if not left:
            return {"type": "http.disconnect"}
        read += 1
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    whole = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": headers,
        "scheme": "http",
        "client": ("192.0.2.7", 1),
    } | scope
    asyncio.run(doors(whole, receive, send))
    return Answer(sent, read)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:7860", "127.0.0.1:1", "127.9.8.7", "[::1]", "[::1]:7860", "[0:0::1]:80"],
)
def test_names_of_this_machine_are_answered_whatever_the_port(tmp_path: Path, host: str) -> None:
    assert ask(make_doors(tmp_path, Behind()), headers=[(b"host", host.encode())]).status == 200


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [""],
        ["evil.example"],
        ["evil.example:7860"],
        ["localhost.evil.example"],
        ["localhost."],
        ["localhost:"],
        ["localhost:0"],
        ["localhost:99999"],
        ["localhost:7860:7860"],
        ["me@localhost"],
        ["localhost/"],
        ["local host"],
        ["localhost", "localhost"],
        ["localhost", "evil.example"],
        ["localhost, evil.example"],
        ["127.1"],
        ["0127.0.0.1"],
        ["2130706433"],
        ["0.0.0.0"],  # noqa: S104 - a name here
        ["128.0.0.1"],
        ["[::2]"],
        ["[::1%lo]"],
        ["[::1%25lo]"],
        ["[::ffff:127.0.0.1]"],
        ["::1"],
        ["[::1"],
        ["[localhost]"],
        ["l\xf6calhost"],
    ],
)
def test_other_names_are_refused_before_a_body_is_read(tmp_path: Path, hosts: list[str]) -> None:
    behind = Behind()
    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    for method in ("GET", "POST", "OPTIONS"):
        answer = ask(make_doors(tmp_path, behind), method, headers=headers, body=(b"x", b"x"))
        assert (answer.status, answer.read, behind.reached) == (403, 0, 0)
        assert answer.headers[b"connection"] == b"close"


def test_the_refusal_of_a_name_says_what_to_set(tmp_path: Path) -> None:
    answer = ask(make_doors(tmp_path, Behind()), headers=[(b"host", b"films.example:7860")])
    assert 'hosts = ["films.example"] under [web]' in answer.text


@pytest.mark.parametrize("path", ["http://localhost/config", "http://evil.example/config", "*", ""])
def test_an_address_instead_of_a_path_is_refused(tmp_path: Path, path: str) -> None:
    assert ask(make_doors(tmp_path, Behind()), path=path).status == 403


def test_the_host_that_a_proxy_forwards_is_not_trusted(tmp_path: Path) -> None:
    forwarded = [(b"x-forwarded-host", b"localhost"), (b"forwarded", b"host=localhost")]
    headers = [(b"host", b"evil.example"), *forwarded]
    assert ask(make_doors(tmp_path, Behind()), headers=headers).status == 403
    origin = [*HERE, (b"x-forwarded-host", b"evil.example"), (b"origin", b"http://evil.example")]
    assert ask(make_doors(tmp_path, Behind()), "POST", headers=origin).status == 403


@pytest.mark.parametrize(
    ("server", "named", "others", "host", "answered"),
    [
        ("127.0.0.1", ["films.example"], False, "films.example", True),
        ("127.0.0.1", ["films.example"], False, "FILMS.example:8443", True),
        ("127.0.0.1", ["films.example:8443"], False, "films.example:8443", True),
        ("127.0.0.1", ["films.example:8443"], False, "films.example", False),
        ("127.0.0.1", ["films.example"], False, "localhost:7860", True),
        ("127.0.0.1", ["films.example"], False, "x.films.example", False),
        ("0.0.0.0", [], True, "whatever.example", True),  # noqa: S104 - as above
        ("0.0.0.0", [], True, "me@whatever.example", False),  # noqa: S104 - as above
        ("0.0.0.0", ["films.example"], True, "whatever.example", False),  # noqa: S104 - as above
        ("192.0.2.1", ["films.example"], True, "192.0.2.1:7860", True),
        ("192.0.2.1", ["films.example"], True, "localhost:7860", True),
        ("2001:db8::1", ["films.example"], True, "[2001:DB8:0::1]:7860", True),
        ("127.0.0.1", [], True, "a1b2.tunnel.example", True),  # shared: by a tunnel that ends here
    ],
)
def test_names_in_the_config_are_answered_and_all_of_them_where_others_may_come(
    server: str, named: list[str], others: bool, host: str, answered: bool, tmp_path: Path
) -> None:
    doors = make_doors(tmp_path, Behind(), Hosts(server, named, others=others))
    assert ask(doors, headers=[(b"host", host.encode())]).status == (200 if answered else 403)


@pytest.mark.parametrize("host", ["https://films.example", "films.example/", "*.example", "", "two names"])
def test_an_impossible_host_in_the_config_is_an_error(tmp_path: Path, host: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[web]\nhosts = [{json.dumps(host)}]\n")
    with pytest.raises(ConfigError, match=r"hosts must be names such as"):
        load_config(config)


FOREIGN: list[Headers] = [
    [(b"origin", b"http://evil.example")],
    [(b"origin", b"null")],
    [(b"origin", b"")],
    [(b"origin", b"http://localhost")],  # another port is another page
    [(b"origin", b"http://localhost:8000")],
    [(b"origin", b"http://127.0.0.1:7860")],
    [(b"origin", b"http://localhost:7860.evil.example")],
    [(b"origin", b"http://localhost:7860@evil.example")],
    [(b"origin", b"file://localhost:7860")],
    [(b"origin", b"http://localhost:7860"), (b"origin", b"http://evil.example")],
    [(b"origin", b"http://localhost:7860 http://evil.example")],
]
ELSEWHERE: list[Headers] = [[(b"sec-fetch-site", site)] for site in (b"cross-site", b"same-site", b"odd")]


@pytest.mark.parametrize("headers", FOREIGN + ELSEWHERE)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload", "/login"])
def test_other_pages_change_nothing(tmp_path: Path, headers: Headers, path: str) -> None:
    behind = Behind()
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = ask(make_doors(tmp_path, behind), method, path, [*HERE, *headers, FORM], (b"x", b"x"))
        assert (answer.status, answer.read, behind.reached) == (403, 0, 0)
    assert ask(make_doors(tmp_path, behind), path="/logout", headers=[*HERE, *headers]).status == 403


@pytest.mark.parametrize("headers", FOREIGN)
def test_other_pages_read_no_answers(tmp_path: Path, headers: Headers) -> None:
    for method in ("GET", "OPTIONS"):
        assert ask(make_doors(tmp_path, Behind()), method, headers=[*HERE, *headers]).status == 403


def test_links_from_other_pages_lead_here(tmp_path: Path) -> None:
    assert ask(make_doors(tmp_path, Behind()), path="/", headers=[*HERE, *ELSEWHERE[0]]).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"origin", b"http://localhost:7860"), (b"sec-fetch-site", b"same-origin")],
        [(b"origin", b"https://localhost:7860")],  # a proxy with a certificate may not tell that it has one
        [(b"sec-fetch-site", b"none")],
    ],
)
def test_scripts_and_the_own_page_change_things(tmp_path: Path, headers: Headers) -> None:
    for path in ("/gradio_api/queue/join", "/logout"):
        assert ask(make_doors(tmp_path, Behind()), "POST", path, [*HERE, *headers]).status == 200


@pytest.mark.parametrize(
    ("host", "origin", "scheme", "own"),
    [
        ("films.example", "https://films.example", "http", True),
        ("films.example:443", "https://films.example", "http", True),
        ("films.example", "http://films.example", "https", False),
        ("127.0.0.1:7860", "https://films.example", "http", True),  # a proxy that does not pass the name on
        ("127.0.0.1:7860", "https://films.example:8443", "http", False),
        ("127.0.0.1:7860", "https://other.example", "http", False),
    ],
)
def test_the_page_behind_a_proxy_is_known_by_the_name_in_the_config(
    tmp_path: Path, host: str, origin: str, scheme: str, own: bool
) -> None:
    doors = make_doors(tmp_path, Behind(), Hosts("127.0.0.1", ["films.example"], others=False))
    headers = [(b"host", host.encode()), (b"origin", origin.encode())]
    assert ask(doors, "POST", headers=headers, scheme=scheme).status == (200 if own else 403)


@pytest.mark.parametrize(
    ("headers", "reached"),
    [
        ([*HERE, (b"origin", b"http://localhost:7860")], 1),
        ([*HERE, (b"origin", b"http://evil.example")], 0),
        ([(b"host", b"evil.example"), (b"origin", b"http://evil.example")], 0),
    ],
)
def test_a_websocket_of_another_page_is_not_opened(tmp_path: Path, headers: Headers, reached: int) -> None:
    behind = Behind()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": headers, "scheme": "ws"}
    asyncio.run(make_doors(tmp_path, behind)(scope, receive, send))
    assert (behind.reached, [message["type"] for message in sent]) == (
        reached,
        [] if reached else ["websocket.close"],
    )


def file(**values: Any) -> bytes:
    return json.dumps({"data": [{"deep": [values | {"meta": {"_type": "gradio.FileData"}}]}]}).encode()


ADDRESSES = [
    "http://evil.example/x.png",
    "https://evil.example/x.png",
    "HTTP://evil.example/x.png",
    " http://evil.example/x.png",
    "ftp://evil.example/x.png",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "//evil.example/x.png",
    "\\\\evil.example\\x.png",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("key", ["path", "url"])
def test_files_from_elsewhere_are_refused_before_the_page_reads_the_body(
    tmp_path: Path, address: str, key: str
) -> None:
    behind = Behind()
    for path in ("/gradio_api/queue/join", "/gradio_api/run/upload", "/gradio_api/call/v2/process"):
        for kind in ([JSON], [], [(b"content-type", b"text/plain")]):
            answer = ask(make_doors(tmp_path, behind), "POST", path, HERE + kind, (file(**{key: address}),))
            assert (answer.status, behind.reached) == (422, 0)
            told = json.loads(answer.text)["detail"][0]["message"]
            assert "upload the file itself" in told


@pytest.mark.parametrize(
    "body",
    [
        b'{"path": "http://evil.example/", "path": "/fine"}',
        b'{"path": "/fine", "path": "http://evil.example/"}',
        b'{"p\\u0061th": "\\u0068ttp://evil.example/"}',
        json.dumps({"path": "http://evil.example/"}).encode("utf-16"),
        b'{"url": "http://evil.example/localhost:7860/"}',
        b'{"url": "http://localhost:7860@evil.example/"}',
        b'{"url": "http://localhost:7860\\\\@evil.example/"}',
        b'{"path": "http://localhost:7860/x.png"}',
    ],
)
def test_an_oddly_written_address_counts_as_an_address(tmp_path: Path, body: bytes) -> None:
    behind = Behind()
    answer = ask(make_doors(tmp_path, behind), "POST", "/gradio_api/queue/join", [*HERE, JSON], (body,))
    assert (answer.status, behind.reached) == (422, 0)


@pytest.mark.parametrize(
    "body",
    [
        file(path="/state/web/uploads/ab/x.png", url="http://localhost:7860/gradio_api/file=/state/x.png"),
        file(path="/state/web/uploads/ab/x.png", url="/gradio_api/file=/state/x.png"),
        json.dumps({"data": ["see http://evil.example", {"prompt": "https://x"}]}).encode(),
        b"",
    ],
)
def test_uploaded_files_and_prompts_with_addresses_pass_as_they_are(tmp_path: Path, body: bytes) -> None:
    behind = Behind()
    pieces = (body[:10], body[10:])
    answer = ask(make_doors(tmp_path, behind), "POST", "/gradio_api/queue/join", [*HERE, JSON], pieces)
    assert (answer.status, behind.body) == (200, body)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"{", b"\xff\xfe\xfd"])
def test_a_body_that_cannot_be_searched_is_refused(tmp_path: Path, body: bytes) -> None:
    answer = ask(make_doors(tmp_path, Behind()), "POST", "/gradio_api/queue/join", [*HERE, JSON], (body,))
    assert answer.status == 400


@pytest.mark.parametrize(
    "path", ["file=https://evil.example/x", "file/http://evil.example/x", "proxy=http://e/x"]
)
def test_the_server_fetches_no_address_in_a_path(tmp_path: Path, path: str) -> None:
    assert ask(make_doors(tmp_path, Behind()), path=f"/gradio_api/{path}").status == 403


@pytest.mark.parametrize("said", [[], [(b"content-length", b"5")], [(b"content-length", b"99999999")]])
@pytest.mark.parametrize("kind", [JSON, FORM])
def test_a_body_that_is_no_upload_is_limited_while_it_arrives(
    tmp_path: Path, said: Headers, kind: tuple[bytes, bytes]
) -> None:
    behind = Behind()
    body = (b" " * (BODY_BYTES // 2),) * 6
    for path in ("/gradio_api/queue/join", "/login"):
        answer = ask(make_doors(tmp_path, behind), "POST", path, [*HERE, kind, *said], body)
        assert (answer.status, behind.reached) == (413, 0)


def upload(doors: Doors, *body: bytes, said: int | None = None) -> Answer:
    length = [] if said is None else [(b"content-length", str(said).encode())]
    return ask(doors, "POST", "/gradio_api/upload", [*HERE, FORM, *length], body)


@pytest.mark.parametrize("said", [None, 5, 1000])
def test_an_upload_is_cut_off_where_it_becomes_too_large_and_leaves_nothing(
    tmp_path: Path, said: int | None
) -> None:
    behind = Behind(folder=tmp_path / "uploads")
    doors = make_doors(tmp_path, behind, limit=100)
    answer = upload(doors, *[b"x" * 40] * 10, said=said)
    assert answer.status == 413
    assert "upload_limit_mb" in answer.text
    assert len(behind.body) <= 100
    assert not list((tmp_path / "uploads").iterdir())
    assert upload(doors, b"x" * 100).status == 200


def test_stored_and_arriving_uploads_share_a_quota(tmp_path: Path) -> None:
    doors = make_doors(tmp_path, Behind(), quota=4 * LEAST_BYTES)
    lying = tmp_path / "uploads/ab/cat.png"
    lying.parent.mkdir(parents=True)
    lying.write_bytes(b"x" * 2 * LEAST_BYTES)
    for tiny in range(2):
        (lying.parent / f"{tiny}.png").write_bytes(b"x")  # counts too: a file is more than its bytes
    for said in (None, LEAST_BYTES):
        answer = upload(doors, b"x" * LEAST_BYTES, said=said)
        assert answer.status == 507
        assert "upload_quota_mb" in answer.text
    lying.unlink()
    assert upload(doors, b"x" * LEAST_BYTES).status == 200


def test_simultaneous_uploads_share_the_quota(tmp_path: Path) -> None:
    kept = Uploads(tmp_path, limit=1000, quota=1000)

    async def both() -> None:
        async with kept.coming(0) as first, kept.coming(0) as second:
            first(600)
            second(300)
            with pytest.raises(uploads.UploadError, match="upload_quota_mb"):
                second(300)

    asyncio.run(both())


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    class Breaks(Behind):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)
            raise ConnectionError

    doors = make_doors(tmp_path, Breaks(folder=tmp_path / "uploads"))
    with pytest.raises(ConnectionError):
        upload(doors, b"x")
    assert not list((tmp_path / "uploads").iterdir())


def test_old_uploads_are_removed_and_those_of_a_page_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    config = config_in(state)
    killed = state / "web/web-killed"
    (killed / "uploads").mkdir(parents=True)
    with own_folder(config) as first, own_folder(config) as second:
        assert not killed.exists()
        assert first != second, "two pages share nothing"
        assert first.stat().st_mode & 0o777 == 0o700
        picture = first / "uploads/ab/cat.png"
        picture.parent.mkdir()
        picture.write_bytes(b"x")
        kept = Uploads(first, limit=100, quota=100)
        assert kept.sweep() == LEAST_BYTES
        later = uploads.time.time() + KEPT_SECONDS + 5
        monkeypatch.setattr(uploads.time, "time", lambda: later)
        assert kept.sweep() == 0
        assert not picture.exists()
        assert (first / "uploads").exists()
    assert not list((state / "web").iterdir())


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> dict[Path, str]:
    """Say which file systems folders are on."""
    known: dict[Path, str] = {}
    monkeypatch.setattr(
        uploads,
        "filesystem_type",
        lambda path: next((kind for folder, kind in known.items() if path.is_relative_to(folder)), "ext4"),
    )
    return known


def test_uploads_are_kept_on_a_disk_if_there_is_one(
    tmp_path: Path, types: dict[Path, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state, cache = tmp_path / "state", tmp_path / "cache"
    monkeypatch.setenv("CACHE_DIRECTORY", str(cache))
    for kinds, wanted in (
        ({}, state),
        ({state: "tmpfs"}, cache),
        ({state: "ramfs"}, cache),
        ({cache: "tmpfs"}, state),
        ({state: "tmpfs", cache: "tmpfs"}, state),
    ):
        types.clear()
        types.update(kinds)
        caplog.clear()
        with own_folder(config_in(state)) as folder:
            assert folder.is_relative_to(wanted)
        assert ("in memory" in caplog.text) == (len(kinds) == 2), "all there is: said, and done"


def test_each_wrong_password_delays_the_next_check_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    behind = Behind(status=400)
    doors = make_doors(tmp_path, behind, tries=Tries(lambda: now))

    def try_it(address: str = "192.0.2.7") -> Answer:
        return ask(doors, "POST", "/login", [*HERE, LOGIN], (b"password=x",), client=(address, 1))

    for _ in range(20):  # as fast as they are looked at
        answer = try_it()
        while answer.status == 429:
            now += int(answer.headers[b"retry-after"])
            answer = try_it()
        assert answer.status == 400
    assert behind.reached == 20
    assert now > 10 * LONGEST_WAIT
    assert caplog.messages[0].startswith("wrong password from 192.0.2.7, 1 in")
    assert len(caplog.records) == 20, "what is not looked at is not told either"
    behind.status = 200
    assert try_it().status == 429, "not even the right one"
    assert try_it("192.0.2.8").status == 200
    now += LONGEST_WAIT
    assert try_it().status == 200
    behind.status = 400
    assert try_it().status == 400, "whoever knew it may mistype it"


def test_passwords_that_come_at_once_are_checked_one_by_one(tmp_path: Path) -> None:
    class Slow(Behind):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(0.001)
            await super().__call__(scope, receive, send)

    behind = Slow(status=400)
    doors = make_doors(tmp_path, behind)
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    async def all_at_once() -> None:
        scope = {"type": "http", "method": "POST", "path": "/login/", "headers": HERE, "scheme": "http"}
        await asyncio.gather(*(doors(scope | {"client": ("192.0.2.7", 1)}, receive, send) for _ in range(50)))

    asyncio.run(all_at_once())
    assert (statuses.count(400), statuses.count(429), behind.reached) == (FREE, 50 - FREE, FREE)


def test_wrong_passwords_of_all_addresses_are_limited_together_in_bounded_memory() -> None:
    now = 0.0
    tries = Tries(lambda: now)
    looked_at = 0
    for number in range(2 * MOST_ADDRESSES):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        if not tries.wait(address):
            tries.wrong(address)
            looked_at += 1
        now += 0.01
    assert looked_at <= MOST_A_MINUTE * (now / 60 + 1)
    assert [tries.wrong("2001:db8:ffff::1") for _ in range(2)] == [1, 2]
    for number in range(MOST_ADDRESSES):
        tries.wrong(f"2001:db8:{number:x}::1")
    assert tries.wrong("2001:db8:ffff::1") == 1, "forgotten for those that came after it"
    assert tries.wrong(f"2001:db8:{number:x}::1") == 2


def test_an_ipv6_network_has_one_count() -> None:
    tries = Tries(lambda: 0.0)
    for number in range(FREE):
        tries.wrong(f"2001:db8::{number}")
    assert tries.wait("2001:db8::ffff") > 0
    assert not tries.wait("2001:db8:0:1::1")


def test_browsers_may_not_guess_content_types(tmp_path: Path) -> None:
    assert ask(make_doors(tmp_path, Behind())).headers[b"x-content-type-options"] == b"nosniff"


def test_events_that_are_no_request_pass(tmp_path: Path) -> None:
    behind: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        behind.append(scope["type"])

    asyncio.run(make_doors(tmp_path, app)({"type": "lifespan"}, None, None))
    assert behind == ["lifespan"]
