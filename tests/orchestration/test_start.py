from pathlib import Path

import pytest
import yaml

from orchestration.start import CannotStart, copy_champion, set_start
from runtime.files import read_json
from runtime.params import parse_params
from runtime.recipe import load_stages
from runtime.stage import stage_digests

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text((PROJECT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text((PROJECT / "presets" / "smoke.yaml").read_text())
    (tmp_path / "outputs").mkdir()
    return tmp_path


@pytest.mark.parametrize("preset", [preset.stem for preset in (PROJECT / "presets").glob("*.yaml")])
def test_the_start_is_one_word_of_params_and_back_again(tmp_path, preset):
    params = tmp_path / "params.yaml"
    before = (PROJECT / "presets" / f"{preset}.yaml").read_text()
    params.write_text(before)
    set_start(params, "champion")
    assert yaml.safe_load(params.read_text())["sft"]["start"] == "champion"
    set_start(params, "alignment")
    assert params.read_text() == before


def test_params_of_another_layout_stay_as_they_are(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("sft: {start: alignment}\n")
    with pytest.raises(CannotStart, match="Write under sft:\n  start: champion"):
        set_start(params, "champion")
    assert params.read_text() == "sft: {start: alignment}\n"


def test_sft_reads_the_champion_s_copy_and_says_what_makes_it(clone):
    set_start(clone / "params.yaml", "champion")
    values = parse_params((clone / "params.yaml").read_text())
    stage = load_stages(clone, values)["sft"]
    assert "outputs/champion" in stage.inputs and "outputs/alignment" not in stage.inputs
    for folder in ("outputs/latents", "outputs/mixture"):
        (clone / folder).mkdir()
    (clone / "outputs" / "mixture" / "sft.json").write_text("{}")
    for code in stage.code:
        (clone / code).mkdir()
    with pytest.raises(FileNotFoundError, match=r"outputs/champion is missing; make it with `deepgen start-from champion`"):
        stage_digests(clone, stage, values)
    for version in ("1", "2"):  # the second takes the place of the first
        (clone / version).mkdir()
        (clone / version / "model_index.json").write_text(version)
        copy_champion(clone, clone / version, version, f"digest {version}")
    assert (clone / "outputs" / "champion" / "model" / "model_index.json").read_text() == "2"
    assert read_json(clone / "outputs" / "champion" / "version.json") == {"version": "2", "model_digest": "digest 2"}
    assert "input outputs/champion" in stage_digests(clone, stage, values)
