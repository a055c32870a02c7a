"""Decoded images to a resized batch, on the device where the network is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rfdetr.data.decode import Levels, Pixels
from rfdetr.data.image_input import read_image
from rfdetr.data.transforms import as_tensor, resize

DECODERS = 4
# Pixels that are resized together on a GPU, which takes 15 bytes for each. Larger batches are
# resized on the host first.
UPLOADED_PIXELS = 1 << 26


def read_batches(
    sources: Sequence[Any], size: int, levels: Levels | None = None
) -> Iterator[list[Pixels]]:
    """`read_image` of all sources in batches of `size`.

    Files and URLs of a batch are decoded in DECODERS threads while the batch before it is used, so
    at most two batches are in memory. Raises the error of the first source that cannot be read.
    """
    if len(sources) == 1:
        yield [read_image(sources[0], levels)]
        return
    with ThreadPoolExecutor(DECODERS) as pool:
        ahead: deque[list[Any]] = deque()
        try:
            for start in range(0, len(sources), size):
                ahead.append(
                    [_begin(pool, source, levels) for source in sources[start : start + size]]
                )
                if len(ahead) > 1:
                    yield [_end(item, levels) for item in ahead.popleft()]
            while ahead:
                yield [_end(item, levels) for item in ahead.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(pool: ThreadPoolExecutor, source: Any, levels: Levels | None) -> Any:
    """A future for a file or URL; a PIL image may be in the list twice and is not thread-safe."""
    if isinstance(source, str | os.PathLike):
        return pool.submit(read_image, source, levels)
    return source


def _end(item: Any, levels: Levels | None) -> Pixels:
    return item.result() if isinstance(item, Future) else read_image(item, levels)


def resized(
    images: Sequence[Pixels], sizes: Sequence[tuple[int, int]], device: torch.device
) -> list[Tensor]:
    """The images as uint8 (3, height, width) of the given sizes, on `device`.

    To a GPU they go in one copy and are resized there.
    """
    if device.type != "cpu":
        if sum(image.shape[0] * image.shape[1] for image in images) <= UPLOADED_PIXELS:
            return resized_there(images, sizes, device)
        return upload(resized(images, sizes, torch.device("cpu")), device)
    return [resize(as_tensor(image), size) for image, size in zip(images, sizes, strict=True)]


def resized_there(
    images: Sequence[Pixels], sizes: Sequence[tuple[int, int]], device: torch.device
) -> list[Tensor]:
    """As `resized`, on any device: copied together, and resized together if all are alike."""
    uploaded = upload([as_tensor(image) for image in images], device)
    if len({image.shape for image in images}) == len(set(sizes)) == 1:
        return list(resize(torch.stack(uploaded), sizes[0]))
    return [resize(image, size) for image, size in zip(uploaded, sizes, strict=True)]


def upload(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """uint8 images (3, H, W) on `device`, in one copy."""
    rows_first = [image.permute(1, 2, 0) for image in images]  # as decoders lay out pixels
    total = sum(image.numel() for image in images)
    flat = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.cat([image.reshape(-1) for image in rows_first], out=flat)
    parts = torch.split(flat.to(device, non_blocking=True), [image.numel() for image in images])
    return [
        part.view(image.shape).permute(2, 0, 1)
        for part, image in zip(parts, rows_first, strict=True)
    ]
