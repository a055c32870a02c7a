"""A dataset of many small files under DVC: as it is against packed into shards.

Times `dvc add`, a `dvc status` without changes, `dvc push` to an S3 server on loopback, and packing
and unpacking: [seconds, processor seconds]. Prints one JSON object.

    python tests/benchmarks/bench_many_files.py --files 100000
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from flows.storage.packs import pack, unpack

FOLDERS = 100


def make_files(folder: Path, count: int, size: int) -> None:
    noise = np.random.default_rng(0).bytes(size + count)
    for number in range(count):
        path = folder / f"{number % FOLDERS:02d}" / f"image_{number:07d}.jpg"
        if number < FOLDERS:
            path.parent.mkdir(parents=True)
        path.write_bytes(number.to_bytes(4, "big") + noise[number : number + size])


def clock() -> tuple[float, float]:
    """Seconds, and processor seconds of this process and its finished children."""
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return time.perf_counter(), own


def since(started: tuple[float, float]) -> list[float]:
    return [round(now - then, 1) for now, then in zip(clock(), started, strict=True)]


def timed(root: Path, *command: str) -> list[float]:
    started = clock()
    subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, check=True)
    return since(started)


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    os.environ.update(
        AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret, AWS_DEFAULT_REGION="us-east-1"
    )
    (folder / "dvc").mkdir(parents=True)
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--config", os.devnull]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)
    return server, f"http://127.0.0.1:{port}"


def measure(root: Path, name: str, url: str) -> dict[str, list[float]]:
    numbers = {"add": timed(root, "add", "--quiet", name)}
    timed(root, "remote", "add", "--force", "-d", "store", f"s3://dvc/{Path(name).name}")
    timed(root, "remote", "modify", "store", "endpointurl", url)
    numbers["status"] = timed(root, "status", "--quiet")
    numbers["push"] = timed(root, "push", "--quiet", name)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        server, url = serve(base / "s3")
        try:
            root = base / "project"
            root.mkdir()
            make_files(root / "data" / "plain", options.files, options.bytes)
            timed(root, "init", "--no-scm", "--quiet")
            result: dict[str, object] = {"files": options.files, "bytes": options.bytes}
            started = clock()
            pack(root / "data" / "plain", root / "data" / "packed", progress=False)
            packed = {"pack": since(started)}
            started = clock()
            unpack(root / "data" / "packed", base / "unpacked", progress=False)
            packed["unpack"] = since(started)
            result["packed_s"] = packed | measure(root, "data/packed", url)
            print(json.dumps(result), flush=True)
            result["plain_s"] = measure(root, "data/plain", url)
            print(json.dumps(result))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
