"""Hub addresses, against a stand-in of the Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import randsurgery as rs
from randsurgery.jobs.hub import parse_address

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """Serves ``ORG/REPO/resolve/REVISION/FILE`` from a folder, as the Hub does."""

    root: Path

    def _answer(self, body: bool) -> None:
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        path = self.root / repo / rest.partition("/")[2]
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """(folder of repositories, environment that points huggingface_hub at it)."""
    root = tmp_path / "hub"
    root.mkdir()
    handler = type("Hub", (_Hub,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    yield root, environment
    server.shutdown()
    server.server_close()
    thread.join()


def _run(folder: Path, environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "randsurgery", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_an_address_is_a_repository_and_perhaps_a_revision() -> None:
    assert parse_address("hf-hub:org/repo").repo == "org/repo"
    assert parse_address("hf-hub:org/repo@v1").revision == "v1"
    for wrong in ("hf-hub:repo", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a/b@"):
        with pytest.raises(rs.UsageError, match="ORG/REPO"):
            parse_address(wrong)


def test_a_file_of_ours_is_evaluated_and_exported_from_the_hub(
    hub: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, environment = hub
    (root / "org" / "slim").mkdir(parents=True)
    recipe = rs.make_recipe("conv2", seed=3, args={"num_classes": 10, "width": 0.1})
    rs.save(root / "org" / "slim" / "model.safetensors", recipe)
    found = _run(tmp_path, environment, "eval", "hf-hub:org/slim@main", "--json")
    assert found.returncode == 0, found.stderr
    assert 0 <= json.loads(found.stdout)["accuracy"] <= 1
    made = _run(tmp_path, environment, "export", "hf-hub:org/slim", "-o", "dense.safetensors")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "dense.safetensors").is_file()


def test_dense_timm_weights_from_the_hub_become_a_base_kept_beside_the_result(
    hub: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, environment = hub
    repo = root / "org" / "dense"
    repo.mkdir(parents=True)
    model = rs.build(rs.make_recipe("conv2", seed=3, args={"num_classes": 10, "width": 0.1}))
    save_file(model.state_dict(), repo / "model.safetensors")
    (repo / "config.json").write_text(json.dumps({"architecture": "conv2"}))
    made = _run(
        tmp_path, environment, "popup", "hf-hub:org/dense@v2", "--k", "0.9", "--width", "0.1",
        "--epochs", "1", "-o", "masked.safetensors", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    base = rs.read_recipe(tmp_path / "masked.safetensors").bases["base"]
    assert (base.origin, base.revision) == ("hf-hub:org/dense", "v2")
    assert base.file is not None
    assert (tmp_path / base.file).is_file()
    weight = rs.load(tmp_path / "masked.safetensors").state_dict()["fc1.weight"]
    kept = weight != 0
    assert kept.any()
    assert (weight[kept] == model.state_dict()["fc1.weight"][kept]).all()


def test_a_repository_that_is_not_there_is_an_error_of_one_line(
    hub: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    _, environment = hub
    found = _run(tmp_path, environment, "eval", "hf-hub:org/nothing")
    assert found.returncode == 3
    assert found.stderr.startswith("error: hf-hub:org/nothing")
    assert found.stderr.count("\n") == 1
