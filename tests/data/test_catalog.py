from collections.abc import Callable
from typing import Any

import pytest
import yaml

from data.catalog import CATALOG, Catalog, CatalogError, load_catalog, print_catalog
from runtime.params import ParamsError

MILLION = 1_000_000


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def sums(catalog: Catalog, stage: str) -> dict[tuple[str, str], float]:
    return {(task, category): count / MILLION for (s, task, category), count in catalog.totals().items() if s == stage}


def test_alignment_reads_35_million_pictures_and_6_6_million_edits(catalog):
    assert sums(catalog, "alignment") == {
        ("text_to_image", "general"): pytest.approx(35, rel=0.01),
        ("image_edit", "general"): pytest.approx(6.6, rel=0.01),
    }


def test_sft_reads_what_the_paper_names_and_the_gap_to_its_total_is_told(catalog):
    parts = sums(catalog, "sft")
    assert parts["text_to_image", "reasoning"] + parts["image_edit", "reasoning"] == pytest.approx(0.25)
    assert parts["text_to_image", "text_rendering"] == pytest.approx(0.56)
    assert parts["image_edit", "general"] == pytest.approx(6.6, rel=0.01)
    assert parts["text_to_image", "general"] == pytest.approx(10.295)
    (told,) = [total for total in catalog.stated if (total.stage, total.task, total.category) == ("sft", "text_to_image", "general")]
    assert told.count == 11 * MILLION
    assert "10.3M" in told.note


def test_a_stage_draws_the_published_ratio_and_each_set_in_proportion_to_its_size(catalog):
    assert catalog.mixtures["alignment"].ratio == {"image_edit": 1, "text_to_image": 3}
    assert catalog.mixtures["sft"].ratio == {"image_edit": 1, "text_to_image": 2}
    shares = catalog.shares("alignment")
    assert shares["cc_12m"] == pytest.approx(12 / 35.01)
    assert sum(shares.values()) == pytest.approx(2)  # one for each of two tasks
    ocr, general = (catalog.shares("mr_grpo")[f"unigenbench_train_{kind}"] for kind in ("ocr", "general"))
    assert ocr / general == pytest.approx(3 * 2861 / 7139)


def test_the_test_set_in_the_released_rl_recipe_is_read_by_no_stage(catalog):
    assert catalog.data_sets["corebench"].stages == ()
    assert not any("corebench" in mixture.weights for mixture in catalog.mixtures.values())


def test_a_build_refuses_an_unknown_licence_an_unpinned_repository_and_an_unreleased_set(catalog):
    assert any("licence unknown" in reason for reason in catalog.refusals("megalith_10m"))
    assert any("jackyhate/text-to-image-2M has no revision" in reason for reason in catalog.refusals("text_to_image_2m"))
    assert catalog.refusals("in_house_generation") == ["unreleased: use its stand-in, text_to_image_2m"]
    assert catalog.refusals("pico_banana") == ["no hub repository: name the one it comes from, with its revision"]
    assert catalog.refusals("drawn_words") == []


def test_no_revision_is_there_that_nobody_looked_at(catalog):
    """All are null until someone pins them; pinning one is then a deliberate change of this test."""
    assert {hub.revision for data_set in catalog.data_sets.values() for hub in data_set.hub} == {None}


def changed(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed("mixtures", "sft", "weights", "echo_5o", to=1), r"mixtures\.sft\.weights: names 'echo_5o', which data_sets lacks"),
        (changed("mixtures", "alignment", "weights", "blip3o_60k", to=1), r"mixtures\.alignment\.weights: \['blip3o_60k'\] stand either"),
        (changed("data_sets", "cc_12m", "stages", to=["alignment", "sft"]), r"mixtures\.sft\.weights: \['cc_12m'\] stand either"),
        (
            changed("mixtures", "mr_grpo", "ratio", "image_edit", to=1),
            "ratio.image_edit is 1, but the weights of its image_edit sets sum to 0",
        ),
        (changed("mixtures", "mr_grpo", "ratio", to={}), r"mixtures\.mr_grpo\.ratio: \{\} sums to 0"),
        (
            changed("data_sets", "in_house_editing", "stand_in", to=None),
            "in_house_editing.stand_in: None given for a set that is unreleased",
        ),
        (changed("data_sets", "cc_12m", "stand_in", to="redcaps_5m"), "cc_12m.stand_in: redcaps_5m given for a set that is public"),
        (changed("data_sets", "in_house_editing", "stand_in", to="laion"), "names 'laion', which data_sets lacks"),
        (
            changed("data_sets", "in_house_generation", "stand_in", to="self_banana_50k"),
            "'self_banana_50k' is unreleased and of text_to_image; must",
        ),
        (changed("data_sets", "in_house_editing", "stand_in", to="cc_12m"), "must be public and of image_edit"),
        (changed("data_sets", "cc_12m", "count", to=0), "data_sets.cc_12m.count: .*greater than 0"),
        (changed("data_sets", "cc_12m", "licence", to=" "), "data_sets.cc_12m.licence"),
        (changed("data_sets", "cc_12m", "licnce", to="MIT"), "data_sets.cc_12m.licnce"),
        (changed("data_sets", "nhr_edit", "hub", to=[{"repo": "iitolstykh/NHR-Edit", "revision": "main"}]), "revision"),
        (changed("data_sets", "cc_12m", "count", to=2_000_000), "stated.0: 35,000,000 .* its sets sum to 25,010,000; add a note"),
    ],
)
def test_an_impossible_catalogue_is_refused_by_entry(tmp_path, change, told):
    value = yaml.safe_load(CATALOG.read_text())
    change(value)
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(CatalogError, match=f"(?s)catalog.yaml can't be used:.*{told}"):
        load_catalog(tmp_path / "catalog.yaml")


def test_a_set_written_twice_is_refused(tmp_path):
    (tmp_path / "catalog.yaml").write_text(CATALOG.read_text().replace("\n  cc_12m:", "\n  redcaps_5m:"))
    with pytest.raises(ParamsError, match="redcaps_5m: written twice"):
        load_catalog(tmp_path / "catalog.yaml")


def test_the_printed_table_holds_every_set_and_both_totals(catalog, capsys):
    print_catalog(catalog)
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in catalog.data_sets)
    assert "35,010,000    35,000,000" in printed
    assert "10,295,000    11,000,000  the parts it names sum to 10.3M" in printed
