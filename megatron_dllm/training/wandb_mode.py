"""Whether W&B is used and how, found out before anything starts: the key, the network, WANDB_MODE."""

from __future__ import annotations

import base64
import importlib.util
import json
import netrc
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlparse

from megatron_dllm.config import LoggingConfig

_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_SERVER = "https://api.wandb.ai"
_TIMEOUT_S = 10.0
# From the least to the most that leaves the machine.
_ORDER = ("disabled", "offline", "online")
_REMEDY = "run `wandb login`, set WANDB_API_KEY, or choose logging.wandb_mode=offline"


@dataclass(frozen=True)
class WandBMode:
    """How a start uses W&B: disabled, offline or online; and what is to be said about it."""

    mode: str
    warning: str | None = None


def decide_wandb(logging: LoggingConfig) -> WandBMode:
    """Decide how W&B is used.

    WANDB_MODE can ask for less than the configuration (offline, disabled), not for more.

    Raises:
        ValueError: W&B is not installed, WANDB_MODE says what it does not know, or online without a valid key.
    """
    wanted = logging.wandb_mode
    if wanted == "disabled":
        return WandBMode(wanted)
    said = os.environ.get("WANDB_MODE", "").strip().lower()
    if said and said not in _MODES:
        raise ValueError(f"WANDB_MODE ({said}) must be one of {', '.join(_MODES)}; correct or unset it.")
    mode = min(wanted, _MODES.get(said, wanted), key=_ORDER.index)
    warning = None if mode == wanted else f"WANDB_MODE ({said}) makes W&B {mode}; logging.wandb_mode is {wanted}"
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"logging.wandb_mode ({wanted}) needs wandb, which is not installed; pip install wandb.")
    if mode != "online":
        return WandBMode(mode, warning)
    server = os.environ.get("WANDB_BASE_URL", "").strip() or _SERVER
    return _checked(server, _key(server))


def _key(server: str) -> str:
    """The key that W&B would use: of the environment, else of ~/.netrc."""
    key = os.environ.get("WANDB_API_KEY", "").strip()
    place = "WANDB_API_KEY"
    if not key:
        place = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
        try:
            found = netrc.netrc(place).authenticators(urlparse(server).hostname or server)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            found = None
        key = found[2] if found else ""
    if not key:
        raise ValueError(f"logging.wandb_mode (online) needs a key for {server}; {_REMEDY}.")
    if len(key) < 40 or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the W&B key of {place} ({len(key)} characters) must have 40 or more letters; {_REMEDY}.")
    return key


def _checked(server: str, key: str) -> WandBMode:
    """Ask the server whose key it is."""
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"{server.rstrip('/')}/graphql", question, headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            viewer = (json.load(answer).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return _offline(server, error)
        viewer = None
    except (OSError, ValueError, AttributeError) as error:
        return _offline(server, error)
    if viewer is None:
        raise ValueError(f"the W&B key is not known to {server}; {_REMEDY}.")
    return WandBMode("online")


def _offline(server: str, error: Exception) -> WandBMode:
    return WandBMode(
        "offline",
        f"{server} cannot be reached ({error}): W&B writes offline into the run folder; `wandb sync` sends it later",
    )
