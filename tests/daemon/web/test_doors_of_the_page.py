"""The doors of a real page: what a browser, a script and a bare socket get past them."""

import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, ValidationError
from playwright.sync_api import sync_playwright

from tests.acceptance.conftest import Daemon, picture
from tests.daemon.web.conftest import CHROMIUM, EVERYBODY, Web, in_a_browser, running, status

PASSWORD = "x" * 12
# To this page 127.0.0.1 is the internet: else gradio would not ask the server of the test for anything.
NO_ADDRESS_IS_PRIVATE = "import safehttpx; safehttpx.is_public_ip = lambda address: True"


@pytest.fixture(scope="module")
def guarded(tiny_daemon: Daemon) -> Iterator[Web]:
    settings = {"password": PASSWORD, "upload_limit_mb": "1", "upload_quota_mb": "3"}
    with running(tiny_daemon, "--server", EVERYBODY, first=NO_ADDRESS_IS_PRIVATE, **settings) as web:
        yield web


@pytest.fixture(scope="module")
def logged_in(guarded: Web) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        form = {"username": "framepackd", "password": PASSWORD}
        assert client.post("login", data=form).status_code == 200
        yield client


def lying(daemon: Daemon) -> list[Path]:
    """Give what is below all pages' folders."""
    return [path for path in (daemon.state / "web").rglob("*") if path.is_file()]


def inbox(daemon: Daemon) -> list[Path]:
    return [path for path in daemon.inbox.rglob("*") if path.is_file()]


def speak(web: Web, request: bytes) -> bytes:
    """Send bytes and give all that comes back until the server closes."""
    address = urlsplit(web.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer


def pauses(url: str) -> str:
    """Give the form that a browser sends when somebody clicks on ``Pause``, with its token."""
    token = re.search(r'name="token" value="([^"]+)"', httpx.get(url, headers={"accept": "text/html"}).text)
    assert token
    return urlencode({"token": token[1]})


@in_a_browser
def test_a_page_that_rebinds_its_name_to_this_machine_reads_nothing_and_pauses_nothing(
    tiny_daemon: Daemon, web: Web
) -> None:
    port = urlsplit(web.url).port
    ask = """async body => {
        const form = {method: "POST", headers: {"content-type": "application/x-www-form-urlencoded"}, body};
        const answers = [await fetch("/config"), await fetch("/page/do/pause", form)];
        return answers.map(answer => answer.status)
    }"""
    with sync_playwright() as playwright:
        turned = ["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=turned)
        page = browser.new_page()
        shown = page.goto(f"http://evil.example:{port}/")
        assert shown is not None
        answers = page.evaluate(ask, pauses(web.url))
        text = page.inner_text("body")
        browser.close()
    assert tiny_daemon.status()["daemon"]["paused"] is None
    assert (shown.status, answers) == (403, [403, 403])
    assert 'hosts = ["evil.example"]' in text


@in_a_browser
def test_a_page_at_another_port_reads_nothing_and_pauses_nothing(tiny_daemon: Daemon, web: Web) -> None:
    ask = """async ([url, body]) => {
        const read = await fetch(url + "config").then(answer => answer.text()).catch(() => "");
        const plain = {method: "POST", mode: "no-cors", headers: {"content-type": "text/plain"}, body};
        await fetch(url + "page/do/pause", plain);
        const headers = {"content-type": "application/x-www-form-urlencoded"};
        await fetch(url + "page/do/pause", {method: "POST", mode: "no-cors", headers, body});
        await fetch(url + "page/do/pause", {method: "POST", headers, body}).catch(() => "");
        return read
    }"""
    with serving() as (other, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(other)
        read = page.evaluate(ask, [web.url, pauses(web.url)])
        browser.close()
    assert tiny_daemon.status()["daemon"]["paused"] is None
    assert read == ""


@pytest.mark.parametrize(
    ("head", "answer"),
    [
        (b"GET /config HTTP/1.0\r\n", b"403"),
        (b"GET /config HTTP/1.1\r\n", b"400"),
        (b"GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", b"400"),
        (b"GET /config HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost\r\n", b"403"),
        (b"GET http://localhost/config HTTP/1.1\r\nHost: localhost\r\n", b"403"),
        (b"GET http://evil.example/config HTTP/1.1\r\nHost: localhost\r\n", b"403"),
        (b"OPTIONS /config HTTP/1.1\r\nHost: evil.example\r\n", b"403"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n", b"403"),
        # These announce a body that never comes: an answer is one before it is read.
        (b"POST /login HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 9\r\n", b"403"),
        (b"POST /gradio_api/upload HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n", b"403"),
        (
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 9\r\n"
            b"Expect: 100-continue\r\n",
            b"403",
        ),
    ],
)
def test_a_name_that_is_not_this_machines_is_refused_on_the_wire(
    web: Web, head: bytes, answer: bytes
) -> None:
    assert speak(web, head + b"\r\n").split()[1] == answer


def test_other_origins_are_not_told_that_they_may_read(web: Web) -> None:
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        answer = httpx.request(method, f"{web.url}config", headers=origin)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def called(web: Web, picture: str, prompt: str) -> str:
    """Call the endpoint as a script without a library does; gives the events that come back."""
    url = f"{web.url}gradio_api/call/process"
    given = {"path": picture, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [given, prompt, "", *[None] * 8, True, None, None, False, False]})
    event = httpx.post(url, content=body, headers={"content-type": "application/json"}).json()["event_id"]
    return httpx.get(f"{url}/{event}", timeout=60).text


def test_a_mistake_in_a_drop_reaches_the_script_and_leaves_nothing(
    tiny_daemon: Daemon, web: Web, tmp_path: Path
) -> None:
    before = inbox(tiny_daemon)
    with picture(tmp_path / "cat.png").open("rb") as cat:
        (uploaded,) = httpx.post(f"{web.url}gradio_api/upload", files={"files": cat}).json()
    assert "half of one" in called(web, uploaded, "pan left \ud83d")
    client = Client(web.url, verbose=False)
    cat, gif = (handle_file(str(picture(tmp_path / name))) for name in ("cat.png", "end.gif"))
    with pytest.raises(AppError, match=r"the picture is a \.gif"):
        client.predict(input_image=cat, end_frame=gif, prompt="pan left", api_name="/process")
    assert inbox(tiny_daemon) == before


@pytest.mark.parametrize("path", ["config.toml", "state/framepackd.db", "/etc/passwd"])
def test_files_that_were_not_uploaded_are_not_taken(tiny_daemon: Daemon, web: Web, path: str) -> None:
    before = inbox(tiny_daemon)
    assert "event: error" in called(web, str(tiny_daemon.root / path), "pan left")
    assert inbox(tiny_daemon) == before


@contextmanager
def serving() -> Iterator[tuple[str, list[str]]]:
    """Run a server on this machine; gives its address and what it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<p>a page")

        def log_message(self, format: str, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


def test_nothing_is_fetched_for_a_script(tiny_daemon: Daemon, guarded: Web, logged_in: httpx.Client) -> None:
    before = inbox(tiny_daemon)
    client = Client(guarded.url, auth=("framepackd", PASSWORD), verbose=False)
    with serving() as (url, asked):
        assert status(f"{url}there") == 200
        with pytest.raises(ValidationError, match="nothing is fetched from elsewhere"):
            client.predict(input_image=handle_file(f"{url}x.png"), prompt="pan left", api_name="/process")
        given = {"path": f"{url}y.png", "url": f"{url}z.png", "meta": {"_type": "gradio.FileData"}}
        data = [given, "pan left", "", *[None] * 8, True, None, None, False, False]
        for path in ("call/process", "run/process", "api/process", "queue/join"):
            answer = logged_in.post(f"gradio_api/{path}", json={"data": data, "session_hash": "a"})
            assert answer.status_code == 422
        for path in (f"file={url}a.png", f"file/{url}b.png", f"proxy={url}c.png"):
            assert logged_in.get(f"gradio_api/{path}").status_code == 403
        time.sleep(0.3)  # what was begun all the same would come by now
        assert asked == ["/there"]
    assert inbox(tiny_daemon) == before


def form(size: int) -> tuple[bytes, dict[str, str]]:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="cat.png"\r\n\r\n'
    return head + b"x" * size + b"\r\n--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}


def test_uploads_are_limited_while_they_arrive_and_together(
    tiny_daemon: Daemon, logged_in: httpx.Client
) -> None:
    before = len(lying(tiny_daemon))  # of the other page
    content, headers = form(1_500_000)
    pieces = (content[start : start + 50_000] for start in range(0, len(content), 50_000))
    for body in (content, pieces):  # with its length, and without
        answer = logged_in.post("gradio_api/upload", content=body, headers=headers)
        assert (answer.status_code, "upload_limit_mb" in answer.text) == (413, True)
    assert len(lying(tiny_daemon)) == before
    answers = []
    for number in range(4):
        content, headers = form(900_000 + number)  # what is the same lies there once
        answers.append(logged_in.post("gradio_api/upload", content=content, headers=headers))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 507]
    assert all((tiny_daemon.state / "web") in Path(path).parents for path in answers[0].json())
    assert len(lying(tiny_daemon)) == before + 3


def test_without_the_password_nothing_is_shown(guarded: Web) -> None:
    port = urlsplit(guarded.url).port
    for path in ("config", "gradio_api/info", "gradio_api/queue/status"):
        assert status(f"http://127.0.0.1:{port}/{path}") == 401
    assert status(f"http://127.0.0.1:{port}/monitoring/summary") in (401, 403)


def test_wrong_passwords_are_slowed_down_and_logged(guarded: Web, logged_in: httpx.Client) -> None:
    def log_in(password: str) -> int:
        return httpx.post(
            f"{guarded.url}login", data={"username": "framepackd", "password": password}
        ).status_code

    answers = [log_in(f"{number}") for number in range(20)]
    looked_at = answers.count(400)
    assert (answers[:3], answers.count(429)) == ([400] * 3, 20 - looked_at)
    assert looked_at < 10, "they would take minutes"
    assert guarded.log.read_text().count("wrong password from 127.0.0.1") == looked_at
    assert logged_in.get("config").status_code == 200, "who is in stays in"
    deadline = time.monotonic() + 60
    while log_in(PASSWORD) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_person_logs_in_on_a_page_and_sees_nothing_before(guarded: Web) -> None:
    page = {"accept": "text/html"}
    for path in ("", "make", "results"):
        answer = httpx.get(guarded.url + path, headers=page)
        assert (answer.status_code, answer.headers["location"]) == (303, "/page/login")
    for path in ("page/events", "page/waiting?file=x", "page/jobs/20260101-000000-000000/thumbnail"):
        assert httpx.get(guarded.url + path).status_code == 401
    assert httpx.post(f"{guarded.url}page/do/pause", data={"token": "x"}).status_code == 401
    with httpx.Client(base_url=guarded.url, headers=page, timeout=60) as client:
        form = {"username": "framepackd", "password": PASSWORD}
        deadline = time.monotonic() + 90
        while (answer := client.post("login", data=form)).status_code == 429:  # other tests tried wrong ones
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert 'id="head"' in client.get("").text
        wrong = client.post("login", data=form | {"password": "no"})
        assert (wrong.status_code, "That is not the password" in wrong.text) == (400, True)


def test_a_page_that_listens_does_not_keep_the_server_from_ending(tiny_daemon: Daemon) -> None:
    with running(tiny_daemon) as web, httpx.stream("GET", f"{web.url}page/events", timeout=20) as stream:
        assert next(line for line in stream.iter_lines() if line.startswith("event: ")) == "event: head"
        begun = time.monotonic()
        web.process.terminate()
        web.process.wait(20)
        assert time.monotonic() - begun < 4.5, "gradio gives up after five"
