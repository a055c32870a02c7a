"""Configurations that refuse unknown fields with the nearest known name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rfdetr import compat
from rfdetr.errors import ConfigError


def as_text(value: Any) -> Any:
    """The text of a path; any other value as it is."""
    return str(value) if isinstance(value, os.PathLike) else value


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def device_text(value: Any) -> Any:
    """The text of a torch.device or of the number of a GPU; any other value as it is.

    Text is in lower case.
    """
    if type(value) is int:
        return f"cuda:{value}"
    if isinstance(value, str):
        return value.lower()
    kind = type(value)  # a torch.device, recognised without importing torch
    return str(value) if (kind.__module__, kind.__name__) == ("torch", "device") else value


PathText = Annotated[str, BeforeValidator(as_text)]


class StrictConfig(BaseModel):
    """A pydantic model that refuses unknown fields by name, at construction and on assignment.

    `not_offered` are fields of the public package: a value that asks for nothing is dropped, for
    any other the text says what to do instead.
    """

    not_offered: ClassVar[compat.Missing] = {}
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data, refused = compat.drop_neutral(data, cls.not_offered)
            unknown = [name for name in data if name not in cls.model_fields]
            if unknown or refused:
                texts = [cls._unknown_text(unknown)] if unknown else []
                raise ValueError(" ".join([*refused, *texts]))
        return data

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a validated field; an unknown one raises ValueError."""
        if not name.startswith("_") and name not in type(self).model_fields:
            _, refused = compat.drop_neutral({name: value}, self.not_offered)
            raise ConfigError(" ".join([*refused, self._unknown_text([name])]))
        kept, kept_set = dict(self.__dict__), set(self.model_fields_set)
        try:
            super().__setattr__(name, value)
        except ValueError:  # checks across fields run after pydantic has stored the value
            self.__dict__.update(kept)
            self.model_fields_set.intersection_update(kept_set)
            raise

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                return super().__getattr__(name)
            advice = self.not_offered.get(name, ((), ""))[1]
            raise AttributeError(f"{advice} {self._unknown_text([name])}".strip())

    @classmethod
    def hint_for(cls, name: str) -> str | None:  # noqa: ARG003
        """What to do with an unknown field that is a setting of another object."""
        return None

    @classmethod
    def _unknown_text(cls, unknown: list[str]) -> str:
        parts = []
        hints = {name: cls.hint_for(name) for name in unknown}
        for name, hint in hints.items():
            parts.append(f"'{name}'{'' if hint else compat.nearest(str(name), cls.model_fields)}")
        known = ", ".join(sorted(cls.model_fields))
        advice = [hint for hint in hints.values() if hint]
        return " ".join(
            [f"{cls.__name__} has no field {', '.join(parts)}.", *advice, f"Known fields: {known}."]
        )


def optional_fields(config_class: type[BaseModel], *names: str) -> dict[str, Any]:
    """Definitions of the named fields for `pydantic.create_model`, with None for "not set".

    Types and constraints are those of `config_class`.
    """
    fields = {name: config_class.model_fields[name] for name in names}
    return {
        name: (
            Annotated[field.annotation, Field(), *field.metadata] | None,
            Field(None, description=field.description),
        )
        for name, field in fields.items()
    }
