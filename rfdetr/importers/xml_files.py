"""XML files of strangers: no document type, no entities, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from rfdetr.errors import DatasetError
from rfdetr.importers.records import Collection, SourceFiles


class XmlError(DatasetError):
    """An XML file that is not valid or not safe; `reason` is a short clause."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}.")
        self.reason = reason


def roots(files: SourceFiles, tag: str, found: Collection) -> Iterator[tuple[str, Element]]:
    """Name and root element of every file whose root is `tag`; `found` counts invalid files."""
    for name in files.with_suffix(".xml"):
        try:
            root = read_xml(files.path(name))
        except XmlError as error:
            found.skip(f"XML files that are not valid ({error.reason})", name)
            continue
        if root.tag == tag:
            yield name, root


def read_xml(path: Path) -> Element:
    """The root element. Raises XmlError."""
    try:
        root: Element = parse(path, forbid_dtd=True).getroot()
    except DefusedXmlException:
        raise XmlError(path, "a document type or entities, which can be an attack") from None
    except (ParseError, ValueError, LookupError, OSError) as error:
        raise XmlError(path, f"{error}") from None
    return root
