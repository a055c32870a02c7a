"""What `retrain` says at its end."""

from __future__ import annotations

from flows.release.registration import Registered
from flows.release.summary import _commands


def test_commands_that_need_a_champion_are_told_only_with_one() -> None:
    registered = Registered(
        name="trees",
        number=1,
        run_id="r",
        model_id="m",
        experiment="1",
        uri="sqlite:////my data/mlflow.db",
        export_parity=None,
    )
    told = [_commands(registered, served=served) for served in (True, False)]
    starts = [[line.split(" ")[0] for line in lines] for lines in told]
    assert starts == [["predict", "serve", "experiments", ""], ["experiments", ""]]
    assert "'sqlite:////my data/mlflow.db'" in told[1][0]
