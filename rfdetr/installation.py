"""Detects the public `rfdetr` distribution, which installs files under the same import name."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_about_public_distribution() -> None:
    """One RuntimeWarning if the public distribution is installed beside this one.

    Called when a name of `rfdetr` or `rfdetr.training` is first used: the lookup takes 3 ms, little
    beside the import of torch that follows. `import rfdetr` itself looks for nothing.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        other = distribution("rfdetr")
    except PackageNotFoundError:
        return
    warnings.warn(
        f"The distribution rfdetr {other.version} in {other.locate_file('')} has the same import "
        "name as rfdetr-pipeline: their files overwrite each other. Run `pip uninstall rfdetr "
        "rfdetr-pipeline`, then install rfdetr-pipeline again.",
        RuntimeWarning,
        stacklevel=3,
    )
