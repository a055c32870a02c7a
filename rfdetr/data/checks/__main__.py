"""Entry of `python -m rfdetr.data.checks`."""

from rfdetr.data.checks.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
