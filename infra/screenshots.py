"""Takes screenshots for the documentation: `python -m infra.screenshots --out docs`.

Opens the latest completed retrain flow run in Prefect, and the champion's run and model version in
MLflow, in headless Chromium (`chromium` on PATH, or RFDETR_CHROMIUM). The servers are those of
PREFECT_API_URL and MLFLOW_TRACKING_URI, which `python -m infra.stack env` prints. With
`--report reports/validation.html` only that dataset report is taken, without servers. A page that
shows an error, or not what it is for, is refused.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from mlflow import MlflowClient
from PIL import Image

from infra.services import StackError
from rfdetr.files import atomic_path

PAGE_MS = 150_000  # virtual time in which a page loads its data
PAGE_SECONDS = 180.0
CONTRAST = 40  # grey levels between the darkest and the lightest pixel of a page with content
ERRORS = re.compile(
    r"\bERR_[A-Z_]+|code: 404|Traceback \(most recent|RESOURCE_DOES_NOT_EXIST"
    r"|(?i:page not found|something went wrong|(internal|api) (server )?error|404 not found)"
    r"|(?i:can.t (be reached|load))"
    r"|(?i:50[0234] (bad|service|gateway|internal)|(failed|unable) to (fetch|load)|does not exist)"
    r"|(?i:(run|model|version|experiment)[^.]{0,60} (was )?not found)"
)
COLORS = 200  # a palette keeps the files small
PALETTE = Image.Quantize.MAXCOVERAGE  # keeps rare colours, such as those of boxes


class Page(NamedTuple):
    """An address, a text that the page must show, the size of the window, and what is kept."""

    url: str
    shows: str
    size: tuple[int, int] = (1280, 800)
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom


def main() -> int:
    """Command line. Exit status 1 if a server, a flow run or the browser is missing."""
    parser = argparse.ArgumentParser(prog="python -m infra.screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--report", type=Path, help="take only this dataset report")
    args = parser.parse_args()
    try:
        chosen = {"report": report_page(args.report)} if args.report else pages()
        for name, page in chosen.items():
            target = args.out / f"{name}.png"
            take(page, target)
            print(f"{target}: {page.url} ({target.stat().st_size // 1024} KiB)")
    except (StackError, httpx.HTTPError) as error:
        print(f"screenshots failed: {error}", file=sys.stderr)
        return 1
    return 0


def pages() -> dict[str, Page]:
    """File name -> page."""
    api, tracking = os.environ.get("PREFECT_API_URL"), os.environ.get("MLFLOW_TRACKING_URI")
    if not api or not tracking:
        raise StackError('no servers are set; run eval "$(python -m infra.stack env)" first')
    flow_run = _latest_flow_run(api)
    prefect = api.removesuffix("/api")
    client = MlflowClient(tracking_uri=tracking)
    models = client.search_registered_models(max_results=1)
    if not models:
        raise StackError(f"{tracking} has no registered model; retrain first")
    name = models[0].name
    version = client.get_model_version_by_alias(name, "champion")
    run = client.get_run(str(version.run_id))
    record = f"{tracking}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return {
        "prefect-run": Page(f"{prefect}/runs/flow-run/{flow_run['id']}", str(flow_run["name"])),
        "mlflow-run": Page(
            f"{record}/model-metrics?workflowType=machine_learning",
            str(run.info.run_name),
            size=(1600, 9000),
            crop=(200, 6640, 1220, 7780),  # the validation charts of the demo
        ),
        "mlflow-model": Page(f"{tracking}/#/models/{name}/versions/{version.version}", name),
    }


def report_page(path: Path) -> Page:
    """The first screen of a dataset report."""
    if not path.is_file() or "<title>Dataset report" not in path.read_text(encoding="utf-8"):
        raise StackError(f"{path} is not a dataset report; run `rfdetr-pipeline validate` first")
    return Page(path.absolute().as_uri(), "Dataset report", size=(1280, 1010))


def take(page: Page, target: Path) -> None:
    """Save the page as a small PNG. Raises StackError for an error page and for an empty one."""
    if page.url.startswith("http"):
        answer = httpx.get(page.url, timeout=30, follow_redirects=True)
        if answer.is_server_error:  # Prefect sends its pages with status 404
            answer.raise_for_status()
    _require_content(page)
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        _browse(page, f"--screenshot={shot}")
        with Image.open(shot) as image:
            kept = image.convert("RGB").crop(page.crop)
    _require_content(page)  # the server may have failed before the picture was taken
    if np.ptp(np.asarray(kept), axis=(0, 1)).max() < CONTRAST:
        raise StackError(f"{page.url} is an empty picture")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        kept.quantize(COLORS, PALETTE).save(temporary, "PNG", optimize=True)


def _require_content(page: Page) -> None:
    if problem := problem_of(page, visible_text(_browse(page, "--dump-dom"))):
        raise StackError(f"{page.url} {problem}; no picture was taken")


def problem_of(page: Page, text: str) -> str | None:
    """What is wrong with the text of a page, as the rest of a sentence."""
    if found := ERRORS.search(text):
        return f"shows an error ({found[0]!r})"
    if not text:
        return "is empty"
    return None if page.shows in text else f"does not show {page.shows!r}"


def visible_text(document: str) -> str:
    """The text of an HTML document without markup, scripts and styles, on one line."""
    bare = re.sub(r"<(script|style|noscript)\b.*?</\1>|<[^>]*>", " ", document, flags=re.DOTALL)
    return " ".join(html.unescape(bare).split())


def _browse(page: Page, action: str) -> str:
    """Load the page in Chromium and return what it prints."""
    browser = os.environ.get("RFDETR_CHROMIUM") or shutil.which("chromium")
    if browser is None:
        raise StackError("Chromium is not installed; install it or set RFDETR_CHROMIUM to its path")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            f"--user-data-dir={profile}",
            f"--window-size={page.size[0]},{page.size[1]}",
            "--blink-settings=preferredColorScheme=1",  # light, whatever the desktop prefers
            f"--virtual-time-budget={PAGE_MS}",
        ]
        try:
            done = subprocess.run(
                [*command, action, page.url],
                check=True,
                capture_output=True,
                text=True,
                timeout=PAGE_SECONDS,
            )
        except subprocess.SubprocessError as error:
            raise StackError(f"Chromium cannot load {page.url}: {error}") from error
    return done.stdout


def _latest_flow_run(api: str) -> dict[str, Any]:
    body = {
        "flows": {"name": {"any_": ["retrain"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        "sort": "END_TIME_DESC",
        "limit": 1,
    }
    answer = httpx.post(f"{api}/flow_runs/filter", json=body, timeout=30)
    answer.raise_for_status()
    found = answer.json()
    if not found:
        raise StackError(f"{api} has no completed retrain flow run; start one first")
    return dict(found[0])


if __name__ == "__main__":
    sys.exit(main())
