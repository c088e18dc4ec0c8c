"""A foundation from the hub: read from what was fetched, byte by byte as its receipts say, or refused with the command that brings it."""

import shutil
from pathlib import Path

import pytest

from model.config import FoundationConfig
from runtime.fetched import FetchedFile, foundation_wants, write_receipt
from runtime.files import sha256_file
from runtime.params import load_params
from training.foundation import FoundationMismatch, check_shapes, copy_fetched

REPO = Path(__file__).parents[2]
DIT = {"repo": "maker/dit", "revision": "b" * 40, "licence": "mit"}
CONFIG = FoundationConfig.model_validate(
    {
        "source": "hub",
        "hub": {
            "vlm": {"repo": "maker/vlm", "revision": "a" * 40, "licence": "mit"},
            "dit": DIT | {"subfolder": "transformer"},
            "vae": DIT | {"subfolder": "vae"},
        },
    }
)


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    """The shipped foundation, laid out as published parts are: VLM and tokenizer in one repository, DiT and VAE in another."""
    vlm, dit, vae = foundation_wants(CONFIG)
    for folder, wanted, inner in (("vlm", vlm, ""), ("tokenizer", vlm, ""), ("transformer", dit, "transformer"), ("vae", vae, "vae")):
        shutil.copytree(REPO / "foundation" / folder, tmp_path / wanted.folder / inner, dirs_exist_ok=True)
    for wanted in (vlm, dit, vae):
        folder = tmp_path / wanted.folder
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        lines = {name: FetchedFile((folder / name).stat().st_size, sha256_file(folder / name)) for name in names if wanted.allows(name)}
        write_receipt(tmp_path, wanted, lines)
    return tmp_path


def test_fetched_parts_become_a_foundation_that_training_reads(fetched: Path):
    copy_fetched(fetched, CONFIG, fetched / "model", "mine")
    check_shapes(fetched / "model", load_params(REPO / "presets" / "tiny.yaml").model)
    assert {path.name for path in (fetched / "model" / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_a_part_that_was_not_fetched_is_named_with_the_command_that_brings_it(fetched: Path):
    dit = foundation_wants(CONFIG)[1]
    (fetched / dit.receipt).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks\n  dit: maker/dit at b+, expected in outputs/fetched.*\nBring .*`deepgen fetch --preset mine`"
    ):
        copy_fetched(fetched, CONFIG, fetched / "model", "mine")
    assert not (fetched / "model").exists()


def test_a_fetched_file_that_changed_since_is_refused(fetched: Path):
    dit = foundation_wants(CONFIG)[1]
    file = fetched / dit.folder / "transformer" / "config.json"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(FoundationMismatch, match="config.json: expected sha256.*deepgen fetch --preset mine --only dit"):
        copy_fetched(fetched, CONFIG, fetched / "model", "mine")
