"""Changes to params.yaml, from Prefect's form or the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from ruamel.yaml import YAML

from flows.config.params import PARAMS_FILE, SECTIONS, parse_params
from flows.config.sections import NumberChecks
from flows.core.files import read_yaml
from rfdetr.config import optional_fields
from rfdetr.files import atomic_path


class _Partial(NumberChecks):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def overrides_model() -> type[BaseModel]:
    """A model with all sections and fields of params.yaml, each optional, for Prefect's form."""
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        partial = create_model(
            kind.__name__.replace("Settings", "Overrides"),
            __base__=_Partial,
            __doc__=f"Fields of {kind.__name__} to change; an empty one keeps params.yaml's value.",
            **optional_fields(kind, *kind.model_fields),
        )
        # A field called `validate` would hide a method of BaseModel, so it has an alias.
        field = f"{name}_" if name == "validate" else name
        sections[field] = (partial, Field(default_factory=partial, alias=name))
    config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)
    return create_model("Overrides", __config__=config, **sections)


if TYPE_CHECKING:
    Overrides = BaseModel
else:
    Overrides = overrides_model()


class RetrainParams(BaseModel):
    """What a user can choose when starting the flow `retrain`."""

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
        default=False, description="Do nothing if a model of this dataset was judged before"
    )

    def changes(self) -> dict[str, dict[str, Any]]:
        """The given fields per section, without empty fields whose value cannot be null."""
        given: dict[str, dict[str, Any]] = {}
        for name, section in self.overrides.model_dump(exclude_unset=True, by_alias=True).items():
            fields = {k: v for k, v in section.items() if v is not None or takes_null(name, k)}
            if fields:
                given[name] = fields
        return given


def takes_null(section: str, field: str) -> bool:
    """Whether null is a valid value of the field; a form also uses it for 'not set'."""
    annotation: Any = SECTIONS[section].model_fields[field].annotation
    try:
        TypeAdapter(annotation).validate_python(None)
    except ValidationError:
        return False
    return True


def write_overrides(root: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write changes into params.yaml of `root`, keeping comments and order.

    The result is checked first: if it has mistakes, one ConfigError lists them all and nothing is
    written.
    """
    if not changes:
        return
    file = root / PARAMS_FILE
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1 << 16  # do not wrap lines
    with open(file, encoding="utf-8") as stream:
        data = editor.load(stream) or {}
    for section, fields in changes.items():
        if data.get(section) is None:
            data[section] = {}
        data[section].update(fields)
    with atomic_path(file) as temporary:
        with open(temporary, "w", encoding="utf-8") as stream:
            editor.dump(data, stream)
        parse_params(read_yaml(temporary), origin=str(file))
