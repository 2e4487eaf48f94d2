"""Files that are written and fetched: nothing is lost, and an incomplete file is never treated as complete."""

import http.server
import threading

import pytest

from support.command import InputError
from support.files import download, refuse_existing, refuse_output_folder, write_file

CONTENT = bytes(range(256)) * 400


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT: /whole, /cut after a half of it, and /unknown without saying its length."""

    def do_GET(self):
        if self.path not in ("/whole", "/cut", "/unknown"):
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/unknown":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_is_whole_or_not_there(url, tmp_path):
    for name in ("whole", "unknown"):
        download(f"{url}/{name}", tmp_path / "new" / name)
        assert (tmp_path / "new" / name).read_bytes() == CONTENT
    path = tmp_path / "new/file"
    for name, what in (("cut", "got only 51200 out of 102400 bytes"), ("missing", "404")):
        with pytest.raises(
            InputError, match=f"^{url}/{name}: cannot be fetched .*{what}.*; if you have the file, put it here: {path}"
        ):
            download(f"{url}/{name}", path)
    assert sorted(path.name for path in path.parent.iterdir()) == ["unknown", "whole"]


def test_what_was_there_stays_if_writing_fails(tmp_path):
    def fail(file):
        file.write(b"the beginning")
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    with pytest.raises(InputError, match=r"file: cannot be written to \(.*No space left on device\)$"):
        write_file(path, fail)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"before")
    with pytest.raises(InputError, match="No space left.*; the file that was there is whole"):
        write_file(path, fail)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"
    write_file(path, lambda file: file.write(b"after"))
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"after"


def test_what_is_there_is_replaced_only_with_overwrite(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    refuse_existing([new], False)
    refuse_existing([new, old], True)
    with pytest.raises(InputError, match=f"^{old}: already exists; --overwrite replaces it"):
        refuse_existing([new, old], False)
    with pytest.raises(InputError, match=f"^{tmp_path}: is a folder"):
        refuse_existing([tmp_path], True)


def test_an_output_folder_is_not_that_of_the_inputs(tmp_path):
    image = tmp_path / "data/images/a.png"
    image.parent.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder in ("data/images/maps", "data/ima", "out", "data/images2"):
        refuse_output_folder(tmp_path / folder, [image])
    for folder in ("data/images", "data", "data/new/../images", "link", "link/images"):
        with pytest.raises(InputError, match=f"^{tmp_path / folder}: is, or holds, {image.parent}, where"):
            refuse_output_folder(tmp_path / folder, [image])
