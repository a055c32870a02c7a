from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.redact import _PATTERNS, MASK, SHAPES, Shape, redact, redact_mapping

SECRET = "Zq8vX2mN4pL7rT1w"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_each_shape_masks_its_example(shape: Shape) -> None:
    assert re.search(shape.pattern, shape.example, re.IGNORECASE)
    assert redact(shape.example) == shape.masked
    assert redact(shape.masked) == shape.masked


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://mlflow:{SECRET}/x@db/mlflow",
        f"postgresql://mlflow:p@{SECRET}@db/mlflow",
        f"redis://:{SECRET}@cache:6379/0",
        f"git+https://{SECRET}@github.com/org/repo.git",
        f"https://store.blob.core.windows.net/c/b?sv=2022&sig={SECRET}",
        f"https://host/x?a=1&access_token={SECRET}#part",
        f"https://discord.com/api/webhooks/12/{SECRET}",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET} cut",
        json.dumps({"uri": f"mysql://a:{SECRET}@h/d"}),
    ],
)
def test_other_forms_are_masked(text: str) -> None:
    masked = redact(text)
    assert MASK in masked and SECRET not in masked
    assert redact(masked) == masked


ANIMALS = ("cookie", "token", "bearer", "secretarybird", "password", "credential", "webhook")


@pytest.mark.parametrize(
    "text",
    [
        "epoch 3: train/loss=1.25, val/mAP_50_95: 0.61",
        "ssh://git@github.com/org/repo.git",
        "git@github.com:org/repo.git",
        "s3://bucket/datasets/digits?versionId=abc",
        "http://127.0.0.1:5000/#/experiments/1",
        "http://127.0.0.1:5000/a@b?c=d@e",
        "sqlite:////home/me/mlflow.db",
        "the header authorization is missing, token classification has no auth",
        *(json.dumps({name: 12, f"{name}s": [1]}) for name in ANIMALS),
        *(f"{name}: 12 boxes, val/AP/{name}=0.5, <td>{name}</td>" for name in ANIMALS),
        *(f"{name},12,0.5\n--{name} value" for name in ANIMALS),
    ],
)
def test_ordinary_text_and_class_names_are_kept(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_environment_variables_are_masked_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = f"https://hooks.example.org/services/{SECRET}"
    for name, value, text in (
        ("COMPANY_API_KEY", SECRET, f"the server said {SECRET}!"),
        ("STORE_URI", "s3+https://user:hunter2hunter2@host/x", "no login with hunter2hunter2!"),
        ("RFDETR_NOTIFY_URL", address, f"POST {address} gave 404"),
        ("PREFECT_API_AUTH_STRING", f"me:{SECRET}", f"auth me:{SECRET} refused"),
        ("MYSQL_PWD", SECRET, f"password = '{SECRET}'"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert (
                MASK in redact(text) and value not in redact(text) and "hunter2" not in redact(text)
            )
        assert redact("unchanged environment") == "unchanged environment"
    assert SECRET in redact(f"the server said {SECRET}!"), "the variables are gone"


def test_the_working_folder_is_not_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/srv/pipeline")
    monkeypatch.setenv("OLDPWD", "/home/anna")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    text = 'File "/srv/pipeline/flows/stages/fit.py", called from /home/anna in parallel'
    assert redact(text) == text


def test_mappings_are_masked_at_every_depth() -> None:
    values = {
        "fit": {"lr": 1e-4, "names": ["cookie", f"https://{SECRET}@host"]},
        "token": "secretarybird",
        "uri": f"mysql://a:{SECRET}@h/d",
    }
    masked = redact_mapping(values)
    assert SECRET not in json.dumps(masked)
    assert masked["fit"] == {"lr": 1e-4, "names": ["cookie", f"https://{MASK}@host"]}
    assert masked["token"] == "secretarybird"


@given(st.text(), st.sampled_from(["https://u:", "https://", "?sig=", "a://b:c@"]))
def test_masking_twice_changes_nothing(text: str, prefix: str) -> None:
    once = redact(prefix + text)
    assert redact(once) == once


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part",
    ["x", "a:", "a.", "http://", "http://a:", "@http://a:", "http://a:a", "?token", "?sig=", "eyJ",
     "eyJabcdefgh-", "eyJabcdefgh.", "-----BEGIN PRIVATE KEY-----", "hf_", "sk-", "a://b:c/"],
)  # fmt: skip
def test_a_long_text_takes_linear_time(part: str) -> None:
    text = part * (400_000 // len(part))
    for pattern in _PATTERNS:
        pattern.sub(MASK, text)


def test_the_place_of_a_secret_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/home/me/.aws/keys")
    monkeypatch.setenv("OTHER_CREDENTIALS", "hunter2-planted")
    text = redact("cannot parse /home/me/.aws/keys with hunter2-planted")
    assert text == "cannot parse /home/me/.aws/keys with ***"
