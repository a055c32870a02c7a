"""Takes screenshots for the documentation: `python -m infra.screenshots --out docs`.

Opens the latest completed retrain flow run in Prefect, and the champion's run and model version in
MLflow, in headless Chromium (`chromium` on PATH, or RFDETR_CHROMIUM). The servers are those of
PREFECT_API_URL and MLFLOW_TRACKING_URI, which `python -m infra.stack env` prints. With
`--report reports/validation.html` only that dataset report is taken, without servers. A page that
shows an error, nothing, or not what it is for is loaded again, and then refused.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from mlflow import MlflowClient
from PIL import Image

from infra.chromium import Page, browser
from infra.settings import StackError
from rfdetr.files import atomic_path

MENU = 200  # width of MLflow's menu
TIDY = """(async () => {
  const wait = () => new Promise(done => setTimeout(done, 1000));
  document.head.insertAdjacentHTML('beforeend', '<style>.modebar {display: none}</style>');
  document.querySelectorAll('[aria-label*=close i]').forEach(button => button.click());
  await wait();
  const named = e => /^%s/.test(e.textContent.trim());
  [...document.querySelectorAll('*')].findLast(named).scrollIntoView();
})()"""  # without the assistant and the buttons on charts, from the heading that begins like this
CONTRAST = 40  # grey levels between the darkest and the lightest pixel of a page with content
COLORS = 200  # a palette keeps the files small
PALETTE = Image.Quantize.MAXCOVERAGE  # keeps rare colours, such as those of boxes


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
        "prefect-run": Page(
            f"{prefect}/runs/flow-run/{flow_run['id']}",
            str(flow_run["name"]),
            crop=(256, 0, 1280, 900),
        ),
        "mlflow-run": Page(
            f"{record}/model-metrics?workflowType=machine_learning",
            str(run.info.run_name),
            size=(1280, 1300),
            crop=(MENU, 0, 1280, 1300),
            script=TIDY % r"val\s*\(\d+\)",
        ),
        "mlflow-model": Page(
            f"{tracking}/#/models/{name}/versions/{version.version}",
            name,
            crop=(MENU, 0, 1280, 700),
            script=TIDY % "Registered Models",
        ),
    }


def report_page(path: Path) -> Page:
    """The first screen of a dataset report."""
    if not path.is_file() or "<title>Dataset report" not in path.read_text(encoding="utf-8"):
        raise StackError(f"{path} is not a dataset report; run `rfdetr-pipeline validate` first")
    return Page(path.absolute().as_uri(), "Dataset report", size=(1280, 1010))


def take(page: Page, target: Path) -> None:
    """Save the page as a small PNG. Raises StackError for an error page and for an empty one."""
    with browser() as tab, Image.open(io.BytesIO(tab.picture(page))) as image:
        kept = image.convert("RGB").crop(page.crop)
    if np.ptp(np.asarray(kept), axis=(0, 1)).max() < CONTRAST:
        raise StackError(f"{page.url} is an empty picture")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        kept.quantize(COLORS, PALETTE).save(temporary, "PNG", optimize=True)


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
