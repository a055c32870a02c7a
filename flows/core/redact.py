"""Masks secrets in text: values of secret environment variables and well-known credential shapes.

For text from outside (log lines, error messages, git diffs, tags). Never for JSON, HTML or CSV
that this package writes: mask the values before serialising them. Names mean nothing here, so a
class or a metric may be called `token` or `cookie`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

MASK = "***"
MIN_LITERAL = 6  # shorter values of secret variables would mask ordinary words
PLACES = ("_FILE", "_PATH", "_DIR")  # ends of names whose value is a place, not a secret

_SECRET_VARIABLE = re.compile(
    r"secret|passw|passphrase|credential|(?:api|access|account|private|signing)_?key|webhook|"
    r"(?:notify|notification|hook|callback)_?url|connection_(?:url|string)|auth_string|"
    r"tokens?$|(?:^|_)(?:auth|dsn|pwd|pass)$",
    re.IGNORECASE,
)
_URI_PASSWORD = re.compile(r"://[^\s/:@]*:(?!\d+[/?#])([^\s@]+)@")


class Shape(NamedTuple):
    """A kind of credential: `pattern` turns `example` into `masked`. Group 1 is kept."""

    name: str
    pattern: str
    example: str
    masked: str


# Quantifiers never overlap, so that the search stays linear in a text of any form.
SHAPES = (
    Shape(
        "password in a URI, which may contain a raw @ or /",
        r"((?<![a-z0-9+.\-])[a-z][a-z0-9+.\-]*://)"
        r"(?:[^\s/?#'\"<>:]*:[^\s/?#'\"<>]*|[^\s/:@'\"<>]*:(?!\d+[/?#])(?:(?!://)[^\s@'\"<>])+)(?=@)",
        "postgresql+psycopg2://mlflow:s3cr3t@db:5432/mlflow",
        "postgresql+psycopg2://***@db:5432/mlflow",
    ),
    Shape(
        "token in a URI",
        r"((?<![a-z0-9+.\-])(?:git\+)?https?://)[^\s/?#'\"<>:@]+(?=@)",
        "unable to access 'https://s3cr3t@github.com/org/repo.git/'",
        "unable to access 'https://***@github.com/org/repo.git/'",
    ),
    Shape(
        "signed URL",
        r"([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|"
        r"sig|signature|access_token|token)=)[^&#\s'\"<>]+",
        "https://bucket.s3.amazonaws.com/key?X-Amz-Signature=0f5cab&X-Amz-Expires=60",
        "https://bucket.s3.amazonaws.com/key?X-Amz-Signature=***&X-Amz-Expires=60",
    ),
    Shape("AWS access key", r"()\bA(?:KIA|SIA)[0-9A-Z]{16}", "id AKIAIOSFODNN7EXAMPLE", "id ***"),
    Shape(
        "GitHub or GitLab token",
        r"()\b(?:gh[pousr]_[a-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,})",
        "push with ghp_abcdefghijklmnopqrstuvwxyz012345",
        "push with ***",
    ),
    Shape(
        "Hugging Face, Prefect, Google, OpenAI, npm, PyPI, Databricks or Slack token",
        r"()\b(?:hf_[a-z0-9]{20,}|pn[ub]_[a-z0-9]{20,}|aiza[\w\-]{30,}|sk-[\w\-]{20,}|"
        r"npm_[a-z0-9]{30,}|pypi-[\w\-]{20,}|dapi[0-9a-f]{32}|xox[abposr]-[\w\-]{10,})",
        "pnu_0123456789abcdefghijklmnopqrstuv is revoked",
        "*** is revoked",
    ),
    Shape(
        "webhook of Slack or Discord",
        r"((?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/)[\w/\-]+",
        "POST https://hooks.slack.com/services/T01/B02/s3cr3t gave 404",
        "POST https://hooks.slack.com/services/*** gave 404",
    ),
    Shape(
        "JSON web token",
        r"()(?<![\w\-])eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*",
        "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "Bearer ***",
    ),
    Shape(
        "private key",
        r"()-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        "-----BEGIN RSA PRIVATE KEY-----\ns3cr3t\n-----END RSA PRIVATE KEY-----\nend",
        "***\nend",
    ),
)
_PATTERNS = [re.compile(shape.pattern, re.IGNORECASE) for shape in SHAPES]


def redact(text: str) -> str:
    """`text` without secrets. Masking twice changes nothing."""
    literals = _literals(tuple(os.environ.items()))
    if literals is not None:
        text = literals.sub(MASK, text)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{MASK}", text)
    return text


@lru_cache(maxsize=1)
def _literals(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """Values of secret variables and passwords in URIs, the longest first; None without any."""
    found: set[str] = set()
    for name, value in environment:
        found.update(_URI_PASSWORD.findall(value))
        if _SECRET_VARIABLE.search(name) and not _is_place(name):
            found.add(value)
    values = sorted((v for v in found if len(v) >= MIN_LITERAL), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, values))) if values else None


def _is_place(name: str) -> bool:
    return name in {"PWD", "OLDPWD"} or name.endswith(PLACES)


def redact_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` whose texts are masked, at every depth."""
    return {key: _redact_value(value) for key, value in values.items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_mapping(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_redact_value, value))
    return redact(value) if isinstance(value, str) else value
