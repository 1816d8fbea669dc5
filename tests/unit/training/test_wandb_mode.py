"""W&B's key, network and mode are settled before a run starts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_dllm.config import LoggingConfig
from megatron_dllm.training.wandb_mode import WandBMode, decide_wandb

KEY = "a" * 40
ONLINE, OFFLINE, DISABLED = (LoggingConfig(wandb_mode=mode) for mode in ("online", "offline", "disabled"))
NOWHERE = "http://127.0.0.1:9"


class Server(BaseHTTPRequestHandler):
    """Knows one key; asked for /broken, it knows nothing at all."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        is_known = self.headers["Authorization"] == "Basic YXBpOmFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE="
        self.send_response(500 if "broken" in self.path else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"viewer": {"id": "1"} if is_known else None}}).encode())

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_the_key_is_known_to_the_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert decide_wandb(ONLINE) == WandBMode("online")
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    with pytest.raises(ValueError, match=r"key is not known to http://127.*wandb login"):
        decide_wandb(ONLINE)
    monkeypatch.setenv("WANDB_BASE_URL", f"{server}/broken")
    assert decide_wandb(ONLINE).mode == "offline"


def test_the_key_of_the_netrc_file(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server)
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert decide_wandb(ONLINE) == WandBMode("online")
    (tmp_path / ".netrc").write_text("machine")
    with pytest.raises(ValueError, match="needs a key"):
        decide_wandb(ONLINE)


def test_no_network_means_offline_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    found = decide_wandb(ONLINE)
    assert found.mode == "offline"
    assert found.warning is not None and f"{NOWHERE} cannot be reached" in found.warning
    assert KEY not in found.warning


@pytest.mark.parametrize("key", ["", "short", "a" * 20 + " " + "a" * 20, "é" * 40])
def test_a_missing_or_impossible_key_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ValueError, match=r"W&B key of WANDB_API_KEY|needs a key for") as refusal:
        decide_wandb(ONLINE)
    assert not key or key not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "said", "mode"),
    [
        (ONLINE, "offline", "offline"),
        (ONLINE, "dryrun", "offline"),
        (ONLINE, "disabled", "disabled"),
        (OFFLINE, "online", "offline"),
        (OFFLINE, "", "offline"),
        (OFFLINE, "DISABLED", "disabled"),
        (DISABLED, "online", "disabled"),
        (DISABLED, "nonsense", "disabled"),
    ],
)
def test_the_environment_may_ask_for_less(
    config: LoggingConfig, said: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", said)
    found = decide_wandb(config)
    assert found.mode == mode
    assert (found.warning is not None) == (mode != config.wandb_mode)


def test_a_mode_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(ValueError, match=r"WANDB_MODE \(on\) must be one of online"):
        decide_wandb(OFFLINE)
