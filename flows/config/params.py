"""Reads and checks params.yaml; all of its mistakes are reported at once."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from pydantic import ValidationError

from flows.config.batch_plan import plan_batch
from flows.config.sections import (
    SET_ELSEWHERE,
    SLICE_NAME,
    SOURCE_NAME,
    ConvertSettings,
    DatasetSettings,
    DemoSettings,
    EvaluateSettings,
    FitSettings,
    GateSettings,
    ModelSettings,
    RegistrySettings,
    RuntimeSettings,
    SourceSettings,
    ValidateSettings,
)
from flows.core.files import parse_yaml, read_yaml
from rfdetr.config import StrictConfig
from rfdetr.errors import ConfigError, InputError
from rfdetr.evaluation.slice_rules import parse_rule
from rfdetr.files import write_text_atomic

LOGGER = logging.getLogger(__name__)
PARAMS_FILE = "params.yaml"
# Folders of the project that stages read as code or write.
OWN_FOLDERS = {"models", "metrics", "reports", "plots", "flows", "rfdetr", "infra", ".dvc", ".git"}
MAPPINGS = ("sources", "slices")  # sections whose keys the user chooses
LATER = ("slices",)  # sections that params.yaml of an older project lacks; empty by default


@dataclasses.dataclass(frozen=True)
class Params:
    """All of params.yaml. A section that is missing in the file has its defaults."""

    demo: DemoSettings
    dataset: DatasetSettings
    model: ModelSettings
    validate: ValidateSettings
    convert: ConvertSettings
    fit: FitSettings
    evaluate: EvaluateSettings
    gate: GateSettings
    registry: RegistrySettings
    runtime: RuntimeSettings
    sources: dict[str, SourceSettings] = dataclasses.field(default_factory=dict)
    slices: dict[str, str] = dataclasses.field(default_factory=dict)

    def snapshot(self, *sections: str) -> dict[str, Any]:
        """The named sections (default: all but `sources` and `slices`) as plain data."""
        names = sections or tuple(SECTIONS)
        known = [name for name in names if name in SECTIONS]
        plain = {name: getattr(self, name).model_dump(mode="json") for name in known}
        if "sources" in names:
            plain["sources"] = {key: value.model_dump() for key, value in self.sources.items()}
        if "slices" in names:
            plain["slices"] = dict(self.slices)
        return plain


SECTIONS: dict[str, type[StrictConfig]] = {
    name: kind for name, kind in get_type_hints(Params).items() if name not in MAPPINGS
}


def load_params(path: str | os.PathLike[str] = PARAMS_FILE) -> Params:
    """Read and check params.yaml. Raises one ConfigError that lists every mistake of the file.

    Sections and fields that the dvc.yaml beside it uses must be present: DVC does not know the
    defaults. Those that an older project lacks are added to the file.
    """
    file = Path(path)
    graph = file.with_name("dvc.yaml")
    needed = _needed_by(read_graph(graph)) if graph.exists() else set()
    data = read_yaml(file)
    if isinstance(data, dict):
        data = _with_empty_sections(file, data, needed)
    return parse_params(data, origin=str(file), needed=needed)


def _with_empty_sections(file: Path, data: dict[str, Any], needed: set[str]) -> dict[str, Any]:
    """`data` with the empty sections that params.yaml of an older project lacks, also on disk."""
    added: dict[str, Any] = {name: {} for name in LATER if name in needed and name not in data}
    if not added:
        return data
    lines = "".join(f"\n{name}: {{}}\n" for name in added)
    text = file.read_text(encoding="utf-8").rstrip("\n") + "\n" + lines
    with contextlib.suppress(ConfigError, OSError):  # then the missing sections are reported
        if parse_yaml(text, origin=str(file)) == data | added:
            write_text_atomic(file, text)
            LOGGER.warning("%s: added %s, which dvc.yaml reads", file, ", ".join(added))
            return data | added
    return data


def parse_params(data: Any, *, origin: str = PARAMS_FILE, needed: Iterable[str] = ()) -> Params:
    """Check the content of params.yaml; error messages call it `origin`.

    `needed` are sections and `section.field`s that must be present although they have defaults.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: expected sections, found {type(data).__name__}.")
    problems: list[str] = []
    for name in data:
        if name not in (*SECTIONS, *MAPPINGS):
            problems.append(unknown_name(str(name), "", [*SECTIONS, *MAPPINGS]))
    values = {
        name: _section(name, kind, data.get(name), problems) for name, kind in SECTIONS.items()
    }
    dataset, registry = values["dataset"], values["registry"]
    if dataset and registry and "name" not in registry.model_fields_set:
        values["registry"] = RegistrySettings(name=dataset.name)
    sources = _sources(data.get("sources"), problems)
    slices = _slices(data.get("slices"), problems)
    problems.extend(_combinations(values))
    problems.extend(_dataset_place(dataset))
    problems.extend(_missing(data, needed))
    if problems:
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{origin} has {count}:\n" + "\n".join(f"- {p}" for p in problems))
    return Params(**values, sources=sources, slices=slices)


def _dataset_place(dataset: Any) -> Iterator[str]:
    folder = PurePosixPath(posixpath.normpath(dataset.dir if dataset else "data"))
    if set(folder.parts) <= {".."} or folder.parts[0] in OWN_FOLDERS:
        yield (
            f"dataset.dir: {dataset.dir} holds code or results of the pipeline; put the dataset "
            "into a folder of its own, for example data/mine."
        )


def _section(name: str, kind: type[StrictConfig], data: Any, problems: list[str]) -> Any:
    """The checked section, or None if it has mistakes, which are added to `problems`."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        problems.append(f"{name}: expected fields with values, found {data!r}.")
        return None
    known = {key: value for key, value in data.items() if key in kind.model_fields}
    wrong = [
        unknown_name(str(key), f"{name}.", kind.model_fields) for key in data if key not in known
    ]
    section = None
    try:
        section = kind(**known)
    except ValidationError as error:
        wrong.extend(_texts(name, error))
    problems.extend(wrong)
    return None if wrong else section


def _sources(data: Any, problems: list[str]) -> dict[str, SourceSettings]:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        problems.append(f"sources: expected names with their settings, found {data!r}.")
        return {}
    for key in data:
        if not isinstance(key, str) or not re.fullmatch(SOURCE_NAME, key):
            problems.append(
                f"sources: the name {key!r} must consist of letters, digits, '-' "
                "and '_' and begin with a letter or digit."
            )
        elif key == "demo":
            problems.append("sources.demo: the stage demo writes data/demo; choose another name.")
    return {
        str(key): _section(f"sources.{key}", SourceSettings, value, problems)
        for key, value in data.items()
    }


def _slices(data: Any, problems: list[str]) -> dict[str, str]:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        problems.append(f"slices: expected names with their rules, found {data!r}.")
        return {}
    for key, value in data.items():
        if not isinstance(key, str) or not re.fullmatch(SLICE_NAME, key):
            problems.append(
                f"slices: the name {key!r} must consist of letters, digits, '-', '_' and '.', and "
                "begin with a letter or digit."
            )
        try:
            parse_rule(str(key), value)
        except InputError as error:
            problems.append(f"slices.{key}: {error} (found {value!r}).")
    return {str(key): str(value) for key, value in data.items()}


def read_graph(file: Path) -> dict[str, dict[str, Any]]:
    """The stages of a dvc.yaml. Raises ConfigError if it holds no stages."""
    found = read_yaml(file)
    stages = found.get("stages") if isinstance(found, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise ConfigError(
            f"{file} has no `stages` with a mapping each. Restore it with `git checkout "
            f"{file.name}`."
        )
    return stages


def _needed_by(stages: dict[str, dict[str, Any]]) -> set[str]:
    """The sections and `section.field`s that a dvc.yaml tracks, or uses as `${section.field}`."""
    names: set[str] = set()
    for stage in stages.values():
        body = stage.get("do", stage)
        tracked = body.get("params") if isinstance(body, dict) else None
        names.update(name for name in tracked or [] if isinstance(name, str))
        names.update(re.findall(r"\$\{(.+?)\}", json.dumps(stage)))
    fields = {f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.model_fields}
    used = names & fields
    complete = names & {*MAPPINGS, *SECTIONS}
    implied = {name.partition(".")[0] for name in used}
    return used | (complete - implied)


def _missing(data: dict[str, Any], needed: Iterable[str]) -> list[str]:
    """A message about what of `needed` is not in `data`, and what to add."""
    add: dict[str, str] = {}
    for name in sorted(needed):
        section, _, field = name.partition(".")
        value = data.get(section)
        if field and not (isinstance(value, dict) and field in value):
            default = json.dumps(SECTIONS[section].model_fields[field].default)
            add[name] = f"`{section}: {{{field}: {default}}}`"
        elif section not in data or (section in MAPPINGS and value is None):
            add[name] = f"`{section}: {{}}`"
    if not add:
        return []
    return [f"missing here, but read by dvc.yaml: {', '.join(add)}. Add {', '.join(add.values())}."]


def _texts(name: str, error: ValidationError) -> list[str]:
    texts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in (name, *item["loc"]))
        text = item["msg"].removeprefix("Value error, ")
        found = f" (found {item['input']!r})" if item["loc"] else ""
        texts.append(f"{where}: {text.removesuffix('.')}{found}.")
    return texts


def unknown_name(name: str, prefix: str, known: Any) -> str:
    """The message about an unknown section or field, with the nearest known name."""
    if reason := SET_ELSEWHERE.get(f"{prefix}{name}"):
        return f"{prefix}{name}: cannot be set here; {reason}."
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    kind = "field" if prefix else "section"
    return f"{prefix}{name}: unknown {kind}.{hint} Known: {', '.join(sorted(known))}."


def _combinations(values: dict[str, Any]) -> list[str]:
    """Mistakes that concern several fields together."""
    problems = []
    model, fit, runtime = values["model"], values["fit"], values["runtime"]
    if model is not None:
        try:
            model.config()
        except ValidationError as error:
            problems.extend(_texts("model", error))
    if fit is not None and runtime is not None and isinstance(runtime.devices, int):
        try:
            plan_batch(fit, runtime.devices * runtime.nodes)
        except ConfigError as error:
            problems.append(str(error))
    evaluation, gate = values["evaluate"], values["gate"]
    if evaluation is not None and gate is not None and evaluation.operating_point is None:
        needed = []
        if gate.metric == "f1_at_point":
            needed.append("gate.metric: f1_at_point needs")
        if gate.max_false_alarms_per_image is not None:
            needed.append("gate.max_false_alarms_per_image: needs")
        problems += [f"{text} evaluate.operating_point, for example f1." for text in needed]
    if runtime is not None and runtime.nodes > 1 and not runtime.rendezvous:
        problems.append("runtime.rendezvous: nodes > 1 require host:port of the first node.")
    return problems
