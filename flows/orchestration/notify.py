"""Tells people that a run failed or that the champion changed: Prefect blocks and webhooks.

`RFDETR_NOTIFY_BLOCK` names a Prefect notification block (`slack-webhook/team`), and
`RFDETR_NOTIFY_URL` an address that gets a JSON POST. Both may be set; a message that cannot be
delivered is logged and never fails a run.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Mapping
from typing import Any

from flows.config.environment import Environment
from flows.core.redact import redact
from rfdetr.errors import ConfigError

LOGGER = logging.getLogger(__name__)
SECONDS = 10.0


def notify(
    env: Environment, subject: str, body: str, facts: Mapping[str, Any] | None = None
) -> list[str]:
    """Send one message everywhere it should go; the names of the channels that took it."""
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
        except Exception as error:  # noqa: BLE001 - a notification must never fail the run
            LOGGER.warning("notification by %s failed: %s", name, redact(str(error)))
        else:
            sent.append(name)
    return sent


def _send_to_block(name: str, subject: str, body: str, _facts: Mapping[str, Any]) -> None:
    from prefect.blocks.core import Block

    Block.load(name).notify(body=body, subject=subject)  # type: ignore[union-attr]


def _post(address: str, subject: str, body: str, facts: Mapping[str, Any]) -> None:
    if not address.startswith(("https://", "http://")):
        raise ConfigError("RFDETR_NOTIFY_URL must start with https:// or http://")
    text = json.dumps({"subject": subject, "text": body, **facts}, default=str)
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        address, data=text.encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS):  # noqa: S310
        pass
