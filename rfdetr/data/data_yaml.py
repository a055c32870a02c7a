"""The keys of a YOLO data.yaml: class names and keypoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rfdetr.data.text import read_text
from rfdetr.errors import DatasetError

YAML_TEXT, YAML_NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


def read_data_yaml(path: Path) -> dict[str, Any]:
    """The content of a data.yaml. Raises DatasetError."""
    try:
        content = parse_yaml(read_text(path))
    except UnicodeError as error:
        raise DatasetError(f"{path}: {error}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DatasetError(f"{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected keys such as names: and train:, found {content!r}.")
    return content


def parse_yaml(text: str) -> Any:
    """The content of a data.yaml, with class names as written: yes, no, on and 01 are names.

    Raises the errors of `yaml.safe_load`.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _mark_names_as_text(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _mark_names_as_text(document: yaml.Node | None) -> None:
    if not isinstance(document, yaml.MappingNode):
        return
    for key, value in document.value:
        if key.value != "names" or not isinstance(value, yaml.CollectionNode):
            continue
        mapping = isinstance(value, yaml.MappingNode)
        for name in [pair[1] for pair in value.value] if mapping else value.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != YAML_NULL:
                name.tag = YAML_TEXT


def class_names(content: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    """The `names` list, or the values of a `names` mapping with the keys 0..N-1."""
    names = content.get("names")
    if isinstance(names, dict):
        names = {_as_number(key): name for key, name in names.items()}
        keys = list(range(len(names)))
        if (
            any(isinstance(k, bool) or not isinstance(k, int) for k in names)
            or sorted(names) != keys
        ):
            problems.append(
                f"the keys of names: must be 0..{len(names) - 1}, found {list(names)[:20]}."
            )
            return ()
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not names:
        found = f"found {names!r}" if "names" in content else "the key is missing"
        problems.append(f"names: must be a list of class names, {found}.")
        return ()
    if any(isinstance(n, dict | list) or n is None or not str(n).strip() for n in names):
        problems.append(f"names: must contain only strings that are not empty, found {names!r}.")
    count = content.get("nc")
    if count is not None and _as_number(count) != len(names):
        problems.append(
            f"nc: is {count!r} but names: has {len(names)} entries; correct one of them."
        )
    return tuple(str(name) for name in names)


def _as_number(value: Any) -> Any:
    """An integer that is written as text, or the value itself."""
    written = isinstance(value, str) and value.isascii() and value.isdigit()
    return int(value) if written and len(value) < 10 else value


def keypoint_values(content: Mapping[str, Any], problems: list[str]) -> int:
    """Numbers per object that `kpt_shape: [keypoints, 2 or 3]` puts behind the box."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if (
        not isinstance(shape, list)
        or [type(value) for value in shape] != [int, int]
        or shape[0] < 1
        or shape[1] not in (2, 3)
    ):
        problems.append(f"kpt_shape: must be [number of keypoints, 2 or 3], found {shape!r}.")
        return 0
    return int(shape[0] * shape[1])
