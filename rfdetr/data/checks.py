"""`python -m rfdetr.data.checks` runs the dataset checks, which live in `rfdetr.checks`."""

from __future__ import annotations

from rfdetr.checks.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
