"""Secrets never leave this process: masking in text, in mappings and in log records."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
MIN_LITERAL = 6  # shorter values of secret variables would mask ordinary words

_SECRET_NAME = re.compile(
    r"(?:secret|passw(?:or)?d|passwd|passphrase|pwd|credential|"
    r"(?:api|access|account|private|signing)[_\-]?key|bearer|authorization|cookie|auth[_\-]string|"
    r"webhook|(?:notify|notification|hook|callback)_?url|"
    r"connection_(?:url|string)|(?:^|[^a-z])(?:token|tokens|auth|dsn)$|"
    r"(?:auth|access|refresh|api|session|security|id|bot|git|github|gitlab|hf|wandb)_?token)",
    re.IGNORECASE,
)
_NOT_SECRET = re.compile(
    r"(?:cls|reg|class|mask|num|max|min|pad|eos|bos)[_\-]tokens?$", re.IGNORECASE
)

_FOLDERS = {"PWD", "OLDPWD"}  # the shell's folders, not passwords

_TOKEN = re.compile(r"\S+")
_URI_USERINFO = re.compile(
    r"(?P<scheme>(?<![a-z0-9+.\-])[a-z0-9+.\-]+://)"
    r"(?P<user>[^\s/?#'\"<>]+|[^\s/:@]*:(?!\d+/)[^\s@'\"<>]{1,4096})@",  # or a raw / in it
    re.IGNORECASE,
)
_URI_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s@]+)@")
_QUERY = re.compile(
    r"(?P<key>[?&;](?:(?=[\w.\-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key(?:id)?|"
    r"signature|credential))[\w.\-]++|sig|key|auth|pwd|code)=)[^&#\s'\"<>]+",
    re.IGNORECASE,
)
# A name is taken from where its word begins, or a long word would be read once per letter.
_KEY = re.compile(r"(?P<quote>\\?[\"']|(?<![\w.\-]))(?P<name>[\w.\-]+)(?P=quote)\s*(?:=>|[:=])\s*")
_VALUE = re.compile(
    r"\\\"[^\"\\\n]*\\\"|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|(?:[^\s,;'\"{}\[\]()&\\]|\\(?![\"']))+",
)
_NO_VALUE = {"", "none", "null", "true", "false", MASK}
_SCHEME = re.compile(r"(?i)\b(?P<key>(?:bearer|basic)\s+)[A-Za-z0-9+/=_.~\-]{8,}")
# a header with its scheme, whatever that is called; quoted values are those of _VALUE
_HEADER = re.compile(
    r"(?P<key>(?:authorization|cookie)(?:\\?[\"'])?[ \t]*(?:=>|[:=])[ \t]*(?:\r?\n[ \t]+)?)"
    r"(?!(?:none|null|true|false)\b)"
    r"(?:(?:digest|oauth|hawk|mac|signature|aws4-[\w\-]+)\s+"
    r"(?:[\w\-]+=(?:\"[^\"\n]*\"|[^\s,\"'\\]+)(?:,?[ \t]*(?=[\w\-]+=)|))+"
    r"|[^\s,\"'\\{}\[\]()][^,\"'\\{}\[\]()\r\n]*)",
    re.IGNORECASE,
)
_HEADER_PAIR = re.compile(  # ('Authorization', 'Token abc')
    r"(?P<key>[\"'](?:proxy-)?authorization[\"']\s*,\s*b?(?P<quote>[\"']))[^\s\"']+\s[^\"'\n]*(?P=quote)",
    re.IGNORECASE,
)
_OPTION = re.compile(  # --name value, --name=value, "--name", "value"
    r"(?P<key>(?<![\w\-])--?(?P<name>[A-Za-z][\w\-]*)(?:=|\s+|(?P<quote>\\?[\"'])\s*,\s*(?=\\?[\"'])))"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|\\\"[^\"\\\n]*\\\"|(?!--[a-z])(?:[^\s\"'\\]|[\"'](?=\w)|\\(?![\"']))+)",
    re.IGNORECASE,
)
_OPTION_NAME = re.compile(r"token(?!iz)|secret", re.IGNORECASE)
_USER_OPTION = re.compile(
    r"(?P<key>\bcurl\s[^\n]{0,80}?(?:-u|--user)[ =][\"']?[^\s:\"']+:)[^\s\"']+"
)
_SHAPES = re.compile(
    r"\b(?:A(?:KIA|SIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
    r"glpat-[\w\-]{16,}|xox[abposr]-[\w\-]{10,}|sk-[A-Za-z0-9_\-]{20,}|hf_[A-Za-z0-9]{20,}|"
    r"AIza[\w\-]{30,}|pnu_[A-Za-z0-9]{20,}|pnb_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|"
    r"(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/[\w/\-]+|"
    r"pypi-[\w\-]{20,}|dapi[0-9a-f]{32})"
)
_JWT = re.compile(r"(?<![\w\-])(?>[\w\-]*?eyJ)[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*")
_PEM = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)


def is_secret_name(name: str) -> bool:
    """Whether a variable, option or column of this name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.search(name)


def _userinfo(match: re.Match[str]) -> str:
    """`user:password@` and `token@` lose everything secret; an SSH user name stays."""
    scheme, user = match["scheme"], match["user"]
    if scheme.lower() in {"ssh://", "git+ssh://", "sftp://"} and ":" not in user:
        return match.group()
    return f"{scheme}{MASK}@"


def _token(match: re.Match[str]) -> str:
    """A word with its URIs' credentials masked; behind its last @ there are none."""
    head, at, tail = match[0].rpartition("@")
    return f"{_URI_USERINFO.sub(_userinfo, head + at)}{tail}" if "://" in head else match[0]


def _option(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    secret = is_secret_name(name) or (_OPTION_NAME.search(name) and not _NOT_SECRET.search(name))
    if not secret:
        return match.group()
    quote = value[: len(value) - len(value.lstrip("\\\"'"))]
    return f"{match['key']}{quote}{MASK}{quote}"


def _mask_assignments(text: str) -> str:
    """Mask the values of secret names: `name=value`, `name: value`, `"name": "value"`.

    The search goes on at the value of any other name: a sentence may hold another assignment.
    """
    parts, done, at = list[str](), 0, 0
    while key := _KEY.search(text, at):
        at = key.end()
        name = key["name"].lstrip("0123456789.-")  # "2024token" is a token, too
        value = _VALUE.match(text, at) if is_secret_name(name) else None
        if value is None:
            continue
        at = value.end()
        bare = value[0].strip("\\\"'")
        if bare.lower() in _NO_VALUE or value[0].startswith(f"{MASK}\\"):
            continue  # nothing to hide, or a masked header with an escaped line end
        quote = value[0][: len(value[0]) - len(value[0].lstrip("\\\"'"))] or key["quote"]
        parts += [text[done : value.start()], f"{quote}{MASK}{quote}"]  # JSON stays so
        done = at
    return "".join([*parts, text[done:]])


def _literals() -> list[str]:
    """Values of secret environment variables and passwords inside URI variables, longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        found.update(_URI_PASSWORD.findall(value))
        if is_secret_name(name) and name not in _FOLDERS:
            found.add(value)
    return sorted((value for value in found if len(value) >= MIN_LITERAL), key=len, reverse=True)


def redact(text: str) -> str:
    """Mask every secret in `text`: URI credentials, signed queries, named values, token shapes.

    The values of the process's own secret environment variables are masked wherever they stand.
    Masking twice changes nothing.
    """
    for literal in _literals():
        text = text.replace(literal, MASK)
    text = _PEM.sub(MASK, text)
    text = _TOKEN.sub(_token, text)
    text = _QUERY.sub(rf"\g<key>{MASK}", text)
    text = _HEADER.sub(rf"\g<key>{MASK}", text)
    text = _HEADER_PAIR.sub(rf"\g<key>{MASK}\g<quote>", text)
    text = _SCHEME.sub(rf"\g<key>{MASK}", text)
    text = _OPTION.sub(_option, text)
    text = _USER_OPTION.sub(rf"\g<key>{MASK}", text)
    text = _mask_assignments(text)
    return _JWT.sub(MASK, _SHAPES.sub(MASK, text))


def redact_value(name: str, value: Any) -> Any:
    """`value` of a key called `name`, masked when name or text is secret; containers too."""
    if isinstance(value, Mapping):
        return redact_mapping(value)
    if isinstance(value, (list, tuple)):
        return type(value)(redact_value(name, item) for item in value)
    if isinstance(value, str):
        return MASK if value and is_secret_name(name) else redact(value)
    return value


def redact_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` without secrets, at every depth."""
    return {key: redact_value(str(key), value) for key, value in values.items()}


class RedactingFilter(logging.Filter):
    """Masks secrets in log records; add it to handlers, so that records of every logger pass it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = redact(record.getMessage())
        record.args = None
        if record.exc_info:
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text, record.exc_info = redact(text), None
        return True
