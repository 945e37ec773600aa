"""Pushing to the hub: a server of our own stands in for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from autopeft.errors import SettingsError
from autopeft.utils.hub import check_repo, push_folder


class _Hub(HTTPServer):
    """Makes repositories, unless they are someone else's; `asked` holds the names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        repo = f"{body.get('organization')}/{body['name']}"
        self.server.asked.append(repo)
        status = 403 if repo.startswith("other/") else 200
        answer = (
            {"url": f"{self.server.address}/{repo}"} if status == 200 else {"error": "not yours"}
        )
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    server = _Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "us er/name", "user/name?"])
def test_what_is_no_repository_is_one_line(repo: str) -> None:
    with pytest.raises(SettingsError, match="use user/name"):
        check_repo(repo)
    check_repo("user/name")


def test_the_folder_goes_into_the_repository(
    hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: sent.update(given))
    assert push_folder(tmp_path, "user/name") == f"{hub.address}/user/name"
    assert hub.asked == ["user/name"]
    assert (sent["repo_id"], sent["folder_path"]) == ("user/name", tmp_path)


def test_a_hub_that_refuses_is_one_line(hub: _Hub, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"refuses or cannot.*hf auth login") as caught:
        push_folder(tmp_path, "other/name")
    assert "403" in str(caught.value)
    assert "\n" not in str(caught.value)
