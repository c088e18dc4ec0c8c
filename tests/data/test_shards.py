import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from data.build import Stopped, build_part
from data.config import DataConfig, ImageRules, PartConfig
from data.loader import read_part
from data.sources import read_record
from runtime.files import sweep_stale
from runtime.published import ShardMismatch, verify_part

EDITS = PartConfig(source="drawn", task="image_edit", split="train", samples=13, seed=4, licence="CC0-1.0")


def settings(part: PartConfig = EDITS, shard_samples: int = 5) -> DataConfig:
    return DataConfig(image_size=64, shard_samples=shard_samples, images=ImageRules(min_side=32), parts={"edits": part})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with its chunks and receipts, as it lies before it is published."""
    folder = tmp_path_factory.mktemp("whole")
    build_part("edits", settings(), folder, folder)
    return folder


@pytest.fixture
def edits(shards: Path, tmp_path: Path) -> Path:
    """A copy of the edits part, to be harmed."""
    return shutil.copytree(shards / "edits", tmp_path / "edits")


def test_the_same_plan_gives_the_same_bytes_whatever_the_workers(whole, tmp_path):
    build_part("edits", settings(), tmp_path, tmp_path, workers=2)
    assert contents(tmp_path) == contents(whole)


def test_a_build_killed_in_the_middle_goes_on_to_the_same_bytes(whole, tmp_path):
    build = shutil.copytree(whole, tmp_path / "edits")
    for name in ("manifest.json", "index.npy", "rows.parquet", "shard-000002.json", "chunk-000001.json"):
        (build / name).unlink()  # killed between a tar, or a chunk, and its receipt
    for name in ("shard-000001.tar", "chunk-000002.bin"):  # and files that the disk lost half of
        content = (build / name).read_bytes()
        (build / name).write_bytes(content[: len(content) // 2])
    kept = [(build / name).stat().st_mtime_ns for name in ("shard-000000.tar", "chunk-000000.bin")]
    build_part("edits", settings(), build, build)
    assert contents(build) == contents(whole)
    assert kept == [(build / name).stat().st_mtime_ns for name in ("shard-000000.tar", "chunk-000000.bin")], (
        "a finished piece was made again"
    )


def test_a_build_told_to_stop_ends_between_chunks_and_goes_on_later(whole, tmp_path):
    done: list[int] = []
    with pytest.raises(Stopped):
        build_part("edits", settings(), tmp_path, tmp_path, on_records=done.append, stop=lambda: len(done) == 2)
    assert not (tmp_path / "manifest.json").exists()
    build_part("edits", settings(), tmp_path, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_shards_of_other_settings_are_not_taken_over(whole, tmp_path):
    build = shutil.copytree(whole, tmp_path / "edits")
    other = EDITS.model_copy(update={"seed": 5})
    manifest = build_part("edits", settings(other), build, build)
    assert manifest["counts"]["written"] == 13
    assert next(read_part(build)).key == read_record("edits", other, 0).key


def test_a_few_samples_of_a_part_are_spread_over_it(shards: Path):
    keys = [sample.key for sample in read_part(shards / "edits")]
    count = len(keys)
    assert [sample.key for sample in read_part(shards / "edits", 3)] == [keys[0], keys[count // 3], keys[2 * count // 3]]
    assert [sample.key for sample in read_part(shards / "edits", count + 5)] == keys


def test_webdataset_reads_a_shard_as_it_comes(shards):
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    urls = [str(tar) for tar in sorted((shards / "edits").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    ours = list(read_part(shards / "edits"))
    assert [sample["__key__"] for sample in samples] == [sample.key for sample in ours]
    for theirs, own in zip(samples, ours, strict=True):
        np.testing.assert_array_equal(theirs["tgt.png"], own.target)
        np.testing.assert_array_equal(theirs["src.0.png"], own.references[0])
        assert theirs["json"]["prompt"] == own.prompt


def test_a_tar_tells_nothing_of_when_or_by_whom_it_was_made(shards):
    with tarfile.open(shards / "edits" / "shard-000000.tar", "r:") as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in members} == {(0, 0, 0, "", "", 0o444, True)}
    assert [m.name.partition(".")[2] for m in members[:3]] == ["json", "src.0.png", "tgt.png"]


def test_a_published_part_holds_what_its_source_yields_in_order_of_pictures_a_sample(shards):
    assert EDITS.samples is not None
    records = sorted((read_record("edits", EDITS, i) for i in range(EDITS.samples)), key=lambda record: len(record.references))
    assert {len(record.references) for record in records} == {1, 2}
    samples = read_part(shards / "edits")
    assert [(s.key, s.prompt, s.scene) for s in samples] == [(r.key, r.prompt, r.scene) for r in records]


def test_every_sample_that_went_in_is_accounted_for(shards):
    for folder in shards.iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        counts = dict(manifest["counts"])
        assert counts.pop("input") == sum(counts.values())
        assert manifest["samples"] == counts["written"] == sum(shard["samples"] for shard in manifest["shards"])
        assert len(np.load(folder / "index.npy")) == manifest["samples"]


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.npy"])
def test_one_flipped_byte_is_refused_by_name_with_the_command_that_mends_it(edits, name):
    verify_part(edits)
    content = bytearray((edits / name).read_bytes())
    content[len(content) // 2] ^= 1
    (edits / name).write_bytes(content)
    with pytest.raises(ShardMismatch, match=rf"{name} .*dvc repro .*shards@edits"):
        verify_part(edits)
    with pytest.raises(ShardMismatch, match=name):
        list(read_part(edits))


@pytest.mark.parametrize("cut", [0, 512, 10240])
def test_a_tar_that_is_short_or_missing_is_refused_before_anything_is_read(edits, cut):
    tar = edits / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:cut]) if cut else tar.unlink()
    with pytest.raises(ShardMismatch, match="shard-000002.tar"):
        next(read_part(edits))


@pytest.fixture(scope="module")
def long_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    build_part("edits", settings(EDITS.model_copy(update={"samples": 300}), 20), folder, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("victim, sign", [("builder", None), ("builder", "shard-*.json"), ("worker", "chunk-*.json")])
def test_a_pool_killed_in_part_leaves_no_process_and_no_trace_in_the_bytes(long_build, tmp_path, victim, sign):
    """Killed with SIGKILL once `sign` is there, or as soon as the workers are, which then have yet to start: the rest ends by itself."""
    data = settings(EDITS.model_copy(update={"samples": 300}), 20)
    script = (
        "import sys; from pathlib import Path; from data.config import DataConfig; from data.build import build_part\n"
        "if __name__ == '__main__':\n"
        "    build_part('edits', DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2]), workers=2)\n"
    )
    (tmp_path / "build.py").write_text(script)
    build = tmp_path / "build"
    command = [sys.executable, str(tmp_path / "build.py"), data.model_dump_json(), str(build)]
    with (tmp_path / "stderr").open("w") as stderr:  # no pipe: who outlives the builder would hold it open
        builder = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, stderr=stderr)
    children: list[str] = []
    try:
        deadline = time.monotonic() + 60
        while len(children) < 3 or not (sign is None or list(build.glob(sign))):  # two workers, and what keeps their semaphores
            assert time.monotonic() < deadline and builder.poll() is None, f"{sign} did not come"
            time.sleep(0.01)
            children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
        worker = next(pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(worker) if victim == "worker" else builder.pid, signal.SIGKILL)
        assert builder.wait(timeout=60) != 0
    finally:
        builder.kill()
        builder.wait()
    assert victim == "builder" or "BrokenProcessPool" in (tmp_path / "stderr").read_text()
    assert not (build / "manifest.json").exists(), "it was done before it was killed"
    deadline = time.monotonic() + 30
    while alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"{alive} outlive their builder"
        time.sleep(0.1)
    build_part("edits", data, build, build)
    sweep_stale(build)
    assert contents(build) == contents(long_build)
