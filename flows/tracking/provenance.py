"""Provenance of a result: code, data pointers, packages, machine. Secrets are masked."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from flows.core.redact import redact
from rfdetr.files import sha256_file

MAIN_PACKAGES = ("rfdetr-pipeline", "torch", "torchvision", "timm", "pytorch-lightning", "mlflow")
LARGEST_DIFF = 1_000_000  # characters


class Provenance(BaseModel):
    """Code, data pointers, packages and machine of a run. Unknown fields are None.

    `memory_gb` is in GiB.
    """

    model_config = ConfigDict(frozen=True)

    git_commit: str | None = None
    git_branch: str | None = None
    git_remote: str | None = None
    git_dirty: bool | None = None
    git_diff: str = ""
    dvc_lock_sha256: str | None = None
    python: str
    platform: str
    packages: dict[str, str]
    cpu: str
    cpu_count: int
    memory_gb: float
    gpus: tuple[str, ...] = ()

    def tags(self) -> dict[str, str]:
        """The fields that are useful in a search, as MLflow tags."""
        values = {
            "git.commit": self.git_commit,
            "git.branch": self.git_branch,
            "git.remote": self.git_remote,
            "git.dirty": None if self.git_dirty is None else str(self.git_dirty).lower(),
            "dvc.lock.sha256": self.dvc_lock_sha256,
            "env.python": self.python,
            "env.platform": self.platform,
            "hardware.cpu": f"{self.cpu_count} x {self.cpu}",
            "hardware.memory_gb": str(self.memory_gb),
            "hardware.gpu": ", ".join(self.gpus) or "none",
        }
        values.update({f"env.{name}": self.packages.get(name) for name in MAIN_PACKAGES})
        return {key: value for key, value in values.items() if value is not None}


def collect_provenance(root: str | os.PathLike[str] = ".") -> Provenance:
    """The provenance of the project folder `root` on this machine. Works without git and DVC."""
    import psutil

    folder = Path(root)
    commit = _git(folder, "rev-parse", "HEAD")
    diff = _git(folder, "diff", "HEAD", "--no-color") if commit else None
    status = _git(folder, "status", "--porcelain") if commit else None
    remote = _git(folder, "remote", "get-url", "origin") if commit else None
    lock = folder / "dvc.lock"
    return Provenance(
        git_commit=commit,
        git_branch=_git(folder, "rev-parse", "--abbrev-ref", "HEAD") if commit else None,
        git_remote=redact(remote) if remote else None,
        git_dirty=bool(status) if status is not None else None,
        git_diff=_shorten(redact(diff or "")),
        dvc_lock_sha256=sha256_file(lock) if lock.exists() else None,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=_packages(),
        cpu=cpu_name(),
        cpu_count=os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=_gpu_names(),
    )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n") if done.returncode == 0 else None


def _shorten(diff: str) -> str:
    if len(diff) <= LARGEST_DIFF:
        return diff
    return f"{diff[:LARGEST_DIFF]}\n[truncated: {len(diff) - LARGEST_DIFF} more characters]\n"


@lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return dict(sorted((name, version) for name, version in found.items() if name))


def cpu_name() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> tuple[str, ...]:
    """Names of NVIDIA devices, without importing torch; empty if there are none."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    return tuple(name.decode() if isinstance(name, bytes) else name for name in names)
