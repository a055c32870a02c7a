from __future__ import annotations

from pathlib import Path

import pytest
from prefect.exceptions import ParameterTypeError

from flows.orchestration.limits import slot
from flows.rollback import rollback


@pytest.mark.parametrize("name", ["registry-../../../x", "/x", "registry-a/b", "C:\\x", "x" * 400])
def test_the_name_of_a_slot_never_leads_out_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with slot(name, 1, tmp_path / "a/b/state"):
        pass
    slots = tmp_path / "a/b/state/slots"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and all(file.is_relative_to(slots) for file in files)


def test_a_rollback_refuses_a_name_that_no_model_can_have() -> None:
    assert rollback.validate_parameters({"reason": "x", "name": "a.b"})["name"] == "a.b"
    with pytest.raises(ParameterTypeError, match="name"):
        rollback.validate_parameters({"reason": "x", "name": "x' OR '1"})
