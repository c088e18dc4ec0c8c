"""What an export carries besides its weights."""

from pathlib import Path
from types import SimpleNamespace

from runtime.fetched import foundation_wants
from runtime.params import load_params
from training.export import card, carry_licences

REPO = Path(__file__).parents[2]


def test_licences_of_what_was_fetched_are_named_and_their_files_go_along(tmp_path: Path):
    params = load_params(REPO / "presets" / "deepgen-5b.yaml")
    wants = {wanted.name: wanted for wanted in foundation_wants(params.foundation)}
    for name, file in {"vlm": "LICENSE", "dit": "NOTICE.txt"}.items():
        folder = tmp_path / wants[name].folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(f"{file} of {name}")
    out = tmp_path / "out"
    upstream = carry_licences(SimpleNamespace(root=tmp_path, params=params), out)
    assert {row["name"]: row["licence"] for row in upstream} == {name: wanted.licence for name, wanted in wants.items()}
    assert (out / "licences" / "vlm" / "LICENSE").read_text() == "LICENSE of vlm"
    assert (out / "licences" / "dit" / "NOTICE.txt").read_text() == "NOTICE.txt of dit"
    shown = card({"preset": "x", "model_digest": "a" * 64, "evaluation": {}, "licences": ["MIT"], "upstream": upstream})
    assert all(f"{wanted.repo} ({wanted.licence})" in shown for wanted in wants.values())


def test_a_foundation_of_this_project_names_nobody_and_takes_its_licence_file_along(tmp_path: Path):
    params = load_params(REPO / "presets" / "tiny.yaml")
    (tmp_path / "foundation").mkdir()
    (tmp_path / "foundation" / "LICENSE").write_text("mine")
    assert carry_licences(SimpleNamespace(root=tmp_path, params=params), tmp_path / "out") == []
    assert (tmp_path / "out" / "licences" / "foundation" / "LICENSE").read_text() == "mine"
