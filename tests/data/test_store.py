"""Parts whose tars lie in a store: the same samples, and nothing taken for whole that is not."""

import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_loader import BATCH, told

from data.__main__ import main
from data.loader import Loader, Part, read_part
from data.stages import run_shards
from data.store import tar_urls, upload_tars
from runtime.exits import Interrupted, StopRequest
from runtime.files import read_json, write_json
from runtime.published import ShardMismatch, verify_part
from runtime.stage import begin_stage
from runtime.store import Store, StoreError, shard_store

REPO = Path(__file__).parents[2]


def move_to_store(folder: Path, url: str) -> None:
    """What a build with data.store leaves of a part."""
    manifest = read_json(folder / "manifest.json") | {"store": url}
    store = shard_store(manifest)
    assert store is not None
    assert all(upload_tars(folder, manifest, store))
    write_json(folder / "manifest.json", manifest)
    for tar in folder.glob("*.tar"):
        tar.unlink()


@pytest.fixture
def edits(shards: Path, tmp_path: Path) -> Path:
    """The edits part, its tars in the folder `store` beside it."""
    (tmp_path / "store").mkdir()
    folder = shutil.copytree(shards / "edits", tmp_path / "outputs" / "shards" / "edits")
    move_to_store(folder, f"file://{tmp_path}/store/")
    return folder


def stored_tar(part: Path, shard: int = 0) -> Path:
    return Path(tar_urls(part)[shard].removeprefix("file://"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_store_are_those_of_tars_on_this_machine(mixture, shards, tmp_path, kind, workers):
    folder = shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "store").mkdir()
    for part in folder.iterdir():
        move_to_store(part, f"file://{tmp_path}/store" if kind == "file" else f"memory://{uuid.uuid4().hex}")
    local, stored = Loader(mixture, shards, BATCH), Loader(mixture, folder, BATCH, workers=workers)
    assert not list(folder.rglob("*.tar"))
    assert all(told(a) == told(b) for a, b in islice(zip(local, stored, strict=False), 13))


def test_a_stored_part_passes_every_check_that_a_local_one_does(edits, shards, monkeypatch, capsys):
    assert verify_part(edits)["samples"] == 13
    monkeypatch.setattr(sys, "argv", ["data", "verify", str(edits)])
    main()
    assert "3 shards with every byte as the manifest says; 13 of 13 samples decoded whole" in capsys.readouterr().out
    assert [sample.key for sample in read_part(edits)] == [sample.key for sample in read_part(shards / "edits")]


def in_target(sample: bytes) -> int:
    return sample.rindex(b"IDAT") + 20


def in_name(sample: bytes) -> int:
    return sample.index(b".tgt.png\0") + 1


def in_json(sample: bytes) -> int:
    return sample.index(b'{"bucket')


@pytest.mark.parametrize("place", [in_target, in_name, in_json])
def test_a_byte_flipped_in_the_store_is_found_by_whoever_reads_it(edits, place: Callable[[bytes], int]):
    shard, offset, size = (int(value) for value in np.load(edits / "index.npy")[6])
    tar = stored_tar(edits, shard)
    flip(tar, offset + place(tar.read_bytes()[offset : offset + size]))
    part = Part(edits)
    assert part[5].key, "the sample before it is whole"
    with pytest.raises(ShardMismatch, match=rf"file://{tar}: .*Remove the tar from the store.*dvc repro -f shards@edits"):
        part[6]
    with pytest.raises(ShardMismatch, match=rf"file://{tar} has not the sha256.*dvc repro -f shards@edits"):
        verify_part(edits)


def test_a_byte_flipped_in_a_prompt_is_found_by_verify(edits):
    tar = stored_tar(edits)
    flip(tar, tar.read_bytes().index(b'"prompt": "') + 12)
    assert verify_part(edits, whole=False)["samples"] == 13
    with pytest.raises(ShardMismatch, match="has not the sha256"):
        verify_part(edits)


@pytest.mark.parametrize("cut", [0, 512, 10240])
def test_a_stored_tar_that_is_short_or_missing_is_refused_before_anything_is_read(edits, cut):
    tar = stored_tar(edits, 2)
    tar.write_bytes(tar.read_bytes()[:cut]) if cut else tar.unlink()
    for look in (Part, lambda folder: verify_part(folder, whole=False)):
        with pytest.raises(ShardMismatch, match=rf"file://{tar}: {cut or 'missing'}.*dvc repro -f shards@edits"):
            look(edits)


@pytest.mark.parametrize(("cut", "told"), [(0, "missing"), (1024, "1024 bytes came from byte 0")])
def test_a_tar_that_goes_after_the_start_is_named_at_its_next_read(edits, cut, told):
    part = Part(edits)
    tar = stored_tar(edits)
    tar.write_bytes(tar.read_bytes()[:cut]) if cut else tar.unlink()
    with pytest.raises(ShardMismatch, match=rf"file://{tar}: {told}.*dvc repro -f shards@edits"):
        part[0]


@pytest.mark.parametrize("ending", ["SIG_IGN", "SIG_DFL"])
def test_a_torn_upload_never_has_the_final_name(tmp_path, ending):
    """The disk takes half of the file: an error that is told, or, with the signal's default action, the end of the process on the spot."""
    (tmp_path / "store").mkdir()
    (tmp_path / "shard.tar").write_bytes(bytes(200_000))
    script = (
        "import resource, signal, sys; from pathlib import Path; from runtime.store import Store, StoreError\n"
        f"signal.signal(signal.SIGXFSZ, signal.{ending}); store = Store(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: store.put(Path(sys.argv[2]), 'x.tar')\n"
        "except StoreError as error: print(error)\n"
    )
    command = [sys.executable, "-B", "-c", script, f"file://{tmp_path}/store/part", str(tmp_path / "shard.tar")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    left = [file.name for file in (tmp_path / "store" / "part").iterdir()]
    if ending == "SIG_IGN":
        assert "store/part/x.tar: OSError" in done.stdout and "File too large" in done.stdout
        assert left == []
    else:
        assert done.returncode == -signal.SIGXFSZ
        assert [name for name in left if not name.endswith(".tmp")] == [] != left


def test_half_a_file_under_a_final_name_is_no_upload(tmp_path):
    """As a file system that can't move would leave it."""
    file = tmp_path / "shard.tar"
    file.write_bytes(b"0123456789")
    for url in (f"file://{tmp_path}/store", f"memory://{uuid.uuid4().hex}"):
        store = Store(url)
        store.fs.makedirs(store.path, exist_ok=True)
        store.fs.pipe_file(f"{store.path}/x.tar", b"01234")
        assert store.put(file, "x.tar") and not store.put(file, "x.tar")
        assert Store(url).read("x.tar", 0, 99) == b"0123456789"


class TestTheStageCommand:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        """A clone in small: the recipe, and params.yaml with one part of 13 samples in three tars, and a store."""
        root = tmp_path / "project"
        root.mkdir()
        for name in ("data", "runtime"):
            (root / name).symlink_to(REPO / name)
        shutil.copyfile(REPO / "dvc.yaml", root / "dvc.yaml")
        (tmp_path / "store").mkdir()
        self.set_store(root, f"file://{tmp_path}/store")
        return root

    @staticmethod
    def set_store(root: Path, url: str | None) -> None:
        params = yaml.safe_load((REPO / "presets" / "smoke.yaml").read_text())
        params["data"] |= {"shard_samples": 5, "store": url}
        params["data"]["parts"]["drawn_image_edit"] |= {"samples": 13}
        (root / "params.yaml").write_text(yaml.safe_dump(params))

    @staticmethod
    def build(root: Path, stop: StopRequest | None = None) -> tuple[Path, dict[str, Any]]:
        with begin_stage(root, "shards@drawn_image_edit", StopRequest() if stop is None else stop) as run:
            run_shards(run)
        return run.out, read_json(run.out / "manifest.json")

    def test_a_part_is_published_without_its_tars_which_are_named_by_their_content(self, project, tmp_path):
        out, stored = self.build(project)
        assert sorted(file.name for file in out.iterdir()) == ["index.npy", "manifest.json", "rows.parquet", "set_aside.parquet"]
        tars = sorted(file.name for file in (tmp_path / "store" / "drawn_image_edit").iterdir())
        assert tars == sorted(f"{shard['sha256']}.tar" for shard in stored["shards"])
        samples = [sample.key for sample in read_part(out)]
        self.set_store(project, None)
        out, local = self.build(project)
        assert stored == local | {"store": f"file://{tmp_path}/store"}, "the data set is the same, wherever its tars lie"
        assert "store" not in local and samples == [sample.key for sample in read_part(out)]

    def test_a_stopped_upload_goes_on_and_what_is_there_is_not_sent_again(self, project, tmp_path):
        class OnceStored(StopRequest):
            def __bool__(self) -> bool:
                return any((tmp_path / "store").rglob("*.tar"))

        with pytest.raises(Interrupted, match=r"stopped with 1 of 3 tars in file://.*goes on"):
            self.build(project, OnceStored())
        assert not (project / "outputs" / "shards").exists(), "nothing is published before all tars are there"
        (first,) = (tmp_path / "store").rglob("*.tar")
        sent = first.stat().st_mtime_ns, first.stat().st_ino
        out, manifest = self.build(project)
        assert (first.stat().st_mtime_ns, first.stat().st_ino) == sent
        assert verify_part(out) == manifest and len(list((tmp_path / "store").rglob("*.tar"))) == 3

    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("oss://bucket/folder", r"oss://bucket/folder: .*ossfs.*pip install.*data\.store"),
            ("nope://bucket", "nope://bucket: Protocol not known: nope.*s3://bucket/folder"),
            ("file:///no/such/folder", r"data\.store: 'file:///no/such/folder' can't be written: FileNotFoundError.*make it"),
            ("http://127.0.0.1:9/store", r"data\.store: 'http://127.0.0.1:9/store' can't be written.*set data\.store to null"),
        ],
    )
    def test_a_store_that_takes_nothing_is_refused_before_any_work(self, project, url, told):
        self.set_store(project, url)
        with pytest.raises(StoreError, match=told):
            self.build(project)
        assert not list((project / "outputs").rglob("shard-*")) and not list((project / "outputs").rglob("chunk-*"))


def test_the_manifest_is_json_of_a_url_and_no_secret():
    from pydantic import ValidationError

    from data.config import DataConfig

    part = {"source": "drawn", "task": "image_edit", "split": "train", "samples": 8, "licence": "CC0-1.0"}
    values = {"image_size": 64, "shard_samples": 4, "parts": {"edits": part}}
    for url in ("outputs/store", "simplecache::s3://bucket", "", "ftp://me:secret@host/folder"):
        with pytest.raises(ValidationError, match=r"store(.|\n)*allowed:"):
            DataConfig.model_validate(values | {"store": url})
    assert json.dumps(DataConfig.model_validate(values | {"store": "s3://bucket/a"}).store) == '"s3://bucket/a"'
