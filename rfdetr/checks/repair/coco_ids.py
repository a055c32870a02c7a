"""Integer ids for COCO records whose ids are text, missing or used twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from rfdetr.data.folders import fold

Record = dict[str, Any]


def is_id(value: Any) -> TypeGuard[float]:
    """Whether training reads the value as an id."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == value // 1 and -(2**63) <= value < 2**63


class IdMap:
    """Integer ids for records, and what references to them become.

    Integers stay. A text that is a free integer becomes that integer, any other text a new one.
    `names` are the second way to refer to a record: a unique name -> its id as given.
    """

    def __init__(self, ids: Iterable[Any], names: Mapping[str, Any]) -> None:
        given: list[Any] = list(
            dict.fromkeys(value for value in ids if isinstance(value, Hashable))
        )
        self._taken = {int(value) for value in given if is_id(value)}
        self._next: int = 1 + max([0, *(number for number in self._taken if number < 2**62)])
        self._new: dict[str, int] = {}
        texts = [str(value).strip() for value in given if _is_odd(value)]
        for text in texts:
            if re.fullmatch("[0-9]{1,18}", text) and int(text) not in self._taken:
                self._new[text] = int(text)
                self._taken.add(int(text))
        for text in texts:
            if text not in self._new:
                self._new[text] = self.free()
        self._names = {name: self.of_record(value) for name, value in names.items()}

    def free(self) -> int:
        """An id that is not used yet; it is used from now on."""
        while self._next in self._taken:
            self._next += 1
        self._taken.add(self._next)
        return self._next

    def of_record(self, value: Any) -> Any:
        """The id that a record gets instead of `value`."""
        return self._new[str(value).strip()] if _is_odd(value) else value

    def of_reference(self, value: Any) -> Any:
        """What a reference becomes; the value itself if it refers to nothing."""
        if is_id(value) and int(value) in self._taken:
            return value
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            return value
        text = str(value).strip()
        if text in self._new:
            return self._new[text]
        if re.fullmatch("[0-9]{1,18}", text) and int(text) in self._taken:
            return int(text)
        return self._names.get(text, value)


def _is_odd(value: Any) -> bool:
    """Whether the value identifies a record but is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    return not is_id(value) and bool(str(value).strip()) and str(value) != "nan"


def unique_names(
    records: Iterable[Record], key: str, forms: Callable[[str], Iterable[str]]
) -> dict[str, Any]:
    """Every form of a record's name that only one record has -> the id of the record."""
    pairs = [
        (form, record.get("id"))
        for record in records
        if isinstance(record.get(key), str) and record.get("id") is not None
        for form in dict.fromkeys(forms(record[key]))
    ]
    counts = Counter(form for form, _ in pairs)
    return {form: number for form, number in pairs if counts[form] == 1}


def number_annotations(records: Iterable[Record]) -> int:
    """Give new ids to annotations whose id is missing, not an integer, 0 or used before."""
    used: set[int] = set()
    without = []
    for record in records:
        number = record.get("id")
        if is_id(number) and int(number) != 0 and int(number) not in used:
            used.add(int(number))
        else:
            without.append(record)
    following = max([0, *(number for number in used if number < 2**62)]) + 1
    for record in without:
        record["id"] = following
        following += 1
    return len(without)


def agree_on_categories(splits: Sequence[tuple[list[Record], list[Record]]]) -> list[int]:
    """Give the categories of each split the ids and names that they have in the first one.

    `splits` are categories and annotations, changed in place. Categories are matched by name,
    without regard to case and outer spaces, and only where all of a split are known in the first.
    Returns how many changed per split.
    """
    changed = [0] * len(splits)
    first = _by_name(splits[0][0]) if splits else None
    for number, (categories, rows) in enumerate(splits[1:], 1):
        own = _by_name(categories)
        if first is None or own is None or not own.keys() <= first.keys():
            continue
        new = {hashable(record.get("id")): first[name] for name, record in own.items()}
        different = [
            record
            for name, record in own.items()
            if (record.get("id"), record.get("name"))
            != (first[name].get("id"), first[name]["name"])
        ]
        if not different or len(new) < len(own):
            continue
        for annotation in rows:
            category = new.get(hashable(annotation.get("category_id")))
            if category is not None:
                annotation["category_id"] = category.get("id")
        for name, record in own.items():
            record.update(id=first[name].get("id"), name=first[name]["name"])
        changed[number] = len(different)
    return changed


def _by_name(categories: Sequence[Record]) -> dict[str, Record] | None:
    """Categories by their folded names; None if a name is missing or used twice."""
    names = [record.get("name") for record in categories]
    folded = [fold(name.strip()) if isinstance(name, str) else "" for name in names]
    if "" in folded or len(set(folded)) < len(folded):
        return None
    return dict(zip(folded, categories, strict=True))


def hashable(value: Any) -> Any:
    """A form of an id that can be a key."""
    return value if isinstance(value, int | float | str) else repr(value)
