"""A set of the catalogue, from the hub (on 127.0.0.1) to a part's rows; and each way in which the two may not fit."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data.__main__ import main
from data.build import build_part
from data.catalog import Catalog
from data.config import DataConfig, MixtureConfig, PartConfig
from data.data_sets import check_parts, located, params_text, wanted_by_parts, wants
from data.images import encode_png
from data.loader import Part
from data.pinning import OtherContent, check_content, content_digest
from data.rows import read_table
from data.stages import run_mixture, run_shards
from runtime import exits
from runtime.fetch import choose, fetch, wanted_by
from runtime.fetched import FetchRefused, Wanted
from runtime.hub import Hub
from runtime.params import Params, ParamsError, check_params
from runtime.stage import begin_stage
from tests.runtime.fake_hub import REVISION, FakeHub, serving

REPO = Path(__file__).parents[2]
PUBLIC = {"task": "text_to_image", "category": "general", "stages": ["sft"], "count": 5, "licence": "CC-BY-4.0", "status": "public"}
PETS = [{"repo": "maker/pets", "revision": REVISION}]
NOBODY_LOOKED = [{"repo": "maker/birds", "revision": None}]
EDITED = {"task": "image_edit", "format": "edit_json"}
CATALOG: dict[str, Any] = {
    "data_sets": {
        "pets": PUBLIC | {"format": "webdataset", "hub": PETS, "caption_key": "prompt"},
        "pet_rows": PUBLIC | {"format": "hugging_face", "hub": PETS, "count": 15},
        "two": PUBLIC | {"format": "webdataset", "hub": [*PETS, {"repo": "maker/words", "revision": REVISION}], "stages": []},
        "birds": PUBLIC | {"format": "webdataset", "hub": NOBODY_LOOKED, "licence": "unknown"},
        "private": PUBLIC | {"format": "t2i_sft_json", "licence": "unknown", "status": "unreleased", "stand_in": "pets", "count": 20},
        "hidden_edits": PUBLIC | EDITED | {"licence": "unknown", "status": "unreleased", "stand_in": "edits"},
        "edits": PUBLIC | EDITED | {"stages": []},
        "lines": PUBLIC | {"format": "prompts"},
        "words": PUBLIC | {"format": "drawn", "category": "text_rendering", "licence": "CC0-1.0"},
    },
    "mixtures": {
        "sft": {
            "ratio": {"image_edit": 1, "text_to_image": 2},
            "weights": {"pets": 1, "pet_rows": 1, "birds": 1, "private": 1, "lines": 1, "words": 2, "hidden_edits": 1},
        }
    },
}
PART = {"data_set": "pets", "source": "webdataset", "task": "text_to_image", "split": "train", "licence": "CC-BY-4.0"}


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.model_validate(CATALOG)


def picture(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def tar_of_pets() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in range(5):
            for extension, content in (("png", picture(i)), ("json", json.dumps({"prompt": f"pet number {i}"}).encode())):
                member = tarfile.TarInfo(f"{i:05d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def rows_of_pets() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [picture(i) for i in range(3)], "caption": [f"pet number {i}" for i in range(3)]}), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving({"tars/pets.tar": tar_of_pets(), "rows/train-0.parquet": rows_of_pets(), "README.md": b"pets"}) as hub:
        yield hub


def params_with(**parts: dict[str, Any]) -> Params:
    value = yaml.safe_load((REPO / "presets" / "tiny.yaml").read_text())
    value["data"]["parts"] |= parts
    return check_params(value)


def write_project(root: Path, params: Params) -> Path:
    """A project whose code is this one's."""
    shutil.copyfile(REPO / "dvc.yaml", root / "dvc.yaml")
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    for room in ("data", "runtime"):
        (root / room).symlink_to(REPO / room)
    return root


def bring(root: Path, params: Params, catalog: Catalog, hub: FakeHub, *only: str) -> str:
    said: list[str] = []
    wanted = choose(wanted_by(params, wanted_by_parts(params.data, catalog)), only)
    fetch(root, wanted, ["CC-BY-4.0"], Hub(hub.endpoint, None, timeout=5, pause=0.001), False, said.append)
    return "\n".join(said)


@pytest.mark.parametrize(
    ("part", "number", "file"),
    [(PART, 5, "tars/pets.tar#"), (PART | {"data_set": "pet_rows", "source": "hugging_face", "path": "rows"}, 3, "train-0.parquet#")],
)
def test_a_set_is_fetched_and_built_and_each_row_says_its_licence_and_where_it_was_published(
    tmp_path: Path, hub: FakeHub, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any], number: int, file: str
):
    params = params_with(pets=part)
    root = write_project(tmp_path, params)
    monkeypatch.setattr("data.stages.load_catalog", lambda: catalog)
    bring(root, params, catalog, hub)
    with begin_stage(root, "shards@pets", exits.StopRequest()) as run:
        run_shards(run)
    rows = read_table(root / "outputs" / "shards" / "pets" / "rows.parquet").to_pylist()
    assert [row["licence"] for row in rows] == ["CC-BY-4.0"] * number
    assert all(json.loads(row["origin"]) == {"data_set": part["data_set"], "published": f"maker/pets@{REVISION}"} for row in rows)
    assert sorted(row["prompt"] for row in rows) == [f"pet number {i}" for i in range(number)]
    assert all(file in row["source_id"] for row in rows)
    assert len(Part(root / "outputs" / "shards" / "pets")) == number


def test_a_path_starts_in_the_folder_of_the_first_repository_and_an_absolute_one_stays(tmp_path: Path, hub: FakeHub, catalog: Catalog):
    parts = {"first": PART | {"data_set": "two", "path": "tars"}, "elsewhere": PART | {"path": str(tmp_path / "elsewhere")}}
    params = params_with(**parts)
    bring(tmp_path, params, catalog, hub)
    moved = located("first", params, catalog, tmp_path).parts["first"]
    assert moved.path == f"outputs/fetched/dataset/maker--pets/{REVISION}/tars"
    check_content("first", moved, tmp_path)
    assert build_part("first", located("first", params, catalog, tmp_path), tmp_path / "part", tmp_path)["samples"] == 5
    apart = located("elsewhere", params, catalog, tmp_path).parts["elsewhere"]
    shutil.copytree(tmp_path / moved.path, str(apart.path))
    with pytest.raises(OtherContent, match="data.parts.elsewhere.content: None"):
        check_content("elsewhere", apart, tmp_path)
    check_content("elsewhere", apart.model_copy(update={"content": content_digest(apart, tmp_path)}), tmp_path)
    with pytest.raises(ValueError, match="'../birds' given; allowed with data_set: a place in the fetched folder"):
        PartConfig.model_validate(PART | {"path": "../birds"})


def test_pin_and_redrive_read_the_fetched_files_too(tmp_path: Path, hub: FakeHub, catalog: Catalog, monkeypatch, capsys):
    params = params_with(pets=PART | {"min_scores": {"clip": 0.5}})
    bring(write_project(tmp_path, params), params, catalog, hub)
    moved = located("pets", params, catalog, tmp_path)
    build_part("pets", moved, tmp_path / "outputs" / "shards" / "pets", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.catalog.load_catalog", lambda: catalog)
    for words, told in (
        (["pin", "pets"], f"data.parts.pets.content: {content_digest(moved.parts['pets'], tmp_path)}"),
        (["quarantine", "redrive", "pets", "--reason", "score"], "0 of 5 would be written now"),
    ):
        monkeypatch.setattr(sys, "argv", ["data", *words])
        main()
        assert told in capsys.readouterr().out


def test_what_was_not_fetched_is_named_with_the_command_that_brings_it(tmp_path: Path, hub: FakeHub, catalog: Catalog):
    params = params_with(pets=PART, two=PART | {"data_set": "two"})
    write_project(tmp_path, params)
    with pytest.raises(
        FileNotFoundError, match=rf"pets reads pets, but .*\n  pets: maker/pets at {REVISION}.*\n.*`deepgen fetch --only pets`"
    ):
        located("pets", params, catalog, tmp_path)
    (tmp_path / "presets").mkdir()
    shutil.copyfile(tmp_path / "params.yaml", tmp_path / "presets" / "tiny.yaml")
    with pytest.raises(FileNotFoundError, match="`deepgen fetch --preset tiny --only pets`"):
        located("pets", params, catalog, tmp_path)
    bring(tmp_path, params, catalog, hub, "two")
    with pytest.raises(FileNotFoundError, match="\n  two-2: maker/words .*\n.*--only two-2`"):
        located("two", params, catalog, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tars" / "more.tar").write_bytes(tar_of_pets()), "more.tar: maker/pets at 0123.* has no such file"),
        (lambda folder: (folder / "tars" / "pets.tar").write_bytes(tar_of_pets()[:-1] + b"x"), "pets.tar: expected sha256 .*--only pets`"),
    ],
)
def test_a_file_that_was_not_published_so_is_not_read(
    tmp_path: Path, hub: FakeHub, catalog: Catalog, change: Callable[[Path], Any], message: str
):
    params = params_with(pets=PART)
    bring(tmp_path, params, catalog, hub)
    located("pets", params, catalog, tmp_path)
    change(tmp_path / wants(catalog, "pets")[0].folder)
    with pytest.raises(OtherContent, match=message):
        located("pets", params, catalog, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": "MIT"}, "licence: 'MIT' given; data/catalog.yaml data_sets.pets says 'CC-BY-4.0'"),
        ({"category": "reasoning"}, "category: 'reasoning' given; .* says 'general'"),
        ({"task": "image_edit"}, "task: 'image_edit' given; .* says 'text_to_image'"),
        ({"source": "folder"}, "source: 'folder' given; .* says 'webdataset'"),
        ({"data_set": "pest"}, "data_set: 'pest' given, which data/catalog.yaml data_sets lacks; did you mean 'pets'"),
        ({"data_set": "lines"}, "data_set: 'lines' has prompts and no images"),
    ],
)
def test_a_part_that_says_something_else_than_its_entry_is_refused_by_key(catalog: Catalog, change: dict[str, str], message: str):
    data = params_with(mine=PART | change).data
    for check in (check_parts, wanted_by_parts):
        with pytest.raises(ParamsError, match=rf"data\.parts\.mine\.{message}"):
            check(data, catalog)


def test_a_refused_entry_is_refused_with_all_its_reasons_when_a_stage_starts(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    params = params_with(mine=PART | {"data_set": "birds"}, theirs=PART | {"data_set": "private", "source": "t2i_sft_json"})
    root = write_project(tmp_path, params)
    monkeypatch.setattr("data.stages.load_catalog", lambda: catalog)
    for stage, work in (("shards@mine", run_shards), ("shards@drawn_image_edit", run_shards), ("mixture@sft", run_mixture)):
        (root / "outputs" / "shards").mkdir(parents=True, exist_ok=True)
        (root / "takedown.txt").touch()
        with pytest.raises(ParamsError) as refusal, begin_stage(root, stage, exits.StopRequest()) as run:
            work(run)
        assert "data.parts.mine.data_set: data/catalog.yaml data_sets.birds is refused: licence unknown" in str(refusal.value)
        assert "data_sets.birds is refused: maker/birds has no revision" in str(refusal.value)
        assert "data.parts.theirs.data_set: data/catalog.yaml data_sets.private is refused: unreleased: use its stand-in, pets" in str(
            refusal.value
        )
        assert not (root / run.stage.outs[0]).exists()


def test_a_fetch_names_where_revision_and_licence_belong_and_brings_the_others(tmp_path: Path, hub: FakeHub, catalog: Catalog):
    params = params_with(birds=PART | {"data_set": "birds"}, pets=PART)
    with pytest.raises(FetchRefused) as refusal:
        bring(tmp_path, params, catalog, hub)
    assert "revision; look at its files, then write the full commit hash into data/catalog.yaml data_sets.birds.hub" in str(refusal.value)
    assert "write the licence's name into data/catalog.yaml data_sets.birds.licence" in str(refusal.value)
    assert "fetched: pets" in bring(tmp_path, params, catalog, hub, "pets")


def test_a_set_of_two_repositories_has_two_names_and_one_that_two_parts_name_comes_once(catalog: Catalog):
    parts = {"a": PART | {"glob": "a*"}, "b": PART | {"glob": "b*"}, "c": PART | {"data_set": "two"}}
    found = wanted_by_parts(params_with(**parts).data, catalog)
    assert [(wanted.name, wanted.repo, wanted.licence) for wanted in found] == [
        ("pets", "maker/pets", "CC-BY-4.0"),
        ("two", "maker/pets", "CC-BY-4.0"),
        ("two-2", "maker/words", "CC-BY-4.0"),
    ]
    with pytest.raises(FetchRefused, match="pets: named twice"):
        wanted_by(params_with(), [*found, Wanted("pets", "maker/other", "model", None, None)])


def test_the_printed_parts_and_mixture_are_taken_as_written_and_draw_the_catalogue_s_shares(catalog: Catalog):
    text = params_text(catalog, "sft", 7)
    value = yaml.safe_load(text)
    data = DataConfig.model_validate({"image_size": 64, "shard_samples": 4, "parts": value["data"]["parts"]})
    check_parts(data, catalog)
    assert data.parts["pets"] == PartConfig.model_validate(PART | {"caption_field": "prompt"})
    assert data.parts["words"].kinds == {"word": 1.0}
    mixture = MixtureConfig.model_validate(value["mixture"]["sft"])
    assert mixture.seed == 7 and mixture.ratio == {"image_edit": 0, "text_to_image": 2}
    shares = catalog.shares("sft")
    assert mixture.parts == pytest.approx(
        {"pets": shares["pets"] + shares["private"], "pet_rows": shares["pet_rows"], "words": shares["words"]}, rel=1e-5
    )
    assert "# birds: licence unknown" in text and "; maker/birds has no revision" in text
    assert "    # stands in for private\n" in text and "# lines: has prompts" in text
    assert "# hidden_edits: unreleased; its stand-in edits: no hub repository" in text


def test_where_nothing_can_be_read_only_reasons_are_printed(catalog: Catalog):
    unread = {name: data_set | {"hub": NOBODY_LOOKED} for name, data_set in CATALOG["data_sets"].items() if "hub" in data_set}
    text = params_text(Catalog.model_validate(CATALOG | {"data_sets": CATALOG["data_sets"] | unread | {"words": unread["pets"]}}), "sft", 7)
    assert yaml.safe_load(text) is None and "# No set of sft can be read yet." in text


@pytest.mark.slow
def test_the_commands_read_the_catalogue_of_their_own_clone(tmp_path: Path, hub: FakeHub):
    """`deepgen fetch` brings a part's set beside the foundation, and `deepgen run` starts nothing on a part that its entry contradicts."""
    write_project(tmp_path, params_with(pets=PART))
    (tmp_path / "data").unlink()
    shutil.copytree(REPO / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data" / "catalog.yaml").write_text(yaml.safe_dump(CATALOG))

    def deepgen(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from orchestration.cli import main; main()", *words]
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(REPO), "HF_TOKEN": ""}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    dry = deepgen("fetch", "--dry-run")
    assert "--accept CC-BY-4.0" in dry.stdout and "maker--pets" in dry.stdout, dry.stderr
    done = deepgen("fetch", "--only", "pets", "--accept", "CC-BY-4.0")
    assert done.returncode == 0 and "fetched: pets" in done.stdout, done.stderr
    write = yaml.safe_load((tmp_path / "params.yaml").read_text())
    write["data"]["parts"]["pets"]["licence"] = "MIT"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(write))
    refused = deepgen("run")
    assert refused.returncode == exits.BAD_PARAMS
    assert "data.parts.pets.licence: 'MIT' given; data/catalog.yaml data_sets.pets says 'CC-BY-4.0'" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "outputs" / "dagster").exists()
