"""Ten ways past the gates, and what becomes of each: refused, or noticed and shown."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from benchmarks.promotion_races import project, run_rounds
from orchestration import promotion_log
from orchestration.cli import app
from orchestration.evidence import GateFailed
from orchestration.model_assets import GATED, build_alias_sensor, build_model_assets, champion_was_gated
from orchestration.promotion import Promotion, promote, rollback
from orchestration.promotion_log import HISTORY, PENDING, read_history
from orchestration.registry import CHALLENGER, CHAMPION, EXPORT, GATES, PREVIOUS, Registry, Untrusted, register_export
from runtime.files import read_json, tensors_digest
from tests.orchestration.conftest import Toy, failure_text
from tests.orchestration.promoting import (
    SAMPLES,
    NothingChanged,
    aliases,
    challenge,
    edit_gates,
    open_registry,
    record,
    refused,
    second_model,
    weights_of,
)
from tests.orchestration.toy import write_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _challenged_once(finished: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = Toy(tmp_path_factory.mktemp("challenged") / "toy")
    shutil.copytree(finished.root, toy.root, symlinks=True)
    second_model(toy)
    challenge(toy)
    return toy


@pytest.fixture
def challenged(_challenged_once: Toy, tmp_path: Path) -> Toy:
    """Version 1 is champion, and version 2 a challenger that passes every gate."""
    shutil.copytree(_challenged_once.root, tmp_path / "challenged", symlinks=True)
    return Toy(tmp_path / "challenged")


def materialize_champion(toy: Toy) -> dg.ExecuteInProcessResult:
    """As somebody who clicks on this one asset."""
    assets, checks = build_model_assets(toy.root)
    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize([*assets, *checks], selection="champion", resources={"dvc": toy.dvc}, instance=instance, raise_on_error=False)


class TestMaterializingTheChampionAlone:
    def test_after_a_check_has_failed_the_asset_refuses_by_itself(self, copy: Toy):
        second_model(copy, strict=0.25)
        challenge(copy)
        before = aliases(copy)
        result = materialize_champion(copy)
        assert not result.success and "0.25 is more than 0.05 below the champion's 0.5" in failure_text(result, "champion")
        assert aliases(copy) == before and len(read_history(copy.root)) == 1

    def test_a_half_scored_evaluation_whose_check_nobody_ran_is_no_pass(self, copy: Toy):
        verdicts = read_json(copy.root / SAMPLES)
        verdicts["text_to_image"] = verdicts["text_to_image"][:4]
        (copy.root / SAMPLES).write_text(str(verdicts).replace("'", '"').replace("True", "true").replace("False", "false"))
        record(copy)
        result = materialize_champion(copy)
        assert not result.success and "4 samples were scored, the evaluation set has 8" in failure_text(result, "champion")


class TestTheGateFile:
    def test_missing_gates_are_no_pass(self, copy: Toy):
        (copy.root / GATES).unlink()
        refused(copy, "gates.json is missing")

    @pytest.mark.parametrize("content", ['{"gates": 1}', '{"model_digest": "x", "evaluation_set_digest": "x", "gates": [1]}'])
    def test_unreadable_gates_are_no_pass(self, copy: Toy, content: str):
        (copy.root / GATES).write_text(content)
        refused(copy, "can't be read")

    def test_an_edit_is_noticed(self, copy: Toy):
        edit_gates(copy, strict=0.99)
        refused(copy, "is not what dvc.lock recorded")

    def test_an_edit_that_dvc_was_told_to_record_is_not_what_was_scored(self, copy: Toy):
        edit_gates(copy, strict=0.75)
        record(copy)
        refused(copy, "the gate says 0.75, of its 8 samples 4 are right", NothingChanged(copy.root))

    def test_nan_that_was_recorded_is_no_pass(self, copy: Toy):
        edit_gates(copy, strict=math.nan)
        record(copy)
        refused(copy, "measured nan", NothingChanged(copy.root))

    def test_gates_of_other_weights_are_no_pass(self, copy: Toy):
        edit_gates(copy, model_digest="0" * 64)
        refused(copy, "measured on weights 000000000000", NothingChanged(copy.root))


class TestReplayedGates:
    def test_good_gates_of_an_earlier_model_put_back_with_their_lock_do_not_carry_a_later_one(self, copy: Toy):
        kept = {path: (copy.root / path).read_bytes() for path in (GATES, SAMPLES, Path("dvc.lock"))}
        second_model(copy, strict=0.25)
        challenge(copy)
        for path, content in kept.items():
            (copy.root / path).write_bytes(content)
        refused(copy, "is not what dvc.lock recorded|the gates were measured on weights")
        refused(copy, "the gates were measured on weights", NothingChanged(copy.root))

    def test_gates_of_these_weights_measured_in_another_way_are_no_pass(self, copy: Toy):
        copy.edit("sampling_steps: 2", "sampling_steps: 50")
        record(copy)
        assert not promote(copy.root, copy.params, copy.dvc).changed
        copy.edit("sampling_steps: 50", "sampling_steps: 2")
        refused(copy, "evaluation in params.yaml changed since the gates were measured")


class TestSwappedFiles:
    def test_other_weights_are_noticed_even_if_the_tag_is_changed_with_them(self, copy: Toy):
        registry = open_registry(copy)
        write_weights(weights_of(registry, "1"), [1.0, 2.0])
        refused(copy, "its files were changed", NothingChanged(copy.root))
        forged = tensors_digest(weights_of(registry, "1").parent.parent)
        registry.client.set_model_version_tag("deepgen", "1", "model_digest", forged)
        refused(copy, "the gates were measured on weights", NothingChanged(copy.root))
        assert "is tagged with weights" in (champion_was_gated(copy.root)[1]["why not"] or "")

    def test_settings_and_code_beside_the_weights_are_held_as_well(self, copy: Toy):
        registry = open_registry(copy)
        folder = weights_of(registry, "1").parent.parent
        (folder / "model_index.json").write_text("{}")
        refused(copy, "settings or code beside its weights", NothingChanged(copy.root))

    @pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]"])
    def test_weights_that_cannot_be_read_are_no_pass(self, copy: Toy, damage: bytes):
        weights_of(open_registry(copy), "1").write_bytes(damage)
        refused(copy, "its files were changed", NothingChanged(copy.root))

    def test_the_same_weights_registered_again_replace_a_damaged_version(self, copy: Toy):
        registry = open_registry(copy)
        write_weights(weights_of(registry, "1"), [1.0, 2.0])
        version, new = register_export(copy.root, copy.params, copy.dvc)
        assert new and str(version.version) == "2"
        assert promote(copy.root, copy.params, NothingChanged(copy.root)).version == "2"
        with pytest.raises(Untrusted, match="its files were changed"):
            rollback(copy.root, copy.params)
        assert aliases(copy) == {CHALLENGER: "2", CHAMPION: "2", PREVIOUS: "1"}

    def test_a_pickle_among_them_is_neither_promoted_nor_served_nor_registered(self, copy: Toy, monkeypatch: pytest.MonkeyPatch):
        registry = open_registry(copy)
        pickle = weights_of(registry, "1").with_name("extra.bin")
        pickle.write_bytes(b"anything")
        refused(copy, "extra.bin is or names a pickle", NothingChanged(copy.root))
        monkeypatch.chdir(copy.root)
        served = CliRunner().invoke(app, ["generate", "a red circle", "--out", "x.png"])
        assert isinstance(served.exception, Untrusted) and "extra.bin" in str(served.exception)
        (copy.root / EXPORT / "extra.bin").write_bytes(b"anything")
        with pytest.raises(Untrusted, match="extra.bin is a pickle"):
            register_export(copy.root, copy.params, copy.dvc)


class TestStaleEvaluationSet:
    def test_another_set_than_the_measured_one_is_no_pass(self, copy: Toy):
        copy.edit("parts: [evaluation_text_to_image, evaluation_image_edit]", "parts: [evaluation_text_to_image]")
        refused(copy, "on evaluation set", NothingChanged(copy.root))

    def test_a_damaged_shard_is_no_pass(self, copy: Toy):
        shard = copy.root / "outputs" / "shards" / "evaluation_image_edit" / "shard-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1])
        refused(copy, "can't be trusted", NothingChanged(copy.root))


class TestAnAliasMovedByHand:
    @pytest.fixture
    def moved(self, copy: Toy) -> Toy:
        """Version 2 is worse than champion 1, and somebody made it champion in MLflow's UI."""
        second_model(copy, strict=0.25)
        challenge(copy).point(CHAMPION, "2")
        return copy

    def test_it_fails_its_check_and_every_command_says_so(self, moved: Toy, monkeypatch: pytest.MonkeyPatch):
        passed, facts = champion_was_gated(moved.root)
        assert not passed and "version 2 was made champion by hand" in (facts["why not"] or "")
        monkeypatch.chdir(moved.root)
        monkeypatch.setattr("subprocess.run", lambda *_, **__: type("Done", (), {"returncode": 0}))
        for command in (["generate", "a red circle", "--out", "x.png"], ["rollback", "--reason", "it draws worse"]):
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 0 and done.stderr.count("\n") == 1, done.output
            assert done.stderr.startswith("warning: version 2 was made champion by hand, past the gates")
        row = read_history(moved.root)[-1]
        assert (row["version"], row["via"], row["reason"]) == ("1", "cli", "it draws worse") and "by hand" in row["notes"][0]
        assert champion_was_gated(moved.root)[0]

    def test_it_does_not_lower_the_bar_for_the_next_one(self, moved: Toy):
        second_model(moved, strict=0.375, seed=3.0)
        challenge(moved)
        said = refused(moved, "0.375 is more than 0.05 below the champion's 0.5", NothingChanged(moved.root))
        assert "version 2 was made champion by hand" in said and "yardstick are the values of version 1" in said
        second_model(moved, strict=0.5, seed=4.0)
        challenge(moved)
        done = promote(moved.root, moved.params, NothingChanged(moved.root))
        assert done.changed and "by hand" in done.message and "by hand" in read_history(moved.root)[-1]["notes"][0]
        assert aliases(moved) == {CHALLENGER: "4", CHAMPION: "4", PREVIOUS: "1"}

    def test_the_way_back_leads_to_what_was_promoted_whatever_its_alias_says(self, moved: Toy):
        registry = open_registry(moved)
        registry.point(PREVIOUS, "2")
        registry.point(CHAMPION, "1")
        with pytest.raises(GateFailed, match="no previous champion"):
            rollback(moved.root, moved.params)

    def test_tags_edited_by_hand_do_not_lower_the_bar(self, copy: Toy):
        open_registry(copy).tag(open_registry(copy).get("1"), {"gate.text_to_image": "0.0", "gate.image_edit": "0.0"})
        second_model(copy, strict=0.25)
        challenge(copy)
        refused(copy, "below the champion's 0.5", NothingChanged(copy.root))

    def test_a_log_whose_values_were_edited_shows(self, copy: Toy):
        log = copy.root / HISTORY
        log.write_text(log.read_text().replace('"value": 0.5', '"value": 0.0'))
        passed, facts = champion_was_gated(copy.root)
        assert not passed and "edited by hand" in (facts["why not"] or "")

    def test_the_sensor_shows_it_once(self, challenged: Toy):
        sensor = build_alias_sensor(challenged.root)
        assert sensor.default_status == dg.DefaultSensorStatus.STOPPED

        def tick(cursor: str | None) -> Any:
            with dg.DagsterInstance.ephemeral() as instance:
                return sensor(dg.build_sensor_context(instance, cursor=cursor))

        first = tick(None)
        assert [event.passed for event in first.asset_events] == [True]
        assert isinstance(tick(first.cursor), dg.SkipReason)
        open_registry(challenged).point(CHAMPION, "2")
        (shown,) = tick(first.cursor).asset_events
        assert (shown.asset_key, shown.check_name, shown.passed) == (dg.AssetKey(CHAMPION), GATED, False)
        assert "by hand" in shown.description
        with dg.DagsterInstance.ephemeral() as instance:
            instance.report_runless_asset_event(shown)
            key = dg.AssetCheckKey(dg.AssetKey(CHAMPION), GATED)
            (seen,) = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).values()
            assert seen.status.value == "FAILED"
        assert GATED in {check.name for checks in build_model_assets(challenged.root)[1] for check in checks.check_specs}

    def test_a_store_that_does_not_answer_is_not_taken_for_one_without_a_champion(self, copy: Toy, monkeypatch: pytest.MonkeyPatch):
        from mlflow.exceptions import MlflowException

        registry = open_registry(copy)

        def locked(*_: Any) -> None:
            raise MlflowException("database is locked")

        monkeypatch.setattr(type(registry.client), "get_model_version_by_alias", locked)
        with pytest.raises(MlflowException, match="locked"):
            registry.by_alias(CHAMPION)


class TestADeletedChampion:
    @pytest.fixture
    def deleted(self, copy: Toy) -> Toy:
        """Version 2 was promoted with 0.75 over version 1 with 0.5; then it was deleted in MLflow, and its alias with it."""
        second_model(copy, strict=0.75)
        registry = challenge(copy)
        promote(copy.root, copy.params, NothingChanged(copy.root))
        registry.client.delete_model_version("deepgen", "2")
        return copy

    def test_it_is_told_and_the_bar_stays_where_it_was(self, deleted: Toy):
        assert aliases(deleted) == {PREVIOUS: "1"}
        passed, facts = champion_was_gated(deleted.root)
        assert not passed and "version 2, the last one promoted, was deleted by hand" in (facts["why not"] or "")
        second_model(deleted, strict=0.5, seed=3.0)
        challenge(deleted)
        said = refused(deleted, "0.5 is more than 0.05 below the champion's 0.75", NothingChanged(deleted.root))
        assert "was deleted by hand" in said

    def test_a_rollback_still_brings_one_back(self, deleted: Toy):
        assert rollback(deleted.root, deleted.params).version == "1"
        assert aliases(deleted) == {CHAMPION: "1", PREVIOUS: "1"}
        assert champion_was_gated(deleted.root)[0]

    def test_files_that_were_deleted_are_told(self, challenged: Toy):
        promote(challenged.root, challenged.params, NothingChanged(challenged.root))
        folder = weights_of(open_registry(challenged), "1").parents[3]
        folder.rename(folder.with_name("away"))
        with pytest.raises(Untrusted, match="its files are gone"):
            rollback(challenged.root, challenged.params)
        assert aliases(challenged)[CHAMPION] == "2"


class Killed(BaseException):
    """As if the process were no more: no handler of ours sees it."""


class TestAKill:
    def test_between_version_and_alias_leaves_no_second_version(self, copy: Toy, monkeypatch: pytest.MonkeyPatch):
        second_model(copy)
        kill_at(monkeypatch, Registry, "point", 0)
        with pytest.raises(Killed):
            register_export(copy.root, copy.params, copy.dvc)
        monkeypatch.undo()
        assert aliases(copy)[CHALLENGER] == "1" and len(open_registry(copy).versions()) == 2
        refused(copy, "the gates were measured on weights", NothingChanged(copy.root))
        version, new = register_export(copy.root, copy.params, copy.dvc)
        assert not new and aliases(copy)[CHALLENGER] == str(version.version) == "2" and len(open_registry(copy).versions()) == 2

    @pytest.mark.parametrize(
        ("event", "moment"),
        [
            ("promotion", "before the first alias"),
            ("promotion", "between the aliases"),
            ("promotion", "before the row"),
            ("promotion", "in the row"),
            ("promotion", "after the row"),
            ("rollback", "between the aliases"),
            ("rollback", "before the row"),
        ],
    )
    def test_at_any_moment_of_a_move_is_mended_by_the_next_call(
        self, challenged: Toy, monkeypatch: pytest.MonkeyPatch, event: str, moment: str
    ):
        dvc = NothingChanged(challenged.root)
        if event == "rollback":
            promote(challenged.root, challenged.params, dvc)

        def act() -> Promotion:
            arguments = (challenged.root, challenged.params)
            return promote(*arguments, dvc) if event == "promotion" else rollback(*arguments)

        rows = len(read_history(challenged.root))
        if moment == "in the row":
            monkeypatch.setattr(promotion_log, "append_row", torn_row)
        elif moment == "before the row":
            kill_at(monkeypatch, promotion_log, "append_row", 0)
        elif moment == "after the row":
            kill_at(monkeypatch, Path, "unlink", 0)
        else:
            kill_at(monkeypatch, Registry, "point", ["before the first alias", "between the aliases"].index(moment))
        with pytest.raises(Killed):
            act()
        monkeypatch.undo()
        assert "was interrupted" in (champion_was_gated(challenged.root)[1]["why not"] or ""), "until then it shows"
        done = act()
        champion, before = ("2", "1") if event == "promotion" else ("1", "2")
        assert done.version == champion and aliases(challenged) == {CHALLENGER: "2", CHAMPION: champion, PREVIOUS: before}
        history = read_history(challenged.root)
        assert [row["version"] for row in history[rows:]] == [champion] and history[-1]["event"] == event
        assert not (challenged.root / PENDING).exists() and champion_was_gated(challenged.root)[0]
        assert len(open_registry(challenged).versions()) == 2


def kill_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, turn: int) -> None:
    """The process dies when it calls `name` for the time `turn`, counted from 0."""
    whole, calls = getattr(place, name), iter(range(100))

    def call(*arguments: Any, **more: Any) -> Any:
        if next(calls) == turn:
            raise Killed
        return whole(*arguments, **more)

    monkeypatch.setattr(place, name, call)


def torn_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as handle:
        handle.write('{"event": "promo')
    raise Killed


class TestConcurrency:
    def test_of_two_models_that_are_promoted_at_once_only_the_measured_one_becomes_champion(self, copy: Toy):
        second_model(copy, strict=0.5, seed=2.0)
        challenge(copy)
        second_model(copy, strict=0.625, seed=3.0)
        registry = challenge(copy)
        dvc = NothingChanged(copy.root)

        def push(number: str) -> list[str]:
            said = []
            for _ in range(5):
                registry.point(CHALLENGER, number)
                try:
                    said.append(promote(copy.root, copy.params, dvc).version)
                except GateFailed as error:
                    said.append(str(error))
            return said

        with ThreadPoolExecutor(2) as threads:
            told = [line for lines in threads.map(push, ["2", "3"]) for line in lines]
        assert {line for line in told if "measured on weights" not in line} == {"3"}
        assert aliases(copy)[CHAMPION] == "3" and [row["version"] for row in read_history(copy.root)] == ["1", "3"]

    @pytest.mark.timeout(1800)
    def test_six_racers_make_one_version_one_promotion_and_one_row_in_each_of_ten_rounds(self, tmp_path: Path):
        rows = run_rounds(project(tmp_path / "project"), rounds=10)
        assert [row["missed"] for row in rows] == [[]] * 10
