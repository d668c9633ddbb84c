"""The archive is downloaded once, checked, and resumed after a break."""

import concurrent.futures
import hashlib
import http.server
import threading
import time

import pytest
from helpers import holds, pack, write_python

import cifar100.download
import data
from utils import UserError


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, by range where asked for; breaks off `breaks` times after half of it.

    Between the halves it waits until `go` is set. Before all that, it answers with `errors`.
    """

    def __init__(self, content: bytes, breaks: int = 0, errors: tuple = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks, self.errors = content, breaks, list(errors)
        self.ranges, self.go = [], threading.Event()
        self.go.set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-100-python.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if self.server.errors:
            return self.send_error(self.server.errors.pop(0))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(self.server.content):
            return self.send_error(416)
        rest = self.server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        half = len(rest) // 2
        self.wfile.write(rest[:half])
        self.server.go.wait(60)
        if not self.server.breaks:
            self.wfile.write(rest[half:])
        self.server.breaks = max(0, self.server.breaks - 1)

    def log_message(self, *_):
        pass


def test_a_directory_that_did_not_exist_is_told_before_a_byte_is_fetched(
        tmp_path, caplog, monkeypatch):
    """The path may be mistyped."""
    monkeypatch.setattr(cifar100.download, "RETRY_SECONDS", 0)
    caplog.set_level("INFO")
    with pytest.raises(UserError):
        data.load("cifar100", tmp_path / "typo", "file:///nowhere/cifar-100-python.tar.gz")
    assert f"to {tmp_path / 'typo'}, which did not exist" in caplog.messages[0]


@pytest.fixture
def archive(tmp_path, arrays, monkeypatch):
    """The content of an archive that the code takes for the official one."""
    written = pack(write_python(tmp_path / "src" / "cifar-100-python", arrays), tmp_path / "a.tgz")
    content = written.read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(cifar100.download, "OFFICIAL_MD5", md5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return content


def test_a_download_is_checked_and_read(tmp_path, archive, arrays):
    server = Server(archive)
    assert holds(data.load("cifar100", tmp_path / "new" / "data", server.url), arrays)
    names = sorted(path.name for path in (tmp_path / "new" / "data").iterdir())
    assert names == [".cifar-100.lock", "cifar-100-python.tar.gz"]
    data.load("cifar100", tmp_path / "new" / "data", server.url)
    assert server.ranges == [None], "the second time nothing is asked for"


@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "cifar-100-python.tar.gz"])
def test_what_lies_there_is_named_before_a_download_and_stays(
        tmp_path, archive, arrays, caplog, name):
    """Also where its name is that of the archive."""
    other = tmp_path / "data" / name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"<html>")
    server = Server(archive)
    with caplog.at_level("INFO", "cifar100"):
        assert holds(data.load("cifar100", tmp_path / "data", server.url), arrays)
    told = "holds CIFAR-10, not CIFAR-100" if "batch" in name else "but an HTML page"
    assert caplog.messages[0].startswith(f"note       {tmp_path}/data/{name.split('/')[0]}: ")
    assert told in caplog.messages[0] and caplog.messages[1].startswith("download   http")
    assert other.read_bytes() == b"<html>"
    assert holds(data.load("cifar100", tmp_path / "data", server.url), arrays)
    assert server.ranges == [None], "the second time nothing is asked for"


def test_a_broken_download_is_resumed(tmp_path, archive, arrays, monkeypatch):
    monkeypatch.setattr(cifar100.download, "RETRY_SECONDS", 0)
    server = Server(archive, breaks=2)
    assert holds(data.load("cifar100", tmp_path / "data", server.url), arrays)
    half = len(archive) // 2
    quarter = (len(archive) - half) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(tmp_path, archive, arrays,
                                                             monkeypatch):
    monkeypatch.setattr(cifar100.download, "RETRY_SECONDS", 0)
    server = Server(archive, errors=(503, 429))
    assert holds(data.load("cifar100", tmp_path / "data", server.url), arrays)
    server = Server(archive, errors=(404,))
    with pytest.raises(UserError, match=r"404.*Three ways out"):
        data.load("cifar100", tmp_path / "other", server.url)
    assert server.ranges == [None]


def test_a_download_killed_at_its_end_is_resumed(tmp_path, archive, arrays):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".cifar-100.tar.gz.part").write_bytes(archive)
    assert holds(data.load("cifar100", tmp_path / "data", Server(archive).url), arrays)


def test_the_rest_of_another_file_is_not_in_the_way(tmp_path, archive, arrays):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".cifar-100.tar.gz.part").write_bytes(b"of another mirror")
    assert holds(data.load("cifar100", tmp_path / "data", Server(archive).url), arrays)


def test_a_wrong_archive_is_not_kept(tmp_path, archive):
    server = Server(archive + b"x")
    with pytest.raises(UserError, match=r"not official.*Three ways out.*--data-url.*synthetic"):
        data.load("cifar100", tmp_path / "data", server.url)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cifar-100.lock"]


@pytest.mark.parametrize("download, url", [
    (True, "http://127.0.0.1:9/none"), (True, "nonsense"), (True, "http://127.0.0.1:x/none"),
    (True, "http://127.0.0.1/a b"), (False, None),
])
def test_no_data_names_three_ways_out(tmp_path, monkeypatch, download, url):
    monkeypatch.setattr(cifar100.download, "RETRY_SECONDS", 0)
    with pytest.raises(UserError, match=r"put .*--data-url.*--dataset synthetic"):
        data.load("cifar100", tmp_path / "data", url, download)


def wait_until(condition) -> None:
    """Return once the condition holds, which must be within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_two_that_need_the_archive_one_downloads_and_the_other_waits(
    tmp_path, archive, arrays, caplog
):
    """Here they are threads; the lock between them is the same as between processes."""
    server = Server(archive)
    server.go.clear()
    with caplog.at_level("INFO", "cifar100"), concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(data.load, "cifar100", tmp_path / "data", server.url)
        wait_until(lambda: server.ranges)
        second = pool.submit(data.load, "cifar100", tmp_path / "data", server.url)
        wait_until(lambda: "waiting for another process" in caplog.text)
        server.go.set()
        assert holds(first.result(60), arrays) and holds(second.result(60), arrays)
    assert server.ranges == [None]
