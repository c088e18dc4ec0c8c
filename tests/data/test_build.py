"""Whole builds from files as they lie about: everything accounted for, nothing twice, the same bytes however the build went."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.build import build_part
from data.config import DataConfig, ImageRules, MixtureConfig, PartConfig
from data.loader import Loader, read_part
from data.mixture import resolve_mixture
from data.quarantine import redrive, set_aside
from data.removal import EvaluationLeak, find_removed, read_takedown
from data.rows import read_table
from data.shards import verify_part
from data.versions import compare
from tests.data.encoded import encode

REPO = Path(__file__).resolve().parents[2]
SAMPLES = REPO.parent / "shared" / "samples"


def texture(seed: int, width: int = 96, height: int = 96) -> np.ndarray:
    """A smooth picture of its own: no two are near duplicates."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def settings(path: Path, **changes: object) -> DataConfig:
    part = {"source": "folder", "task": "text_to_image", "split": "train", "licence": "CC0-1.0", "path": str(path)} | changes
    return DataConfig(image_size=64, shard_samples=7, images=ImageRules(min_side=32), parts={"own": PartConfig.model_validate(part)})


def put(folder: Path, name: str, content: bytes, caption: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 good pictures of four shapes, and one of each thing that can be wrong."""
    folder = tmp_path_factory.mktemp("corpus")
    shapes = [(96, 96), (160, 40), (40, 160), (64, 64)]
    for i in range(23):
        put(folder, f"good_{i:02d}.jpg", encode(texture(i, *shapes[i % 4]), "JPEG", quality=92), f"a picture of texture number {i}")
    good = (folder / "good_00.jpg").read_bytes()
    put(folder, "half.jpg", good[: len(good) // 2], "half a picture")
    put(folder, "empty.png", b"", "nothing at all")
    put(folder, "page.jpg", b"<html>404</html>", "a page, not a picture")
    put(folder, "small.png", encode(texture(90, 16, 16)), "a tiny picture")
    put(folder, "wide.png", encode(texture(91, 640, 64)), "a long strip")
    put(folder, "silent.png", encode(texture(92)), "   ")
    put(folder, "dull.png", encode(texture(93)), "Photo.")
    put(folder, "rude.png", encode(texture(94)), "a bell\a rings")
    put(folder, "zz_again.jpg", good, "the first picture once more")
    put(folder, "zz_alike.jpg", encode(texture(4), "JPEG", quality=60), "a texture, compressed again")
    return folder


EXPECTED = {
    "half.jpg": "truncated",
    "empty.png": "zero_bytes",
    "page.jpg": "format_unsupported",
    "small.png": "too_small",
    "wide.png": "aspect",
    "silent.png": "text_empty",
    "dull.png": "text_boilerplate",
    "rude.png": "text_bad",
    "zz_again.jpg": "duplicate",
    "zz_alike.jpg": "near_duplicate",
}


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "own"
    build_part("own", settings(corpus), folder, corpus)
    return folder


def digests(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def test_every_record_is_written_or_set_aside_for_the_right_reason(built):
    manifest = verify_part(built)
    assert manifest["counts"] == {"input": 33, "written": 23, "quarantined": 5, "deduplicated": 2, "dropped": 3}
    assert {Path(row["source_id"]).name: row["reason"] for row in set_aside(built)} == EXPECTED
    assert len(read_table(built / "rows.parquet")) == 23
    again = next(row for row in set_aside(built) if row["reason"] == "duplicate")
    assert "good_00.jpg" in again["message"]


def test_a_corpus_given_twice_adds_nothing(corpus, built, tmp_path):
    twice = tmp_path / "twice"
    shutil.copytree(corpus, twice / "a")
    shutil.copytree(corpus, twice / "b")
    manifest = build_part("own", settings(twice), tmp_path / "own", twice)
    assert manifest["counts"]["written"] == 23 and manifest["counts"]["input"] == 66
    first = {row["prompt"] for row in read_table(built / "rows.parquet", ["prompt"]).to_pylist()}
    assert {row["prompt"] for row in read_table(tmp_path / "own" / "rows.parquet", ["prompt"]).to_pylist()} == first


def test_pictures_of_many_shapes_are_stored_in_few_sizes_and_batched_by_them(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert {entry["bucket"] for entry in manifest["buckets"]} == {"64x64", "128x32", "32x128"}
    mixture = resolve_mixture("sft", MixtureConfig(seed=3, ratio={"text_to_image": 1}, parts={"own": 1}), built.parent)
    seen: Counter[str] = Counter()
    for batch in islice(Loader(mixture, built.parent, 4), 60):
        seen.update(batch.keys)
    assert len(seen) == 23, "every sample comes"
    assert max(seen.values()) - min(seen.values()) <= 6, "and about as often as any other"


def test_two_workers_make_the_bytes_that_one_makes(corpus, built, tmp_path):
    build_part("own", settings(corpus), tmp_path / "own", corpus, workers=2)
    assert digests(tmp_path / "own") == digests(built)


@pytest.mark.slow
def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(corpus, built, tmp_path):
    script = (
        "import sys; from pathlib import Path; from data.build import build_part; from data.config import DataConfig\n"
        "print('began', flush=True)\n"
        "build_part('own', DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, settings(corpus).model_dump_json(), str(tmp_path / "own")]
    moments, killed = random.Random(0), 0
    for _ in range(12):
        builder = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE)
        assert builder.stdout is not None
        builder.stdout.readline()
        time.sleep(moments.uniform(0, 0.4))
        killed += builder.poll() is None
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    assert killed >= 3, "it was never in the middle of anything"
    build_part("own", settings(corpus), tmp_path / "own", corpus)
    assert digests(tmp_path / "own") == digests(built)


def test_a_mended_file_passes_another_try_and_the_rest_stay_out(corpus, built, tmp_path):
    mended = shutil.copytree(corpus, tmp_path / "mended")
    assert [refused for _, refused in redrive("own", settings(mended), built, mended, "truncated")] != [None]
    shutil.copy(mended / "good_01.jpg", mended / "half.jpg")
    assert [refused for _, refused in redrive("own", settings(mended), built, mended, "truncated")] == [None]
    assert [refused.reason for _, refused in redrive("own", settings(mended), built, mended, "text_empty") if refused] == ["text_empty"]


def test_the_difference_of_two_versions_is_named(corpus, built, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "other" / corpus.name)
    (other / "good_05.jpg").unlink()
    (other / "good_05.txt").unlink()
    (other / "good_06.txt").write_text("another caption")
    put(other, "good_99.png", encode(texture(99)), "a new one")
    build_part("own", settings(other), tmp_path / "own", other)
    found = compare(built, tmp_path / "own")
    names = [[Path(name).name for name in group] for group in (found.added, found.removed, found.changed)]
    assert names == [["good_99.png"], ["good_05.jpg"], ["good_06.jpg"]]
    assert not found.same and compare(built, built).same


class TestWhatIsNotRead:
    """Taken out when the mixture is made; the shards stay as they are."""

    @pytest.fixture
    def parts(self, corpus: Path, built: Path, tmp_path: Path) -> tuple[DataConfig, Path]:
        """The corpus, and an evaluation part that holds one of its pictures and one of its prompts."""
        evaluation = tmp_path / "evaluation"
        put(evaluation, "seen.jpg", encode(texture(8), "JPEG", quality=70), "the same texture under other words")
        put(evaluation, "told.png", encode(texture(200)), "A picture of texture number 9.")
        config = settings(corpus)
        test = config.parts["own"].model_copy(update={"path": str(evaluation), "split": "evaluation"})
        data = config.model_copy(update={"parts": config.parts | {"held_out": test}})
        shutil.copytree(built, tmp_path / "shards" / "own")
        build_part("held_out", data, tmp_path / "shards" / "held_out", evaluation)
        return data, tmp_path

    def test_a_sample_of_an_evaluation_set_stops_the_mixture_and_is_named(self, parts):
        data, root = parts
        config = MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"own": 1})
        with pytest.raises(EvaluationLeak, match=r"2 samples of 'own'(.|\n)*good_08.jpg(.|\n)*evaluation_leak: {own: remove}"):
            find_removed("sft", config, data, root / "shards", root)

    def test_removed_and_taken_down_samples_never_come_and_all_others_do(self, parts):
        data, root = parts
        rows = read_table(root / "shards" / "own" / "rows.parquet").to_pylist()
        (root / "takedown.txt").write_text(f"# asked for by their author\n{rows[0]['key']}\n{rows[1]['images'][0]['found_sha256']}\n")
        config = MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"own": 1}, evaluation_leak={"own": "remove"})
        removed = find_removed("sft", config, data, root / "shards", root)["own"]
        assert Counter(item.reason for item in removed.values()) == {"takedown": 2, "evaluation_leak": 2}
        mixture = resolve_mixture("sft", config, root / "shards", {"own": sorted(removed)})
        seen = {key for batch in islice(Loader(mixture, root / "shards", 4), 60) for key in batch.keys}
        assert seen == {row["key"] for i, row in enumerate(rows) if i not in removed}
        verify_part(root / "shards" / "own")

    def test_what_the_mixture_allows_is_read(self, parts):
        data, root = parts
        config = MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"own": 1}, evaluation_leak={"own": "allow"})
        assert not any(find_removed("sft", config, data, root / "shards", root).values())

    def test_an_evaluation_part_that_is_not_built_vouches_for_nothing(self, parts):
        data, root = parts
        shutil.rmtree(root / "shards" / "held_out")
        config = MixtureConfig(seed=1, ratio={"text_to_image": 1}, parts={"own": 1})
        with pytest.raises(FileNotFoundError, match="dvc repro shards@held_out"):
            find_removed("sft", config, data, root / "shards", root)


def test_a_takedown_list_may_hold_comments_and_be_absent(tmp_path):
    assert read_takedown(tmp_path / "takedown.txt") == set()
    assert read_takedown(REPO / "takedown.txt") == set()


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are absent")
@pytest.mark.parametrize("folder", ["odd_images", "photos"])
def test_odd_files_of_the_world_are_all_accounted_for(folder, tmp_path):
    source = shutil.copytree(SAMPLES / folder, tmp_path / "source")
    pictures = [file for file in source.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tiff")]
    for file in pictures:
        file.with_name(file.name + ".caption").write_text("x")
    listed = [
        {"image_path": str(file.relative_to(source)), "txt": f"what {file.name} shows, number {i}"} for i, file in enumerate(pictures)
    ]
    (source / "list.json").write_text(json.dumps(listed))
    data = settings(source / "list.json", source="t2i_sft_json")
    manifest = build_part("own", data, tmp_path / "own", tmp_path)
    counts = manifest["counts"]
    assert counts["input"] == len(pictures) == sum(value for name, value in counts.items() if name != "input")
    assert counts["written"] > 0 and counts["quarantined"] > 0 if folder == "odd_images" else counts["written"] > 40
    assert len(list(read_part(tmp_path / "own"))) == counts["written"]
