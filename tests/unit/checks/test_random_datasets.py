"""On random datasets, checks and training agree, both keep one ledger, and `--fix` never hurts."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.repair.copy import EVERY_FINDING, repair_dataset
from rfdetr.config import ModelConfig, RFDETRNanoConfig, RFDETRSegNanoConfig, TrainConfig
from rfdetr.data.dataset import DetectionDataset
from rfdetr.data.ledger import SplitLedger
from rfdetr.data.packed import Target
from rfdetr.data.transforms import EvalTransform
from rfdetr.errors import DatasetError
from rfdetr.training.datamodule import RFDETRDataModule
from tests.random_datasets.base import Case
from tests.random_datasets.plan import Plan, plans

# Training works, but learns or measures something wrong; test_wrong_boxes.py proves these.
WRONG = frozenset({"image-size-mismatch", "split-duplicate-image", "category-name-duplicate"})
WRONG |= {"box-format", "box-outline"}
# The split is not the folder that the test counts, or its rows are not known.
UNCOUNTED = {"json-malformed", "json-structure", "key-missing", "yaml-path", "yaml-structure"}
UNCOUNTED |= {"split-missing", "file-outside", "labels-utf-16", "labels-latin-1"}
UNCOUNTED |= {"label-folder", "classes-file"}
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")
ELSEWHERE = ("list-", "path-", "train-", "val-")


def model_of(plan: Plan) -> ModelConfig:
    config = RFDETRSegNanoConfig if plan.masks else RFDETRNanoConfig
    return config.model_validate({"pretrain_weights": None, "num_classes": 90})


def check(root: Path, plan: Plan, cache: Path) -> DatasetReport:
    return check_dataset(
        root,
        plan.kind,
        config=CheckConfig(max_findings_per_code=EVERY_FINDING),
        model_config=model_of(plan),
        workers=1,
        cache_dir=cache,
        progress=False,
    )


class TrainedObjects(DetectionDataset):
    """Training objects at their full size; training reads no crowd region."""

    def _crowd(self, *_: object) -> Target:
        return {}


def train(root: Path, plan: Plan) -> dict[str, SplitLedger]:
    """Read every split and every item as training and evaluation do; the ledgers."""
    config = TrainConfig.model_validate(
        {"dataset_dir": str(root), "dataset_file": plan.kind, "num_workers": 0}
    )
    data = RFDETRDataModule(model_of(plan), config)
    data.setup("fit")
    data.setup("test")
    data.train_dataloader()
    for name, ledger in data.ledgers.items():
        dataset = data._datasets[name]
        kind = TrainedObjects if name == "train" else DetectionDataset
        dataset = kind(dataset.index, EvalTransform(32), masks=plan.masks)
        found = sum(len(dataset[i][1]["labels"]) for i in _once(dataset, plan))
        assert found == ledger.objects, (name, found, str(ledger))
    return data.ledgers


def _once(dataset: DetectionDataset, plan: Plan) -> list[int]:
    """Images, without those that share the label file of another one."""
    files = [dataset.index.path(i) for i in range(len(dataset))]
    first = {file.with_suffix(""): i for i, file in reversed(list(enumerate(files)))}
    return sorted(first.values()) if plan.kind == "yolo" else list(range(len(files)))


def tree(*roots: Path) -> str:
    """A hash of the names, kinds, times and contents of everything below the folders."""
    found = hashlib.sha256()
    for root in roots:
        for place, folders, files in sorted(os.walk(root)):
            for name in sorted((*folders, *files)):
                path = Path(place, name)
                status = path.lstat()
                content = path.read_bytes() if path.is_file() else b""
                found.update(repr((str(path), status.st_mode, status.st_mtime_ns)).encode())
                found.update(content)
    return found.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Files below a folder; links to folders are followed, a link to a parent is not."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        found += [path for name in files if (path := Path(place, name)).is_file()]
    return found


def adds_up(case: Case, split: str, ledger: SplitLedger) -> None:
    """Every file and every annotation row is in one account."""
    files = files_below(case.folder(split))
    rows: object = case.documents.get(split, {}).get("annotations")
    if case.kind == "yolo":
        files += files_below(case.folder(split).parent / "labels")
        seen = [path for path in files if not HIDDEN.search(path.relative_to(case.root).as_posix())]
        texts = [path.read_bytes() for path in seen if path.suffix.lower() == ".txt"]
        rows = [line for text in texts for line in text.splitlines() if line.strip()]
    assert sum(ledger.files.values()) == len(files), (str(ledger), files)
    count = len(rows) if isinstance(rows, list) else 0
    assert sum(ledger.rows.values()) == count, str(ledger)


def verify(plan: Plan, folder: Path) -> None:
    root, cache = folder / "data", folder / "cache"
    case = plan.build(root)
    before = tree(root, folder / "elsewhere")
    try:
        report = check(root, plan, cache)
    except DatasetError as error:
        assert str(root) in str(error)
        with pytest.raises(DatasetError):
            train(root, plan)
        return
    agree(root, plan, report)
    names = {*report.counts, *(damage.name for damage in plan.damages)}
    if not UNCOUNTED & names and not any(name.startswith(ELSEWHERE) for name in names):
        for split, ledger in report.ledger.items():
            adds_up(case, split, ledger)
    repair(root, plan, report, folder)
    assert tree(root, folder / "elsewhere") == before, "the dataset was written to"


def agree(root: Path, plan: Plan, report: DatasetReport) -> None:
    """An error in the report exactly where training refuses, and equal ledgers elsewhere."""
    errors = {f.code: f.message for f in report.findings if f.severity == "error"}
    refusals = {code: text for code, text in errors.items() if code not in WRONG}
    try:
        ledgers = train(root, plan)
    except DatasetError as error:
        assert refusals, f"training refuses, the checks see {report.counts}: {error}"
        return
    assert not refusals, f"training works, the checks say {refusals}"
    for name, ledger in ledgers.items():
        assert report.ledger[name] == ledger, f"{report.ledger[name]} is not {ledger}"


def repair(root: Path, plan: Plan, report: DatasetReport, folder: Path) -> None:
    """The copy has no fewer trainable objects and no more errors."""
    checked = partial(check, plan=plan, cache=folder / "cache")
    out = folder / "fixed"
    try:
        repair_dataset(root, report, out, check=checked)
    except DatasetError as error:
        assert "no copy was written" in str(error)
        assert not out.exists()
        return
    after = checked(out)
    assert after.errors <= report.errors, (after.counts, report.counts)
    for name, ledger in report.ledger.items():
        assert after.ledger[name].objects >= ledger.objects, (name, ledger, after.ledger[name])
    agree(out, plan, after)


def run(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verify(plan, Path(folder).resolve())


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


@seed(0)
@examples(40)
@given(plans)
def test_random_datasets(plan: Plan) -> None:
    run(plan)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_two_thousand_random_datasets(part: int) -> None:
    seed(part)(examples(500)(given(plans)(run)))()
