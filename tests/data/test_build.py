"""Whole builds from files as they lie about: everything accounted for, nothing twice, the same bytes however the build went."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import yaml
from PIL import Image, UnidentifiedImageError

from data.__main__ import main
from data.build import build_part
from data.config import DataConfig, ImageRules, MixtureConfig, PartConfig
from data.loader import Loader, read_part
from data.mixture import resolve_mixture
from data.pinning import content_digest
from data.quarantine import redrive, set_aside
from data.removal import EvaluationLeak, find_removed, read_takedown
from data.rows import read_table
from data.versions import compare
from runtime.published import verify_part
from tests.data.encoded import encode, texture

REPO = Path(__file__).resolve().parents[2]
SAMPLES = REPO.parent / "shared" / "samples"


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


def written(folder: Path) -> list[tuple[str, str, str]]:
    rows = read_table(folder / "rows.parquet", ["key", "prompt", "images"]).to_pylist()
    return [(row["key"], row["prompt"], row["images"][0]["sha256"]) for row in rows]


def test_a_corpus_given_twice_adds_nothing(corpus, tmp_path):
    """The first of two is written under its own name, so that even the tars are those of the corpus given once."""
    made = []
    for times in (("a",), ("a", "b")):
        root = tmp_path / str(len(times))
        for name in times:
            shutil.copytree(corpus, root / "source" / name)
        made.append(build_part("own", settings(root / "source"), root / "own", root))
    once, twice = made
    assert twice["counts"] == {"input": 66, "written": 23, "quarantined": 10, "deduplicated": 27, "dropped": 6}
    assert twice["dataset_id"] == once["dataset_id"] and twice["shards"] == once["shards"] and twice["buckets"] == once["buckets"]
    assert written(tmp_path / "2" / "own") == written(tmp_path / "1" / "own")


def test_a_list_whose_records_are_repeated_adds_nothing(corpus, tmp_path):
    """Behind the first of each its place in the list, and so its key, is the same; in between the later ones have other keys."""
    pictures = sorted(file for file in corpus.iterdir() if file.suffix != ".txt")
    rows = [{"image_path": file.name, "txt": file.with_suffix(".txt").read_text()} for file in pictures]
    made = {}
    for name, listed in {"once": rows, "behind": rows + rows[::-1], "between": [row for row in rows for _ in range(3)]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.json").write_text(json.dumps(listed))
        data = settings(tmp_path / name / "list.json", source="t2i_sft_json", images=str(corpus))
        made[name] = build_part("own", data, tmp_path / name / "own", tmp_path)
        counts = dict(made[name]["counts"])
        assert counts.pop("input") == len(listed) == sum(counts.values())
    assert made["once"]["counts"]["written"] == made["between"]["counts"]["written"] == 23
    assert made["once"]["dataset_id"] == made["behind"]["dataset_id"]
    assert written(tmp_path / "once" / "own") == written(tmp_path / "behind" / "own")
    assert [row[1:] for row in written(tmp_path / "once" / "own")] == [row[1:] for row in written(tmp_path / "between" / "own")]


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


@pytest.fixture
def project(corpus: Path, tmp_path: Path) -> Path:
    """The smoke recipe, with the corpus as one more part."""
    for name in ("data", "runtime", "model", "training", "orchestration"):
        (tmp_path / name).symlink_to(REPO / name)
    shutil.copyfile(REPO / "dvc.yaml", tmp_path / "dvc.yaml")
    params = yaml.safe_load((REPO / "presets" / "smoke.yaml").read_text())
    own = settings(corpus)
    params["data"] |= {"shard_samples": own.shard_samples, "texts": own.texts.model_dump(mode="json"), "images": own.images.model_dump()}
    part = own.parts["own"].model_copy(update={"content": content_digest(own.parts["own"], corpus)})
    params["data"]["parts"]["own"] = part.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


@pytest.mark.slow
def test_a_build_killed_at_random_moments_ends_with_the_same_bytes_and_nothing_else(built, project):
    """The whole stage, from its first record to its publication, over an older version and over none; the last run is left alone."""
    script = (
        "from pathlib import Path; from data.stages import run_shards; from runtime.exits import StopRequest\n"
        "from runtime.stage import begin_stage; import webdataset\n"
        "print('began', flush=True)\n"
        "with begin_stage(Path.cwd(), 'shards@own', StopRequest()) as run: run_shards(run)"
    )
    out, dice, killed = project / "outputs" / "shards" / "own", random.Random(0), 0

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", script]
        stage = subprocess.Popen(command, cwd=project, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE)
        assert stage.stdout is not None and stage.stdout.readline() == b"began\n"
        return stage

    def listed() -> list[str]:
        return sorted(str(file.relative_to(project)) for file in (project / "outputs").rglob("*"))

    stage, began = start(), time.monotonic()
    while not out.exists():
        assert stage.poll() is None
        time.sleep(0.005)
    life = time.monotonic() - began
    assert stage.wait() == 0
    whole, names = digests(out), listed()
    alone = digests(built)
    manifest = json.loads(whole["manifest.json"])
    assert manifest.pop("decoded") > 0 and manifest == json.loads(alone["manifest.json"]), "the stage says how many samples it read back"
    assert whole.items() <= (alone | {"manifest.json": whole["manifest.json"]}).items()
    for turn in range(4):
        if turn % 2:
            shutil.rmtree(out, ignore_errors=True)
        stage = start()
        time.sleep(life * dice.uniform(0.1, 1.1))
        killed += stage.poll() is None
        stage.kill()
        stage.wait()
    assert killed >= 2, "it was hardly ever in the middle of anything"
    assert start().wait() == 0
    assert digests(out) == whole
    assert listed() == names


@pytest.fixture
def command(built: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `python -m data ...` prints in a project whose part is built."""
    shutil.copytree(built, project / "outputs" / "shards" / "own")
    monkeypatch.chdir(project)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data", *arguments])
        main()
        return capsys.readouterr().out

    return run


class TestCommands:
    """Each verb once, as a person types it."""

    def test_verify_reads_every_byte_and_decodes_as_many_samples_as_asked(self, command, project, capsys):
        assert "4 shards with every byte as the manifest says; 5 of 23 samples decoded whole" in command("verify", "own", "--sample", "5")
        assert "23 of 23 samples decoded whole" in command("verify", "own")
        tar = project / "outputs" / "shards" / "own" / "shard-000002.tar"
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
        with pytest.raises(SystemExit, match="1"):
            command("verify", "own", "--sample", "1")
        assert "shard-000002.tar has not the sha256" in capsys.readouterr().err

    def test_diff_names_what_changed_between_two_folders(self, command, corpus, tmp_path):
        assert command("diff", "own", "own").startswith("the same data set, byte for byte\n")
        other = shutil.copytree(corpus, tmp_path / "other" / corpus.name)
        (other / "good_06.txt").write_text("another caption")
        put(other, "good_99.png", encode(texture(99)), "a new one")
        build_part("own", settings(other), tmp_path / "new", other)
        told = command("diff", "own", str(tmp_path / "new"))
        assert f"added: 1\n  {corpus.name}/good_99.png\nremoved: 0\nchanged: 1\n  {corpus.name}/good_06.jpg" in told
        assert re.search(r"written +23 +24 +\+1", told)

    def test_quarantine_lists_and_tries_again_what_has_one_reason(self, command, corpus, project):
        told = command("quarantine", "list", "own")
        assert all(re.search(rf"{reason} .*{name}: ", told) for name, reason in EXPECTED.items())
        assert "own: 10 set aside; " in told and "truncated 1" in told
        assert "half.jpg: truncated" in command("quarantine", "redrive", "own", "--reason", "truncated")
        assert "0 of 1 would be written now" in command("quarantine", "redrive", "own", "--reason", "truncated")
        mended = shutil.copytree(corpus, project / "mended")
        shutil.copy(mended / "good_01.jpg", mended / "half.jpg")
        params = yaml.safe_load((project / "params.yaml").read_text())
        params["data"]["parts"]["own"]["path"] = str(mended)
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        told = command("quarantine", "redrive", "own", "--reason", "truncated")
        assert "half.jpg: would be written now" in told and "1 of 1 would be written now; `python -m data pin own`" in told

    def test_redrive_without_a_reason_says_where_reasons_are_shown(self, command, capsys):
        with pytest.raises(SystemExit, match="1"):
            command("quarantine", "redrive", "own")
        assert "quarantine list PART" in capsys.readouterr().err

    def test_inspect_draws_samples_and_facts(self, command, tmp_path):
        told = command("inspect", "own", "--out", str(tmp_path / "look.png"), "--count", "6")
        assert "look.png: 6 of 23 samples of own" in told and "how its 33 records ended" in told
        for name in ("look.png", "look_facts.png"):
            with Image.open(tmp_path / name) as picture:
                assert picture.width > 100 and len(set(picture.convert("L").getdata())) > 10


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


# Those of the odd files whose reason is not plain from what Pillow says of them.
ODD = {
    "truncated/pillow_broken.png": "truncated",
    "truncated/pillow_broken_data_stream.png": "truncated",
    "truncated/sharp_corrupt-header.jpg": "truncated",
    "truncated/skimage_truncated.jpg": "truncated",
    "truncated/thumbor_BlueSquare_truncated.jpg": "truncated",
    "bomb/pillow_png_decompression_dos.png": "too_many_bytes",
    "jpeg_bad/pillow_jpeg_ff00_header.jpg": "decode_failed",
}


def plain_reason(file: Path) -> str:
    """How a file that Pillow can read ends, by its format and size alone."""
    try:
        with Image.open(file, formats=["JPEG", "PNG", "WEBP"]) as image:
            short, long = sorted(image.size)
    except UnidentifiedImageError:
        return "format_unsupported"
    return "too_small" if short < 32 else "aspect" if long > 4 * short else "written"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are absent")
@pytest.mark.parametrize("folder, workers", [("odd_images", 2), ("photos", 1)])
def test_odd_files_of_the_world_all_end_for_the_right_reason_and_once(folder, workers, tmp_path):
    """Listed once, and twice with one worker or two: the same is written, to the byte."""
    source = SAMPLES / folder
    files = sorted(file for file in source.rglob("*") if file.is_file())
    rows = [{"image_path": str(file.relative_to(source)), "txt": f"what {file.name} shows, number {i}"} for i, file in enumerate(files)]
    made = []
    for times in (1, 2):
        (tmp_path / str(times)).mkdir()
        (tmp_path / str(times) / "list.json").write_text(json.dumps(rows * times))
        data = settings(tmp_path / str(times) / "list.json", source="t2i_sft_json", images=str(source))
        made.append(build_part("own", data, tmp_path / str(times) / "own", tmp_path, workers if times == 2 else 1))
        counts = dict(made[-1]["counts"])
        assert counts.pop("input") == len(rows) * times == sum(counts.values())
    once, twice = made
    assert twice["dataset_id"] == once["dataset_id"] and twice["shards"] == once["shards"]
    assert {name: twice["counts"][name] for name in ("quarantined", "dropped")} == {
        name: 2 * once["counts"][name] for name in ("quarantined", "dropped")
    }
    assert len(list(read_part(tmp_path / "1" / "own"))) == once["counts"]["written"] > 30
    reasons = {files[row["record"]]: row["reason"] for row in set_aside(tmp_path / "1" / "own")}
    for file in files:
        ended = reasons.get(file, "written")
        expected = ODD.get(str(file.relative_to(source))) or plain_reason(file)
        assert ended == expected or (expected == "written" and ended in ("duplicate", "near_duplicate")), file
