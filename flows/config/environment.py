"""Settings of the machine, from environment variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from flows.core.redact import redact
from rfdetr.errors import ConfigError

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
FIT_RETRY = "RFDETR_FIT_RETRY"  # set by `fit --retry`: DVC runs a stage's command as written


class Environment(BaseModel, frozen=True):
    """Settings of the machine rather than of the project. Keys and passwords are not read here."""

    state_dir: Path
    state_url: str | None = None
    dvc_cache: Path | None = None
    dvc_remote: str | None = None
    s3_endpoint: str | None = None
    tracking_uri: str | None = None
    git_url: str | None = None
    git_branch: str | None = None
    work_pool: str | None = None
    recent_images: str | None = None
    actor: str | None = None
    notify_block: str | None = None
    notify_url: str | None = Field(None, repr=False)  # a webhook address can be a secret
    fit_retry: bool = False

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> Environment:
        """Read the settings from `env`; an empty or blank value counts as not set.

        Raises ConfigError if the address of the tracking server cannot be one.
        """
        names = {
            "state_url": "RFDETR_STATE_URL",
            "dvc_cache": "RFDETR_DVC_CACHE",
            "dvc_remote": "RFDETR_DVC_REMOTE",
            "s3_endpoint": "AWS_ENDPOINT_URL",
            "tracking_uri": "MLFLOW_TRACKING_URI",
            "git_url": "RFDETR_GIT_URL",
            "git_branch": "RFDETR_GIT_BRANCH",
            "work_pool": "RFDETR_WORK_POOL",
            "recent_images": "RFDETR_RECENT_IMAGES",
            "actor": "RFDETR_ACTOR",
            "notify_block": "RFDETR_NOTIFY_BLOCK",
            "notify_url": "RFDETR_NOTIFY_URL",
            "fit_retry": FIT_RETRY,
        }
        given: dict[str, Any] = {f: env[n] for f, n in names.items() if env.get(n, "").strip()}
        if "tracking_uri" in given:
            _require_store(given["tracking_uri"])
        given["fit_retry"] = "fit_retry" in given
        state = env.get("RFDETR_STATE_DIR")
        if not state:
            state = str(Path(env.get("XDG_CACHE_HOME") or _home() / ".cache") / "rfdetr-pipeline")
        return cls.model_validate({"state_dir": Path(state).expanduser().absolute(), **given})


def _require_store(address: str) -> None:
    """Raise ConfigError if MLFLOW_TRACKING_URI names neither a server nor a database."""
    try:
        parts = urlsplit(address)
        server = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or an IPv6 address that cannot exist
        parts, server = urlsplit(""), False
    if parts.scheme in {"http", "https"} and server:
        return
    if address.startswith("databricks") or parts.scheme not in {"", "http", "https", "file"}:
        return
    raise ConfigError(
        f"MLFLOW_TRACKING_URI is {redact(address)!r}, which is not the address of a tracking "
        "server (http://host:5000) or of a database (sqlite:///file). Correct it, or unset it to "
        "use mlflow.db in the project."
    )


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder for the state of trainings. Set RFDETR_STATE_DIR to a "
            "folder that lasts."
        ) from None


def may_name_prefect_server(env: Mapping[str, str] = os.environ) -> bool:
    """Whether Prefect's settings may name a server: asked first, because Prefect's import is slow.

    They are in variables, the profiles of the user, and files of the current folder.
    """
    if any(env.get(f"PREFECT_{name}") for name in ("API_URL", "PROFILE", "PROFILES_PATH")):
        return True
    home = env.get("PREFECT_HOME") or Path(env.get("HOME", ""), ".prefect")
    files = {
        Path(home, "profiles.toml"): "PREFECT_API_URL",
        Path(".env"): "PREFECT_",
        Path("prefect.toml"): "",
        Path("pyproject.toml"): "tool.prefect",
    }
    return any(_mentions(file, word) for file, word in files.items())


def _mentions(file: Path, word: str) -> bool:
    with contextlib.suppress(OSError):
        return word in file.read_text(encoding="utf-8", errors="replace")
    return False


def bypass_proxies() -> None:
    """Let local servers be reached directly although a proxy is configured for this process."""
    if not any(os.environ.get(name) for name in PROXIES):
        return
    for name in ("no_proxy", "NO_PROXY"):
        known = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        if "*" not in known:
            os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost", "::1"]))
