from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.core.redact import MASK, RedactingFilter, is_secret_name, redact, redact_mapping

SECRET = "Zq8vX2mN4pL7rT1w"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql+psycopg2://mlflow:{SECRET}@db:5432/mlflow",
        f"postgresql://mlflow:{SECRET}/x@db/mlflow",
        f"redis://:{SECRET}@cache:6379/0",
        f"fatal: unable to access 'https://{SECRET}@github.com/org/repo.git/'",
        f"https://bucket.s3.amazonaws.com/k?X-Amz-Signature={SECRET}&X-Amz-Expires=60",
        f"https://host/x?a=1&access_token={SECRET}#part",
        f"https://store.blob.core.windows.net/c/b?sv=2022&sig={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"aws_access_key_id: {SECRET}",
        f'{{"password": "{SECRET}", "user": "me"}}',
        f"{{'api_key': '{SECRET}'}}",
        json.dumps(json.dumps({"token": SECRET})),
        f"+export MLFLOW_TRACKING_TOKEN='{SECRET}'",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}==",
        f"mlflow server --admin-password {SECRET} --port 1",
        f"secret_key = {SECRET}",
        f"mlflow server --admin-password '{SECRET} and more' --port 1",
        f"Authorization: Token {SECRET}",
        f"proxy-authorization: ApiKey {SECRET}\nAccept: */*",
        f'"Authorization": Token {SECRET}',
        f"headers:\n  Authorization:\n    Token {SECRET}\n  Accept: text",
        f"[('Accept', 'text'), ('Authorization', 'Token {SECRET}')]",
        f'Authorization: Digest username="me", uri="/x", response="{SECRET}"',
        f"Authorization: AWS4-HMAC-SHA256 Credential=x/y, SignedHeaders=host, Signature={SECRET}",
        f"send: b'GET / HTTP/1.1\\r\\nAuthorization: Token {SECRET}\\r\\nAccept: */*'",
        f"Cookie: session=1234; csrf={SECRET}",
        f"x-api-key: {SECRET}",
        f"http --auth user:{SECRET} GET https://host",
        f"curl -u me:{SECRET} https://host",
        f"['prefect', '--auth-string', 'user:{SECRET}', '--verbose']",
        f"RFDETR_NOTIFY_URL=https://hooks.example.org/T01/{SECRET}",
        "id AKIAIOSFODNN7EXAMPLE end",
        "push with ghp_abcdefghijklmnopqrstuvwxyz012345",
        "pnu_0123456789abcdefghijklmnopqrstuv",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"https://hooks.slack.com/services/T01/B02/{SECRET}",
    ],
)
def test_secrets_of_every_form_are_masked(text: str) -> None:
    masked = redact(text)
    assert MASK in masked
    for secret in (SECRET, "AKIAIOSFODNN7EXAMPLE", "ghp_abc", "pnu_0123", "dozjgNryP4J3"):
        assert secret not in masked
    assert redact(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "epoch 3: train/loss=1.25, val/mAP_50_95: 0.61",
        "ssh://git@github.com/org/repo.git",
        "git@github.com:org/repo.git",
        "s3://bucket/datasets/digits?versionId=abc",
        "http://127.0.0.1:5000/#/experiments/1",
        "cls_token: 1, reg_tokens=4, num_tokens=256",
        "password: null",
        "author: Jane, keyboard=yes, monkey: 3",
        "batch_size=4 lr=0.0001 seed: 42",
        "sqlite:////home/me/mlflow.db",
        "train --epochs 20 --tokenizer bert --max-tokens 256 --num-tokens=4 --author ada",
        '{"Authorization": null, "next": 1}',
        "the header authorization is missing, token classification has no auth",
        "docker run --user 1000:1000 -u 0 image",
        '["Authorization", "Accept"]',
        "RFDETR_NOTIFY_URL must start with https:// or http://",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_environment_variables_are_masked_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPANY_API_KEY", SECRET)
    monkeypatch.setenv("STORE_URI", "s3+https://user:hunter2hunter2@host/x")
    assert redact(f"the server said {SECRET}!") == f"the server said {MASK}!"
    assert redact("cannot log in with hunter2hunter2") == f"cannot log in with {MASK}"


def test_the_address_of_a_webhook_is_masked_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"https://hooks.example.org/services/{SECRET}"
    monkeypatch.setenv("RFDETR_NOTIFY_URL", address)
    assert redact(f"POST {address} gave 404") == f"POST {MASK} gave 404"
    assert redact_mapping({"RFDETR_NOTIFY_URL": address}) == {"RFDETR_NOTIFY_URL": MASK}


def test_mappings_are_masked_at_every_depth() -> None:
    values = {
        "fit": {"lr": 1e-4, "names": ["a", "b"]},
        "aws": {"secret_access_key": SECRET, "region": "eu"},
        "notify": [{"webhook_url": f"https://h/{SECRET}"}],
        "password": "",
        "uri": f"mysql://a:{SECRET}@h/d",
    }
    masked = redact_mapping(values)
    assert SECRET not in json.dumps(masked)
    assert masked["fit"] == values["fit"]
    assert masked["aws"] == {"secret_access_key": MASK, "region": "eu"}
    assert masked["password"] == ""


def test_json_text_stays_json() -> None:
    values = {
        "password": 123456, "tokens": 5, "token": SECRET, "credentials": {"user": "me"},
        "api_key": [1, 2], "secret": None, "auth": "", "reason": f"token={SECRET}",
    }  # fmt: skip
    for indent in (None, 2):
        text = redact(json.dumps(values, indent=indent))
        assert SECRET not in text and "123456" not in text
        assert json.loads(text)["credentials"] == {"user": "me"}
    assert json.loads(redact(json.dumps([json.dumps(values)])))


def test_log_records_and_tracebacks_are_masked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(RedactingFilter())
    try:
        int(f"postgresql://u:{SECRET}@db")
    except ValueError:
        logging.getLogger("flows.test").exception("token=%s", SECRET)
    assert SECRET not in caplog.text
    assert "invalid literal" in caplog.text


def test_names_of_machine_learning_tokens_are_not_secret() -> None:
    assert not any(map(is_secret_name, ["cls_token", "reg_token", "max_tokens", "author", "keys"]))
    assert all(map(is_secret_name, ["HF_TOKEN", "aws.secretAccessKey", "DB_PASSWORD", "apiKey"]))


@given(st.text(), st.sampled_from(["password=", "https://u:", '"token": "']))
def test_masking_twice_changes_nothing(text: str, prefix: str) -> None:
    once = redact(prefix + text)
    assert redact(once) == once


SCHEMES = st.from_regex(r"[A-Za-z][A-Za-z0-9\-]{0,14}", fullmatch=True)
CREDENTIALS = st.from_regex(r"Zq8vX2[A-Za-z0-9._~+/\-]{4,30}={0,2}", fullmatch=True)


@given(
    SCHEMES, CREDENTIALS, st.sampled_from(["Authorization", "authorization", "Proxy-Authorization"])
)
def test_a_header_of_any_scheme_is_masked_in_any_form(scheme: str, secret: str, name: str) -> None:
    value = f"{scheme} {secret}"
    documents = [{name: value, "Accept": "text"}, {"headers": {name: value}, "n": [1]}]
    for text in map(json.dumps, [*documents, [json.dumps(documents)], [f"{name}: {value}"]]):
        masked = redact(text)
        assert "Zq8vX2" not in masked
        json.loads(masked)
    for text in (
        f"{name}: {value}", f"{name}={value}", f"{name}:{value}\nAccept: text",
        f"  {name}: '{value}'", f"HTTP_{name.upper()}={value}", repr(documents),
        str([(name, value), ("Accept", "text")]), f"curl -H '{name}: {value}' host",
        repr(f"GET /\r\n{name}: {value}\r\nAccept: text"),
        f'curl -H "{name}: {value}" host', f"{{{name}: {value}, Accept: text}}",
    ):  # fmt: skip
        masked = redact(text)
        assert "Zq8vX2" not in masked
        assert redact(masked) == masked
        assert ("Accept" in masked) == ("Accept" in text) and ("host" in masked) == ("host" in text)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["--auth", "--token", "--password", "--api-key", "--hf-token", "-password"]),
    st.sampled_from(["", "user:"]),
    CREDENTIALS,
)
def test_values_of_secret_options_are_masked_in_any_form(
    option: str, user: str, secret: str
) -> None:
    value = f"{user}{secret}"
    for text in (
        f"tool {option} {value} --port 1", f"tool {option}={value} --port 1",
        f'tool {option} "{value}" --port 1', f"tool {option}='{value}' --port 1",
        str(["tool", option, value, "--port"]), json.dumps(["tool", option, value, "--port"]),
        json.dumps(["tool", f"{option}={value}", "--port"]),
    ):  # fmt: skip
        masked = redact(text)
        assert "Zq8vX2" not in masked and "--port" in masked
        assert redact(masked) == masked
        if text.startswith('["'):
            json.loads(masked)


ORDINARY = (
    "epoch", "3:", "loss=1.25,", "the", "token", "auth", "header", "authorization", "webhook",
    "Scheme", "--epochs 20", "--tokenizer bert", "--max-tokens=256", "s3://bucket/key", "{'a': 1}",
    '["x", "y"]', "author: Jane", "cookies", "http://127.0.0.1:5000/#/runs", "(", ")", "\n",
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.sampled_from(ORDINARY)))
def test_ordinary_words_stay_as_they_are(words: list[str]) -> None:
    text = " ".join(words)
    assert redact(text) == text


def test_the_working_folder_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/srv/pipeline")
    monkeypatch.setenv("OLDPWD", "/home/anna")
    text = 'File "/srv/pipeline/flows/stages/fit.py", called from /home/anna'
    assert redact(text) == text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "part",
    [
        "x",
        "a:",
        "a.",
        "a=",
        "-",
        '"',
        "'a': ",
        "http://",
        "http://a:",
        "@http://a:",
        "?token",
        "?tokentoken",
        "eyJabcdefgh-",
        "authorization: digest a=b,",
        "--password ",
        "curl -u ",
        "-----BEGIN PRIVATE KEY-----",
        '\\"',
        '{"a": ',
    ],
)
def test_a_long_text_does_not_hang(part: str) -> None:
    """A search that is quadratic in the length would take hours; one by recursion would fail."""
    redact(part * (400_000 // len(part)))
