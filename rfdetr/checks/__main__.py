"""Entry of `python -m rfdetr.checks`."""

from rfdetr.checks.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
