"""What the README and docs/ say exists, their code runs, and generated documents are current."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flows.cli.main import parser
from flows.config.params import MAPPINGS, SECTIONS, parse_params
from infra.generate_docs import documents
from rfdetr.data.demo import build_demo

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = DOCUMENTS[ROOT / "README.md"]
GENERATED = {"cli.md", "parameters.md"}
ALL = "\n\n".join(text for path, text in DOCUMENTS.items() if path.name not in GENERATED)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", ALL, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", ALL, flags=re.DOTALL)
CODE = [
    *re.findall(r"`([^`\n]+)`", PROSE),
    *"\n".join(b for k, b in BLOCKS if k == "bash").split("\n"),
]
COMMANDS = [re.sub(r"\s+#.*", "", line).strip() for line in CODE]
TINY = (
    "resolution=64, encoder_dim=48, encoder_depth=2, encoder_heads=3, out_feature_indexes=[1, 2], "
    "hidden_dim=32, sa_nheads=4, ca_nheads=4, dim_feedforward=64, num_queries=10, num_select=10, "
    "group_detr=1, dec_layers=2, pretrain_weights=None"
)


def starting_with(*words: str) -> list[list[str]]:
    found = [shlex.split(command) for command in COMMANDS if command.startswith(" ".join(words))]
    return [parts for parts in found if parts[: len(words)] == list(words)]


def test_every_command_is_understood() -> None:
    commands = starting_with("rfdetr-pipeline")
    assert len(commands) >= 8
    for _, *arguments in commands:
        given = ["1" if word == "VERSION" else word for word in arguments]
        if given:
            parser().parse_args(given)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {parts[1].rstrip(";") for parts in starting_with("make")}
    assert {"retrain", "test", "stack", "deploy"} <= named <= targets


def test_every_module_that_is_run_does_something() -> None:
    named = {
        m
        for line in COMMANDS
        for m in re.findall(r"python -m ((?:flows|rfdetr|infra)[\w.]*)(?![\w.<])", line)
    }
    assert len(named) >= 4
    for module in named:
        name = module.rstrip('")')
        found = importlib.util.find_spec(name)
        assert found is not None, name
        if found.submodule_search_locations:
            found = importlib.util.find_spec(f"{name}.__main__")
        assert found is not None, name
        assert found.origin is not None, name
        starts = 'if __name__ == "__main__":' in Path(found.origin).read_text(encoding="utf-8")
        assert starts or name != found.name, f"`python -m {name}` does nothing"


def test_every_deployment_exists() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    names = {f"{d['entrypoint'].rpartition(':')[2]}/{d['name']}" for d in deployments}
    named = {parts[3] for parts in starting_with("prefect", "deployment", "run")}
    assert named
    assert named <= names


def test_every_parameter_is_accepted() -> None:
    snippets = [code for code in CODE if re.match(rf"({'|'.join([*SECTIONS, *MAPPINGS])}): ", code)]
    assert len(snippets) >= 5
    for snippet in snippets:
        parse_params(yaml.safe_load(snippet), origin=snippet)


def test_every_variable_is_read_somewhere() -> None:
    named = set(re.findall(r"`(?:export )?((?:RFDETR|MLFLOW|AWS|RF)_[A-Z_0-9]+)`", ALL))
    assert len(named) >= 8
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("flows", "rfdetr", "infra")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in {".py", ".yaml"}
    )
    libraries = {
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    }
    assert {name for name in named if name not in code} <= libraries


def test_every_test_of_the_guarantees_exists() -> None:
    proofs = re.findall(r"\|([^|\n]+)\|$", DOCUMENTS[ROOT / "docs/guarantees.md"], re.MULTILINE)
    named = re.findall(r"`([^`]+)`", " ".join(proofs))
    assert len(named) >= 15
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in named:
        exists = f"def {name}(" in sources if name.startswith("test_") else (ROOT / name).exists()
        assert exists, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    found = re.findall(r"\]\(([^)]+)\)", DOCUMENTS[document])
    links = {link for link in found if "://" not in link}
    missing = [link for link in links if not (document.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 220


def test_every_package_is_described() -> None:
    text = DOCUMENTS[ROOT / "docs/architecture.md"]
    packages = {
        f"{path.parent.name}/"
        for package in ("flows", "rfdetr")
        for path in (ROOT / package).glob("*/__init__.py")
    }
    assert {name for name in packages if f"| `{name}` |" not in text} == set()


def test_generated_documents_are_current() -> None:
    """`make docs` writes them."""
    assert [path.name for path, text in documents().items() if path.read_text() != text] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    build_demo(folder / "path/to/dataset", train=12, valid=4, test=4)
    photo = next((folder / "path/to/dataset/test").glob("*.jpg"))
    Image.open(photo).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_the_code_runs(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are replaced, nothing else."""
    for wanted in ("RFDETRMediumConfig(num_classes=10", "RFDETRNano(num_classes=3"):
        code = code.replace(wanted, wanted.replace("10", "3") + f", {TINY}")
    code = re.sub(r"epochs=\d+", "epochs=1, batch_size=2, tensorboard=False, num_workers=0", code)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
