"""Notifications about failed flow runs and champion changes: Prefect blocks and webhooks.

`RFDETR_NOTIFY_BLOCK` is the name of a Prefect notification block (`slack-webhook/team`), and
`RFDETR_NOTIFY_URL` a URL that receives a JSON POST. Both may be set. A message that cannot be
delivered is logged and never fails a flow run.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Mapping
from typing import Any

from flows.config.environment import Environment
from flows.core.redact import redact, redact_mapping
from rfdetr.errors import ConfigError

LOGGER = logging.getLogger(__name__)
TIMEOUT_S = 10.0


def notify(
    env: Environment, subject: str, body: str, facts: Mapping[str, Any] | None = None
) -> list[str]:
    """Send a message to every configured channel; returns the channels that accepted it."""
    channels = {
        "block": (env.notify_block, _send_to_block),
        "webhook": (env.notify_url, _post),
    }
    sent = []
    for name, (address, send) in channels.items():
        if not address:
            continue
        try:
            send(address, redact(subject), redact(body), facts or {})
        except Exception as error:  # noqa: BLE001 - a notification must never fail a flow run
            LOGGER.warning("notification by %s failed: %s", name, redact(str(error)))
        else:
            sent.append(name)
    return sent


def notify_about(event: str) -> Any:
    """A state hook for flows that sends a notification: the flow run `event`."""

    def hook(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001 - passed by name
        facts = {"run": flow_run.name, "run_id": str(flow_run.id), "state": state.name}
        text = state.message or "no message"
        notify(Environment.read(), f"{flow_run.name} {event}", text, facts)

    return hook


def _send_to_block(name: str, subject: str, body: str, _facts: Mapping[str, Any]) -> None:
    from prefect.blocks.core import Block

    Block.load(name).notify(body=body, subject=subject)  # type: ignore[union-attr]


def _post(address: str, subject: str, body: str, facts: Mapping[str, Any]) -> None:
    if not address.startswith(("https://", "http://")):
        raise ConfigError("RFDETR_NOTIFY_URL must start with https:// or http://")
    message = {**redact_mapping(facts), "subject": subject, "text": body}
    text = json.dumps(message, default=str)
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        address, data=text.encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
        pass
