"""How predict uses the device, threads and memory; the detections are those of the plain path."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rfdetr.data import upload
from rfdetr.data.batch import normalise
from rfdetr.data.transforms import as_tensor, resize
from rfdetr.errors import InputError
from tests.unit.detector.small import pixels, small, small_segmentation
from tests.unit.model.host_transfers import HostTransfers

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[(50, 70)] * 3, [(50, 70), (33, 21), (96, 64)]])
@pytest.mark.parametrize("limit", [1 << 26, 10])
def test_images_resized_on_the_device_are_those_resized_on_the_host(
    sizes: list[tuple[int, int]], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [pixels(*size, seed=i) for i, size in enumerate(sizes)]
    wanted = [(64, 64)] * 3
    expected = [resize(as_tensor(image), (64, 64)) for image in images]
    copies: list[int] = []

    move = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device):
            copies.append(self.numel())
            assert self.dtype == torch.uint8
        return move(self, *args, **kwargs)

    found = upload.resized(images, wanted, CPU)
    assert all(map(torch.equal, found, expected))
    monkeypatch.setattr(torch.Tensor, "to", to)
    there = upload.upload(upload.resized_there(images, wanted, CPU), CPU)
    assert all(map(torch.equal, there, expected))
    assert copies == [sum(image.size for image in images), 3 * 3 * 64 * 64]
    monkeypatch.setattr(upload, "UPLOADED_PIXELS", limit)
    copies.clear()
    alike = upload.resized(images, wanted, torch.device("meta"))
    assert copies == [sum(image.size for image in images) if limit > 10 else 3 * 3 * 64 * 64]
    assert [tuple(image.shape) for image in alike] == [(3, 64, 64)] * 3


@pytest.mark.parametrize("make", [small, small_segmentation])
def test_a_batch_comes_back_in_one_copy(make: Any) -> None:
    detector = make(num_classes=3)
    images = [pixels(50, 70, seed=i) for i in range(4)]
    state = detector.model
    with torch.inference_mode(), HostTransfers() as transfers:
        outputs = state.model(state._batch(images, [(50, 70)] * 4))
        found = state.postprocess.select(outputs, torch.tensor([[50, 70]] * 4)).to_host()
    assert transfers.to_host == ["cpu"]
    for image, scores in zip(images, found.scores, strict=True):
        alone = detector.predict(image, threshold=0.0)
        np.testing.assert_allclose(alone.confidence, scores, atol=1e-6)


def test_detections_hardly_move_with_the_resize_kernel() -> None:
    """Against the input that Pillow gives, the kernel of earlier releases."""
    from sklearn.datasets import load_sample_images

    detector = small(num_classes=3)
    photo = load_sample_images().images[0]
    resized = np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.BILINEAR))
    with torch.no_grad():
        outputs = detector.model.model(normalise(as_tensor(resized))[None])
    former = detector.model.postprocess(outputs, torch.tensor([photo.shape[:2]]))[0]
    found = detector.predict(photo, threshold=0.0)
    np.testing.assert_allclose(found.confidence, former["scores"], atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_low_precision_on_request(dtype: Any) -> None:
    detector = small(num_classes=3)
    seen: list[torch.dtype] = []
    layer = next(m for m in detector.model.model.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    exact = detector.predict(pixels(), threshold=0.0)
    assert set(seen) == {torch.float32}
    seen.clear()
    rough = detector.predict(pixels(), threshold=0.0, dtype=dtype)
    assert str(dtype).removeprefix("torch.") in str(seen[0])
    np.testing.assert_allclose(rough.confidence, exact.confidence, atol=0.02)
    assert rough.xyxy.dtype == exact.xyxy.dtype == np.float32
    assert np.abs(rough.confidence - exact.confidence).max() > 0


def test_formats_that_predict_does_not_have() -> None:
    detector = small(num_classes=3)
    for dtype, text in (("float8", "not supported"), ("float64", "float32, float16 or bfloat16")):
        with pytest.raises(InputError, match=text):
            detector.predict(pixels(), dtype=dtype)
    detector.optimize_for_inference(compile=False)
    with pytest.raises(InputError, match="number format of its own"):
        detector.predict(pixels(), dtype="bfloat16")


def test_files_are_decoded_in_threads_and_in_order(tmp_path: Path) -> None:
    detector = small(num_classes=3)
    images = [pixels(40 + i, 60, seed=i) for i in range(12)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    opened = Image.open(tmp_path / "3.png")  # decoded by predict, in this thread
    sources: list[Any] = [tmp_path / f"{i}.png" for i in range(12)]
    sources[3:5] = [opened, opened]
    images[4] = images[3]
    threads: list[Any] = []
    read = upload.read_image

    def recorded(source: Any, levels: Any) -> Any:
        threads.append((type(source), threading.current_thread()))
        return read(source, levels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload, "read_image", recorded)
        found = detector.predict(sources, threshold=0.0, batch_size=3)
    main = threading.main_thread()
    assert all((thread is main) == issubclass(kind, Image.Image) for kind, thread in threads)
    for image, detections in zip(images, found, strict=True):
        alone = detector.predict(image, threshold=0.0)
        np.testing.assert_allclose(detections.xyxy, alone.xyxy, atol=1e-4)


def test_the_first_file_that_cannot_be_read_is_named_and_no_thread_stays(tmp_path: Path) -> None:
    detector = small(num_classes=3)
    Image.fromarray(pixels()).save(tmp_path / "good.png")
    good, absent = tmp_path / "good.png", tmp_path / "absent.png"
    (tmp_path / "broken.png").write_bytes(b"text")
    with pytest.raises(InputError, match=r"broken\.png"):
        detector.predict([good, tmp_path / "broken.png", absent, *[good] * 30], batch_size=2)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    "count", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_memory_does_not_grow_with_the_list(count: int, tmp_path: Path) -> None:
    detector = small(num_classes=3)
    height, width = 600, 800  # 1.4 MB of pixels
    Image.fromarray(pixels(height, width)).save(tmp_path / "a.jpg")
    detector.predict([tmp_path / "a.jpg"] * 4, batch_size=2)
    tracemalloc.start()
    try:
        found = detector.predict([tmp_path / "a.jpg"] * count, batch_size=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert peak < (2 * 2 + 4) * height * width * 3 + count * 4000
