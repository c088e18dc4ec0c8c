"""Landed data: half of it waits, the whole of it is built once, the same again is nothing new."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration import landing
from orchestration.definitions import build_definitions
from orchestration.landing import Found, look_at_landing
from orchestration.pipeline_run import only_one
from runtime.files import read_json
from tests.orchestration.conftest import Toy


@pytest.fixture
def landed(toy: Toy) -> Toy:
    """A toy with a part `own` that reads the snapshot 2026-01 of the landing folder."""
    copy_to(toy, "2026-01", "one")
    toy.edit("landing: null", "landing: landing")
    line = "    own: {source: folder, task: text_to_image, split: train, samples: 8, licence: CC0-1.0, path: landing/own/2026-01, content: "
    toy.edit("  parts:\n    drawn", f"  parts:\n{line}{'f' * 64}}}  # mine\n    drawn")
    return toy


def copy_to(toy: Toy, snapshot: str, content: str, part: str = "own", whole: bool = True) -> Path:
    folder = toy.root / "landing" / part / snapshot
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "pictures" / "a.txt").write_text(content)
    if whole:
        (folder / "_SUCCESS").touch()
    return folder


class Looks:
    """Looks at the landing folder, one after another, each remembering the last."""

    def __init__(self, toy: Toy) -> None:
        self.toy, self.memory = toy, dict[str, dict[str, Any]]()
        self.busy: str | None = None

    def __call__(self) -> Found:
        found = look_at_landing(self.toy.root, self.toy.params, self.memory, lambda: self.busy)
        self.memory = found.after
        return found


def test_a_half_copied_snapshot_waits_for_its_marker_and_then_for_a_second_look(landed: Toy):
    look = Looks(landed)
    (landed.root / "landing" / "own" / "2026-01" / "_SUCCESS").unlink()
    assert look() == Found(None, ("own/2026-01: no _SUCCESS yet",), {})
    copy_to(landed, "2026-01", "one")
    first = look()
    assert first.request is None and "waits for a second look" in first.words[0]
    second = look()
    assert second.request is not None and (second.request.part, second.request.snapshot) == ("own", "2026-01")
    assert look() == Found(None, (), second.after), "one landing is one request"


def test_a_snapshot_that_still_changes_waits_though_its_marker_is_there(landed: Toy):
    look = Looks(landed)
    for number in range(3):
        (landed.root / "landing" / "own" / "2026-01" / f".b.{number}.part").write_text("half")  # as rsync names what it copies
        assert look().request is None
    assert look().request is not None


def test_the_same_content_again_is_nothing_new_and_other_content_is(landed: Toy):
    look = Looks(landed)
    look()
    first = look().request
    copy_to(landed, "2026-02", "one")
    look()
    same = look()
    assert same.request is None and "own/2026-02: the same content as before" in same.words[0]
    for content in ("two", "one"):
        copy_to(landed, "2026-02", content)
        look()
        request = look().request
        assert request is not None and first is not None and request.snapshot == "2026-02" and request.key != first.key
        assert look().request is None


def test_the_ends_of_a_large_file_and_its_size_tell_it_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(landing, "WHOLE_BYTES", 10)
    monkeypatch.setattr(landing, "EDGE_BYTES", 4)
    digests = set()
    for content in ("a" * 12, "b" + "a" * 11, "a" * 11 + "b", "a" * 13):
        (tmp_path / "large.tar").write_text(content)
        digests.add(landing.content_digest(tmp_path))
    assert len(digests) == 4


def test_a_part_that_params_do_not_know_is_told_once_with_what_to_do(landed: Toy):
    look = Looks(landed)
    copy_to(landed, "2026-01", "one", part="nobody")
    look()
    found = look()
    (told,) = [words for words in found.words if words.startswith("nobody/")]
    assert "params.yaml has no part 'nobody'" in told and "--name nobody" in told and "deepgen data add" in told
    assert found.request is not None and found.request.part == "own"
    assert look().words == ()


def test_while_something_is_at_work_and_while_another_part_lands_it_waits(landed: Toy):
    look = Looks(landed)
    copy_to(landed, "2026-01", "one", part="also")
    landed.edit(
        "    own: {", "    also: {source: folder, task: text_to_image, split: train, samples: 8, licence: CC0-1.0, path: x}\n    own: {"
    )
    look.busy = "run 1234 is started"
    look()
    assert "own/2026-01: waits, for run 1234 is started" in look().words
    look.busy = None
    found = look()
    assert found.request is not None and found.request.part == "also"
    assert found.words == ("own/2026-01: waits, for also comes first",)
    after = look().request
    assert after is not None and after.part == "own"


def test_the_sensor_is_there_if_a_folder_is_set_and_off(toy: Toy, landed: Toy):
    assert build_definitions(landed.root).resolve_sensor_def("data_landed").default_status == dg.DefaultSensorStatus.STOPPED
    landed.edit("landing: landing", "landing: null")
    assert "data_landed" not in {sensor.name for sensor in build_definitions(landed.root).sensors}


def test_the_sensor_asks_for_one_run_of_the_part_and_remembers(landed: Toy):
    sensor = build_definitions(landed.root).resolve_sensor_def("data_landed")
    with dg.DagsterInstance.ephemeral() as instance:
        first = sensor.evaluate_tick(context := dg.build_sensor_context(instance, definitions=build_definitions(landed.root)))
        assert first.run_requests == [] and "waits for a second look" in (first.skip_message or "")
        context = dg.build_sensor_context(instance, cursor=first.cursor, definitions=build_definitions(landed.root))
        second = sensor.evaluate_tick(context)
        (request,) = second.run_requests or []
        assert request.partition_key == "own" and request.tags["deepgen/snapshot"] == "2026-01"
        context = dg.build_sensor_context(instance, cursor=second.cursor, definitions=build_definitions(landed.root))
        third = sensor.evaluate_tick(context)
        assert third.run_requests == [] and third.skip_message == "nothing new has landed"


def land(toy: Toy, snapshot: str) -> dg.ExecuteInProcessResult:
    """The run that the sensor asks for."""
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(toy.root).resolve_job_def("land")
        tags = {"deepgen/snapshot": snapshot}
        return job.execute_in_process(instance=instance, partition_key="own", raise_on_error=False, tags=tags)


def test_a_landed_snapshot_is_pinned_and_its_part_alone_is_built_and_no_landed_file_is_touched(landed: Toy):
    copy_to(landed, "2026-02", "two")
    before, files = (landed.root / "params.yaml").read_text(), sorted((landed.root / "landing").rglob("*"))
    assert land(landed, "2026-02").success
    part = landed.params.data.parts["own"]
    assert part.path == "landing/own/2026-02" and part.content not in (None, "f" * 64)
    assert (landed.root / "params.yaml").read_text() == before.replace("2026-01", "2026-02").replace("f" * 64, str(part.content))
    assert [folder.name for folder in (landed.root / "outputs" / "shards").iterdir() if folder.is_dir()] == ["own"]
    assert read_json(landed.root / "outputs" / "shards" / "own" / "manifest.json")["samples"] == 8
    assert sorted((landed.root / "landing").rglob("*")) == files


def test_what_can_not_land_leaves_params_as_they_were_and_says_what_to_do(landed: Toy):
    copy_to(landed, "2026-02", "two")
    before = (landed.root / "params.yaml").read_text()
    with only_one(landed.root):
        assert "works on this clone already" in words_of(land(landed, "2026-02"))
    shutil.rmtree(landed.root / "landing" / "own" / "2026-02")
    assert "has no _SUCCESS" in words_of(land(landed, "2026-02"))
    assert (landed.root / "params.yaml").read_text() == before
    copy_to(landed, "2026-02", "two")
    landed.edit("path: landing/own/2026-01", "path: elsewhere")
    said = words_of(land(landed, "2026-02"))
    assert "data.parts.own.path: 'elsewhere' is no snapshot in" in said and "python -m data land own 2026-02" in said


def words_of(result: dg.ExecuteInProcessResult) -> str:
    assert not result.success
    data = result.failure_data_for_node("shards")
    assert data is not None and data.user_failure_data is not None
    return str(data.user_failure_data.description)
