"""Bytes that DVC takes on trust: a damaged cache or remote, a lock that was edited, and the way to another clone and back."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration.dvc import find_dvc
from runtime.exits import FAILED
from runtime.recorded import NotAsRecorded, differing_outputs, md5_of, recorded_outputs
from tests.orchestration.conftest import Toy, cached, failure_text

SHARD = Path("outputs/shards/drawn_image_edit/shard-000000.tar")


def dvc(toy: Toy, *arguments: str) -> "subprocess.CompletedProcess[str]":
    site = {"DVC_SITE_CACHE_DIR": str(toy.root / ".dvc" / "tmp" / "site")}
    return subprocess.run([find_dvc(toy.root), *arguments], cwd=toy.root, env=os.environ | site, capture_output=True, text=True)


def stored(folder: Path, content: Path) -> Path:
    """The object of a cache or remote that holds the bytes of `content`."""
    md5 = md5_of(content)
    return folder / "files" / "md5" / md5[:2] / md5[2:]


def flip(path: Path) -> None:
    """Change one bit as a disk does: length and mode stay, and DVC trusts what may not be written."""
    mode, content = path.stat().st_mode, bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


@pytest.fixture
def restored(with_shards: Toy) -> Toy:
    """A toy whose shard came back from a cache in which one bit was flipped."""
    flip(stored(with_shards.root / ".dvc" / "cache", with_shards.root / SHARD))
    shutil.rmtree(with_shards.root / SHARD.parent)
    assert dvc(with_shards, "checkout", "--force", "shards@drawn_image_edit").returncode == 0
    return with_shards


def test_the_hash_of_a_file_and_of_a_folder_is_the_one_that_dvc_records(with_shards: Toy):
    recorded = {path: md5 for outs in recorded_outputs(with_shards.root).values() for path, md5 in outs.items()}
    assert {path: md5_of(with_shards.root / path) for path in recorded} == recorded
    assert {md5.endswith(".dir") for md5 in recorded.values()} == {True, False}


def test_what_no_one_recorded_is_not_hashed_against_anything(toy: Toy):
    assert recorded_outputs(toy.root) == {} and differing_outputs(toy.root, []) == {}


@pytest.mark.slow
def test_a_byte_that_flipped_in_the_cache_is_found_though_dvc_calls_it_up_to_date(restored: Toy):
    assert restored.dvc.is_clean("shards@drawn_image_edit")
    found = restored.deepgen("verify")
    assert found.returncode == FAILED
    assert "outputs/shards/drawn_image_edit: make it anew with `dvc repro --force --single-item shards@drawn_image_edit`" in found.stderr


@pytest.mark.slow
def test_neither_door_reads_what_is_not_as_recorded(restored: Toy):
    said = "its input outputs/shards/drawn_image_edit is not what dvc.lock records"
    done = dvc(restored, "repro", "--single-item", "mixture@sft")
    assert done.returncode != 0 and said in done.stdout + done.stderr
    result = restored.materialize("mixture_sft")
    assert not result.success and said in str(result.failure_data_for_node("mixture_sft"))
    assert failure_text(result, "mixture_sft").startswith("mixture@sft:")


@pytest.mark.slow
def test_the_command_that_is_named_mends_it(restored: Toy):
    assert dvc(restored, "repro", "--force", "--single-item", "shards@drawn_image_edit").returncode == 0
    assert restored.deepgen("verify").returncode == 0
    assert restored.materialize("mixture_sft").success


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2] + "\n  - [",
        lambda text: "<<<<<<< ours\n" + text + ">>>>>>> theirs\n",
        lambda text: text.replace("md5:", "md6:"),
        lambda text: "- 1",
    ],
    ids=["cut", "merge conflict", "renamed keys", "another thing"],
)
def test_a_damaged_lock_is_told_with_the_way_out(with_shards: Toy, damage: Callable[[str], str]):
    path = with_shards.root / "dvc.lock"
    path.write_text(damage(path.read_text()))
    with pytest.raises(NotAsRecorded, match=r"dvc\.lock can't be read .*git checkout dvc\.lock"):
        recorded_outputs(with_shards.root)


def test_an_md5_that_was_edited_in_the_lock_is_noticed(with_shards: Toy):
    recorded = recorded_outputs(with_shards.root)["mixture@alignment"]["outputs/mixture/alignment.json"]
    with_shards.edit(recorded, "0" * 32, "dvc.lock")
    assert differing_outputs(with_shards.root, ["mixture@alignment"]) == {"outputs/mixture/alignment.json": "mixture@alignment"}


@pytest.fixture
def pushed(with_shards: Toy, tmp_path: Path) -> tuple[Toy, Toy, Path]:
    """A toy that pushed its outputs, a clone of it that has the same remote and dvc.lock and nothing else, and the remote."""
    clone = Toy(tmp_path / "clone")
    subprocess.run(["git", "clone", "-q", str(with_shards.root), str(clone.root)], check=True)
    shutil.copy(with_shards.root / "dvc.lock", clone.root)
    for toy in (with_shards, clone):
        for words in (["add", "--local", "--default", "store", str(tmp_path / "remote")], ["modify", "--local", "store", "verify", "true"]):
            assert dvc(toy, "remote", *words).returncode == 0
    assert dvc(with_shards, "push").returncode == 0
    return with_shards, clone, tmp_path / "remote"


@pytest.mark.slow
def test_a_clone_that_pulls_has_nothing_to_do(pushed: tuple[Toy, Toy, Path]):
    _, clone, _ = pushed
    assert dvc(clone, "pull", "--allow-missing").returncode == 0
    assert clone.dvc.is_clean("shards@drawn_image_edit") and clone.dvc.is_clean("mixture@alignment")
    result = clone.materialize("shards", "mixture_alignment")
    assert result.success and set(cached(result, "shards")) == set(cached(result, "mixture_alignment")) == {True}
    assert clone.deepgen("verify").returncode == 0


@pytest.mark.slow
def test_a_byte_that_flipped_in_a_verified_remote_is_not_pulled(pushed: tuple[Toy, Toy, Path]):
    toy, clone, remote = pushed
    flip(stored(remote, toy.root / SHARD))
    assert dvc(clone, "pull", "shards@drawn_image_edit").returncode != 0
    assert not (clone.root / SHARD).exists()
