from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from rfdetr.checks import inspection
from rfdetr.checks.cache import FactsCache, Inspected
from rfdetr.checks.image_probe import MAX_PIXELS, ImageFacts
from rfdetr.checks.inspection import Paths, inspect_images


def facts_of(paths: list[str], cache: Path, **options: object) -> list[Inspected]:
    store = FactsCache(cache, MAX_PIXELS)
    return inspect_images(paths, store, max_pixels=MAX_PIXELS, progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    folder = tmp_path / "images"
    folder.mkdir()
    paths = []
    for number in range(70):
        path = folder / f"{number}.png"
        Image.new("RGB", (8 + number, 9), (number, 3, 9)).save(path)
        paths.append(str(path))
    (folder / "7.png").write_bytes(b"")
    (folder / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return [*paths, str(folder / "absent.png")]


def test_processes_give_what_one_process_gives(images: list[str], tmp_path: Path) -> None:
    alone = facts_of(images, tmp_path / "a", workers=1)
    together = facts_of(images, tmp_path / "b", workers=2)
    assert alone == together
    assert [alone[i].facts.status for i in (7, 9, 70, 0)] == ["empty", "truncated", "missing", "ok"]
    assert alone[5].facts.width == 13


def test_unchanged_images_are_not_decoded_again(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = facts_of(images, tmp_path / "cache", workers=1)
    decoded: list[int] = []
    monkeypatch.setattr(
        inspection, "probe_bytes", lambda data, *_: decoded.append(len(data)) or ImageFacts("ok")
    )
    assert facts_of(images, tmp_path / "cache", workers=1) == first
    assert not decoded

    moved = Path(shutil.copytree(Path(images[0]).parent, tmp_path / "moved"))
    paths = [str(moved / Path(path).name) for path in images]
    assert facts_of(paths, tmp_path / "cache", workers=1) == first
    assert not decoded

    Image.new("RGB", (99, 9), (1, 2, 3)).save(images[3])
    facts_of(images, tmp_path / "cache", workers=1)
    assert len(decoded) == 1


def test_a_broken_cache_costs_a_warning_not_a_result(
    images: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = facts_of(images, tmp_path / "good", workers=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "images.sqlite").write_bytes(b"not a database" * 200)
    assert facts_of(images, tmp_path / "bad", workers=1) == expected
    assert "image check cache is not used" in caplog.text


def die_on_nine(paths: Paths, max_pixels: int, levels: object) -> list[Inspected]:
    if any(Path(path).name == "9.png" for path in paths):
        os._exit(9)
    return runner_inspect(paths, max_pixels)


runner_inspect = inspection.inspect_batch


def test_a_decoder_that_kills_its_process_costs_one_image(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = facts_of(images, tmp_path / "a", workers=1)
    monkeypatch.setattr(inspection, "inspect_batch", die_on_nine)
    found = facts_of(images, tmp_path / "b", workers=2)
    assert found[9].facts.status == "unreadable"
    assert "crashed" in found[9].facts.detail
    assert [f for i, f in enumerate(found) if i != 9] == [
        f for i, f in enumerate(expected) if i != 9
    ]


def test_a_script_without_main_guard_and_with_threads_works(tmp_path: Path) -> None:
    """Children do not run the caller's script again."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(70):
        Image.new("RGB", (8, 9), (number, 3, 9)).save(folder / f"{number}.png")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import threading
            from pathlib import Path
            from rfdetr.checks.cache import FactsCache
            from rfdetr.checks.inspection import inspect_images, process_context
            event = threading.Event()
            threading.Thread(target=event.wait, daemon=True).start()
            assert process_context().get_start_method() == "spawn"
            paths = sorted(map(str, Path({str(folder)!r}).iterdir()))
            cache = FactsCache({str(tmp_path / "cache")!r}, 10**8)
            found = inspect_images(paths, cache, max_pixels=10**8, workers=2, progress=False)
            print("found", sum(f.facts.status == "ok" for f in found))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.stdout == "found 70\n"
