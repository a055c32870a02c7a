"""What a run changes in params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from ruamel.yaml import YAML

from flows.config.params import PARAMS_FILE, SECTIONS, parse_params
from flows.config.sections import (
    NumberChecks,
)
from rfdetr.config import StrictConfig
from rfdetr.files import atomic_path


class _Partial(NumberChecks):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _optional_fields(kind: type[StrictConfig]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        for extra in field.metadata:
            annotation = Annotated[annotation, extra]
        fields[name] = (Optional[annotation], None)  # noqa: UP045
    doc = f"Fields of {kind.__name__} that a run changes; an empty one keeps params.yaml's value."
    return create_model(
        kind.__name__.replace("Settings", "Overrides"),
        __base__=_Partial,
        __doc__=doc,
        **fields,
    )


if TYPE_CHECKING:

    class Overrides(BaseModel):
        """Sections with the fields that a run changes."""
else:
    Overrides = create_model(
        "Overrides",
        __config__=ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True),
        **{
            f"{name}_" if name == "validate" else name: (
                _optional_fields(kind),
                Field(default_factory=_optional_fields(kind), alias=name),
            )
            for name, kind in SECTIONS.items()
        },
    )


class RetrainParams(BaseModel):
    """What a person may choose when starting the pipeline."""

    model_config = ConfigDict(extra="forbid")

    overrides: Overrides = Field(default_factory=Overrides, title="Changes to params.yaml")
    ref: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$",
        description="Git commit, tag or branch whose stages, data and parameters a worker uses",
    )
    promote: bool = Field(default=True, description="Let the gate's winner become champion")
    publish: bool = Field(default=False, description="Push dvc.lock and params.yaml to a branch")
    only_if_data_changed: bool = Field(
        default=False, description="Do nothing when a model of this dataset was judged already"
    )

    def changes(self) -> dict[str, dict[str, Any]]:
        """The given fields per section: an empty field that cannot be null is left out."""
        given: dict[str, dict[str, Any]] = {}
        for name, section in self.overrides.model_dump(exclude_unset=True, by_alias=True).items():
            fields = {k: v for k, v in section.items() if v is not None or takes_null(name, k)}
            if fields:
                given[name] = fields
        return given


def takes_null(section: str, field: str) -> bool:
    """Whether null is a value of the field, and not only a form's way to leave it out."""
    annotation: Any = SECTIONS[section].model_fields[field].annotation
    try:
        TypeAdapter(annotation).validate_python(None)
    except ValidationError:
        return False
    return True


def write_overrides(root: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a run's changes into params.yaml of `root`; comments and order stay.

    The result is checked first: one ConfigError lists every mistake, and nothing is written.
    """
    if not changes:
        return
    file = root / PARAMS_FILE
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1 << 16  # lines stay whole
    with open(file, encoding="utf-8") as stream:
        data = editor.load(stream) or {}
    for section, fields in changes.items():
        if data.get(section) is None:
            data[section] = {}
        data[section].update(fields)
    with atomic_path(file) as temporary:
        with open(temporary, "w", encoding="utf-8") as stream:
            editor.dump(data, stream)
        parse_params(yaml.safe_load(temporary.read_text(encoding="utf-8")), origin=str(file))
