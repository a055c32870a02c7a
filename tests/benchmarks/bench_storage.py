"""Transfers with an S3 server on loopback: one large object, a killed download of it, many files.

Each number is [seconds, processor seconds of the client]. `killed` is the second attempt after a
`kill -9` at half of the download: what an interruption of one object costs. Prints a JSON object.

    python tests/benchmarks/bench_storage.py --megabytes 1000 --files 2000
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flows.storage.objects import download, upload
from flows.storage.prefixes import download_tree, upload_tree

BIG, SET = "s3://data/big.bin", "s3://data/set"
FETCH = "import sys; from {module} import download; download(*sys.argv[1:], progress=False)"


def serve(folder: Path) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{address}",
        AWS_ACCESS_KEY_ID=key,
        AWS_SECRET_ACCESS_KEY=secret,
        AWS_DEFAULT_REGION="us-east-1",
    )
    (folder / "data").mkdir(parents=True)
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--config", os.devnull]
    command += ["--addr", address, "--auth-key", f"{key},{secret}", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)
    return server


def timed(work: Callable[[], object]) -> list[float]:
    started, used = time.perf_counter(), time.process_time()
    work()
    return [round(time.perf_counter() - started, 2), round(time.process_time() - used, 2)]


def kill_halfway(target: Path, seconds: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", FETCH.format(module=download.__module__), BIG, str(target)]
    )
    while not any(target.parent.glob(f".{target.name}.*")):
        time.sleep(0.01)
    time.sleep(seconds / 2)
    child.kill()
    child.wait()


def measure(base: Path, megabytes: int, files: int) -> dict[str, list[float]]:
    noise = np.random.default_rng(0)
    with open(base / "big.bin", "wb") as stream:
        stream.writelines(noise.bytes(10**6) for _ in range(megabytes))
    for number in range(files):
        path = base / "set" / f"{number % 100:02d}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise.bytes(50_000))
    numbers = {
        "upload": timed(lambda: upload(base / "big.bin", BIG, progress=False)),
        "download": timed(lambda: download(BIG, base / "copy", progress=False)),
    }
    (base / "copy").unlink()
    kill_halfway(base / "copy", numbers["download"][0])
    numbers["killed"] = timed(lambda: download(BIG, base / "copy", progress=False))
    numbers["upload_files"] = timed(lambda: upload_tree(base / "set", SET, progress=False))
    shutil.rmtree(base / "set")
    numbers["download_files"] = timed(lambda: download_tree(SET, base / "set", progress=False))
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--files", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        server = serve(Path(place) / "s3")
        try:
            print(json.dumps(vars(options) | measure(Path(place), **vars(options))))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
