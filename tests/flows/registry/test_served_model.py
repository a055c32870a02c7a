from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from flows.registry import served_model
from flows.registry.artifacts import global_tracking_uri
from flows.registry.registry import Registry
from flows.registry.served_model import read_images
from rfdetr import RFDETR
from rfdetr.data.remote_images import UrlFetcher
from tests.flows.mlflow_fixtures import free_port, stop, wait_for
from tests.flows.models import NAMES, register_champion, write_model

EVERYTHING = {"threshold": 0.0}


@pytest.fixture(scope="module")
def registered(
    migrated_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("pyfunc")
    (folder / "mlflow.db").write_bytes(migrated_database.read_bytes())
    registry = register_champion(f"sqlite:///{folder / 'mlflow.db'}", write_model(folder))
    with global_tracking_uri(registry.uri):
        yield registry


def fetcher(*allowed: str, seconds: float = 20.0) -> UrlFetcher:
    return UrlFetcher(allowed, max_bytes=1 << 20, seconds=seconds)


@pytest.fixture
def open_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image_file: Path) -> None:
    """`read_images` reads files of the test and URLs of this machine."""
    folders = [os.path.realpath(folder) for folder in (tmp_path, image_file.parent)]
    monkeypatch.setattr(served_model, "FOLDERS", folders)
    monkeypatch.setattr(served_model, "URLS", fetcher("127.0.0.1"))


@pytest.fixture(scope="module")
def champion(registered: Registry) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RFDETR_SERVE_FILES", tempfile.gettempdir())
        patch.setenv("RFDETR_SERVE_URLS", "127.0.0.1")
        return mlflow.pyfunc.load_model(f"models:/{registered.name}@champion")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def image_file(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image of digits.png"
    Image.fromarray(pixels).save(path)
    return path


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def same(one: pd.Series, two: pd.Series) -> bool:
    return json.dumps(one.to_dict()) == json.dumps(two.to_dict())


def test_champion_answers_as_the_detector_itself(
    champion: Any, registered: Registry, image_file: Path, tmp_path: Path
) -> None:
    version = registered.champion()
    assert version is not None
    weights = registered.fetch(version, tmp_path) / "artifacts" / "best.pth"
    expected = RFDETR.from_checkpoint(str(weights)).predict(Image.open(image_file), threshold=0.0)
    (row,) = champion.predict(pd.DataFrame({"image": [str(image_file)]}), params=EVERYTHING).iloc
    order = np.argsort(-expected.confidence, kind="stable")
    assert 0 < len(row.scores) == len(expected)
    assert row.scores == sorted(row.scores, reverse=True)
    np.testing.assert_allclose(row.boxes, expected.xyxy[order], rtol=1e-6)
    np.testing.assert_allclose(row.scores, expected.confidence[order], rtol=1e-6)
    assert row.labels == expected.class_id[order].tolist()
    assert set(row.names) <= {*NAMES, str(len(NAMES))}
    assert row.names == [NAMES[i] if i < len(NAMES) else str(i) for i in row.labels]


def test_every_form_of_an_image_gives_the_same_answer(
    champion: Any, pixels: np.ndarray, image_file: Path
) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=image_file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{image_file.name.replace(' ', '%20')}"
        forms = [
            str(image_file), url, encoded(image_file),
            f"data:image/png;base64,{encoded(image_file)}",
            image_file.read_bytes(), pixels, pixels.tolist(),
        ]  # fmt: skip
        found = champion.predict(pd.DataFrame({"image": forms}), params=EVERYTHING)
        server.shutdown()
    assert len(found) == len(forms)
    assert all(same(found.iloc[0], found.iloc[i]) for i in range(1, len(forms)))


def test_threshold_and_largest_number_of_detections(champion: Any, image_file: Path) -> None:
    frame = pd.DataFrame({"image": [str(image_file)]})
    every = champion.predict(frame, params=EVERYTHING).iloc[0]
    middle = float(np.median(every.scores))
    some = champion.predict(frame, params={"threshold": middle}).iloc[0]
    assert some.scores == [score for score in every.scores if score > middle]
    few = champion.predict(frame, params={"threshold": 0.0, "max_detections": 3}).iloc[0]
    assert few.boxes == every.boxes[:3]
    assert champion.predict(frame, params={"threshold": 0.999}).iloc[0].boxes == []
    for params in ({"threshold": 1.5}, {"max_detections": 0}):
        with pytest.raises(MlflowException, match="threshold must be in"):
            champion.predict(frame, params=params)


def test_every_bad_row_is_named(open_model: None, tmp_path: Path, image_file: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(image_file.read_bytes()[:300])
    rows = [
        str(image_file), str(tmp_path / "missing.jpg"), str(tmp_path / "text.png"),
        str(tmp_path / "cut.png"), "not an image!", encoded(image_file)[:40], None, 7,
        np.zeros((4, 4, 2)), np.full((4, 4, 3), 0.5), np.full((4, 4, 3), 300), [[1, 2], [3]],
        "http://127.0.0.1:9/x.png?X-Amz-Signature=abcdef123456",
    ]  # fmt: skip
    with pytest.raises(MlflowException) as caught:
        read_images(pd.DataFrame({"image": rows}))
    text = str(caught.value)
    assert caught.value.get_http_status_code() == 400
    assert "row 0:" not in text
    assert all(f"row {index}:" in text for index in range(1, len(rows)))
    assert "is not a readable file" in text
    assert "cannot be fetched" in text
    assert "abcdef123456" not in text
    with pytest.raises(MlflowException, match=r"column 'image' is missing; found \['picture'\]"):
        read_images(pd.DataFrame({"picture": ["a"]}))


def test_gray_palette_alpha_and_deep_images_are_read(open_model: None, tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "I;16", "1"):
        path = tmp_path / f"{mode.replace(';', '')}.tiff"
        Image.new(mode, (5, 4)).save(path)
        (image,) = read_images([str(path)])
        assert (image.mode, image.size) == ("RGB", (5, 4))
    assert read_images([np.zeros((4, 5), dtype=np.uint8)])[0].size == (5, 4)


def test_base64_text_of_any_length_is_not_a_path() -> None:
    random = np.random.default_rng(0)
    for _ in range(400):
        shape = (*random.integers(1, 30, 2), 3)
        array = random.integers(0, 256, shape, dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        (image,) = read_images([base64.b64encode(stream.getvalue()).decode("ascii")])
        assert np.array_equal(np.asarray(image), array)


def test_scoring_server_takes_json_and_answers_400_to_bad_rows(
    champion: Any, pixels: np.ndarray, image_file: Path
) -> None:
    client = TestClient(scoring_server.init(champion))
    frame = {"columns": ["image"], "data": [[encoded(image_file)], [pixels.tolist()]]}
    for body in (
        {"dataframe_split": frame, "params": EVERYTHING},
        {"inputs": {"image": [encoded(image_file), encoded(image_file)]}, "params": EVERYTHING},
        {"dataframe_records": [{"image": encoded(image_file)}] * 2, "params": EVERYTHING},
    ):
        answer = client.post("/invocations", json=body)
        assert answer.status_code == 200, answer.text
        one, two = answer.json()["predictions"]
        assert one == two
        assert set(one) == {"boxes", "scores", "labels", "names"}
        assert len(one["boxes"]) == len(one["scores"]) == 30
    bad = {"dataframe_split": {"columns": ["image"], "data": [["nothing"]]}}
    answer = client.post("/invocations", json=bad)
    assert answer.status_code == 400
    assert "row 0: 'nothing' is neither base64 text nor allowed" in answer.text


def test_signature_example_and_files_of_the_model(champion: Any, registered: Registry) -> None:
    signature = champion.metadata.signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["boxes", "scores", "labels", "names"]
    assert [param.name for param in signature.params] == ["threshold", "max_detections"]
    example = champion.metadata.load_input_example(
        str(registered.client.get_logged_model(champion.metadata.model_id).artifact_location)
    )
    assert len(champion.predict(example)) == 1


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ("/etc/passwd", "/etc/nope"),
        ("/etc/hosts", "/etc/hostz"),
        ("file:///etc/passwd", "file:///etc/nope"),
        ("/proc/self/environ", "/proc/self/environz"),
        ("../../etc/passwd", "../../etc/nope"),
        ("http://127.0.0.1:{port}/a.png", "http://127.0.0.1:9/a.png"),
        ("HTTP://localhost:{port}/a.png", "HTTP://localhost:9/a.png"),
        ("http://2130706433:{port}/a.png", "http://2130706433:9/a.png"),
    ],
)
def test_by_default_the_answer_does_not_depend_on_files_and_network(
    site: Site, image_file: Path, there: str, missing: str
) -> None:
    texts = []
    for value in (there, missing):
        value = value.format(port=site.port)
        with pytest.raises(MlflowException) as caught:
            read_images([value])
        assert caught.value.get_http_status_code() == 400
        texts.append(str(caught.value).replace(repr(value), "<value>"))
    assert texts[0] == texts[1]
    with pytest.raises(MlflowException, match=r"neither base64 text nor allowed|not a readable"):
        read_images([str(image_file)])
    assert site.asked == []


def test_only_files_below_the_listed_folders_are_read(
    tmp_path: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_model, "FOLDERS", [str(tmp_path)])
    (tmp_path / "in.png").write_bytes(image_file.read_bytes())
    (tmp_path / "link.png").symlink_to(image_file)
    assert len(read_images([str(tmp_path / "in.png"), f"file://{tmp_path}/in.png"])) == 2
    for value in (tmp_path / "link.png", tmp_path / "../x.png", image_file, tmp_path / "no.png"):
        with pytest.raises(MlflowException):
            read_images([str(value)])


class Site:
    """A web server on this machine: an image, redirects, and pages that never end."""

    def __init__(self, image: bytes) -> None:
        site = self
        self.asked: list[str] = []
        self.location = ""

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                site.asked.append(self.path)
                if self.path == "/redirect":
                    self.send_response(302)
                    self.send_header("Location", site.location)
                    self.end_headers()
                elif self.path.startswith("/drip"):
                    site.drip(self)
                else:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(image)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def drip(self, request: Any) -> None:
        head = request.path == "/drip-headers"
        with contextlib.suppress(OSError):
            request.wfile.write(b"HTTP/1.0 200 OK\r\nX-A: " if head else b"HTTP/1.0 200 OK\r\n\r\n")
            for _ in range(600):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(0.1)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def site(image_file: Path) -> Iterator[Site]:
    site = Site(image_file.read_bytes())
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.mark.parametrize(
    ("allowed", "host", "fetched"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.0/8", "127.0.0.1", True),
        ("localhost", "localhost", True),
        ("LOCALHOST", "localhost", True),
        ("*, 127.0.0.0/8", "localhost", True),
        ("*", "localhost", False),  # a pattern never allows a private address
        ("*", "127.0.0.1", False),
        ("*", "[::ffff:127.0.0.1]", False),
        ("*", "2130706433", False),
        ("10.0.0.0/8", "127.0.0.1", False),
        ("example.com", "localhost", False),
        ("127.0.0.0/8", "localhost", False),  # names must be listed as names
    ],
)
def test_hosts_and_private_addresses(site: Site, allowed: str, host: str, fetched: bool) -> None:
    (found,) = fetcher(*allowed.split(", ")).fetch([site.url("/a.png", host)])
    assert isinstance(found, bytes) == fetched
    assert bool(site.asked) == fetched
    assert fetched or str(found) == "is not on the list of allowed hosts"


@pytest.mark.parametrize("target", ["http://localhost:{}/a.png", "file:///etc/passwd", "ftp://a/b"])
def test_redirects_are_checked_like_the_url(site: Site, target: str) -> None:
    site.location = target.format(site.port)
    (found,) = fetcher("127.0.0.1").fetch([site.url("/redirect")])
    assert str(found) == "is not on the list of allowed hosts"
    assert site.asked == ["/redirect"]
    site.location = "/a.png"
    assert isinstance(fetcher("127.0.0.1").fetch([site.url("/redirect")])[0], bytes)
    site.location = "/redirect"
    assert "redirects" in str(fetcher("127.0.0.1").fetch([site.url("/redirect")])[0])


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_all_urls_of_a_request_share_one_time_limit(site: Site, path: str) -> None:
    started = time.monotonic()
    slow = fetcher("127.0.0.1", seconds=0.6)
    found = slow.fetch([site.url(path), site.url(path), site.url("/a.png")])
    assert all(isinstance(content, ValueError) for content in found)
    assert time.monotonic() - started < 3


def test_slow_urls_block_nobody(
    site: Site, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_model, "URLS", fetcher("127.0.0.1", seconds=2.0))
    with ThreadPoolExecutor(12) as pool:
        slow = [pool.submit(read_images, [site.url("/drip")]) for _ in range(12)]
        time.sleep(0.5)
        started = time.monotonic()
        assert sum(request.done() for request in slow) == 10
        assert len(read_images([encoded(image_file)])) == 1
        with pytest.raises(MlflowException, match="fetching the URLs of other requests") as caught:
            read_images([site.url("/a.png")])
        assert caught.value.get_http_status_code() == 503
        assert time.monotonic() - started < 1.5
    assert {request.exception().get_http_status_code() for request in slow} == {400, 503}
    assert len(read_images([site.url("/a.png")])) == 1


def test_unknown_params_are_refused(champion: Any, image_file: Path) -> None:
    frame = pd.DataFrame({"image": [encoded(image_file)]})
    with pytest.raises(MlflowException, match=r"unknown params: treshold.*Did you mean threshold"):
        champion.predict(frame, params={"treshold": 0.1})
    body = {"inputs": {"image": [encoded(image_file)]}, "params": {"treshold": 0.1}}
    answer = TestClient(scoring_server.init(champion)).post("/invocations", json=body)
    assert (answer.status_code, "Did you mean threshold" in answer.text) == (400, True)


OUTSIDE = """
import sys
sys.modules["flows"] = None  # only rfdetr is installed where a model serves
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
print(len(model.predict(pandas.DataFrame({"image": [sys.argv[2]]}), params={"threshold": 0.0})))
"""


def test_the_model_loads_in_another_folder_without_the_pipeline_and_without_pickle(
    registered: Registry, image_file: Path, tmp_path: Path
) -> None:
    version = registered.champion()
    assert version is not None
    folder = registered.fetch(version, tmp_path / "fetched")
    assert not [p for p in folder.rglob("*") if p.suffix in {".pkl", ".pickle"}]
    held = {p.name for p in (folder / "artifacts").iterdir()}
    assert held == {"best.pth", "model.json", "model.onnx", "parity.json"}
    command = [sys.executable, "-c", OUTSIDE, str(folder), encoded(image_file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr[-3000:]


def test_mlflow_models_serve_answers_a_request_with_an_image(
    registered: Registry, image_file: Path, tmp_path: Path
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", f"models:/{registered.name}@champion", "-p", str(port), "-h", "127.0.0.1"]
    log = tmp_path / "serve.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "MLFLOW_TRACKING_URI": registered.uri},
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", 120, log)
        body = json.dumps({"inputs": {"image": [encoded(image_file)]}, "params": EVERYTHING})
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=body.encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(io.BytesIO(response.read()))
    finally:
        stop(server)
    (row,) = answer["predictions"]
    assert len(row["boxes"]) == 30
    assert all(len(box) == 4 for box in row["boxes"])
