from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.redact import MASK, RedactingFilter, is_secret_name, redact, redact_mapping

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


def test_the_working_folder_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/srv/pipeline")
    monkeypatch.setenv("OLDPWD", "/home/anna")
    text = 'File "/srv/pipeline/flows/fit.py", called from /home/anna'
    assert redact(text) == text
