"""The graph as Dagster shows it: groups, owners, versions, parts as partitions."""

import dagster as dg
import pytest
from dagster._core.definitions.observe import observe

from orchestration.definitions import build_definitions
from orchestration.sources import SOURCES, source_versions, sources_asset
from tests.orchestration.conftest import PROJECT, Toy

STAGES = {"alignment", "sft", "mr_grpo"}


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return build_definitions(PROJECT)


def test_every_asset_has_a_group_a_description_and_a_kind_and_what_makes_bytes_an_owner_and_a_code_version(definitions: dg.Definitions):
    specs = {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}
    groups = {SOURCES, "data", "foundation", "evaluation", "export", "registry"} | STAGES
    assert {spec.group_name for spec in specs.values()} == groups
    assert not [name for name, spec in specs.items() if not spec.description]
    made = {name: spec for name, spec in specs.items() if spec.group_name not in (SOURCES, "registry")}
    assert not [name for name, spec in made.items() if not (spec.kinds and spec.owners and spec.code_version)]


def test_a_job_can_be_asked_for_by_words(definitions: dg.Definitions):
    """DVC and Dagster want different versions of the parser that reads them, and only one of them may be in this environment."""
    graph = definitions.resolve_asset_graph()
    chosen = dg.AssetSelection.from_string('group:"data" and +key:"mixture_sft"').resolve(graph)
    assert {key.to_user_string() for key in chosen} == {"shards", "mixture_sft"}


def test_a_part_of_the_sources_is_a_part_of_the_shards(definitions: dg.Definitions):
    graph = definitions.resolve_asset_graph()
    parts = [graph.get(dg.AssetKey(name)).partitions_def.get_partition_keys() for name in (SOURCES, "shards")]
    assert parts[0] == parts[1]


def test_a_part_that_reads_something_else_is_the_only_one_with_a_new_version(toy: Toy):
    before = source_versions(toy.root)
    toy.edit("samples: 64, seed: 1,", "samples: 64, seed: 21,")
    after = source_versions(toy.root)
    assert [name for name in before if before[name] != after[name]] == ["drawn_text_to_image"]


def test_a_new_revision_in_the_catalogue_is_a_new_version_of_the_parts_that_name_it(toy: Toy):
    toy.edit("drawn_image_edit: {", "drawn_image_edit: {data_set: my_set, ")
    catalogue = toy.root / "data" / "catalog.yaml"
    catalogue.parent.mkdir()
    versions = []
    for revision in ("a", "b"):
        catalogue.write_text(f"data_sets: {{my_set: {{hub: [{{revision: {revision * 40}}}]}}}}")
        versions.append(source_versions(toy.root))
    assert [name for name in versions[0] if versions[0][name] != versions[1][name]] == ["drawn_image_edit"]


def test_observing_the_sources_notes_a_version_a_part(toy: Toy):
    with dg.DagsterInstance.ephemeral() as instance:
        assert observe([sources_asset(toy.root, list(toy.params.data.parts))], instance=instance).success
        records = instance.fetch_observations(dg.AssetKey(SOURCES), limit=10).records
    found = {record.asset_observation.partition: record.asset_observation.data_version for record in records}
    assert found == source_versions(toy.root)


def test_what_only_dagster_reads_of_dvc_yaml_makes_nothing_stale(with_shards: Toy):
    with_shards.edit("meta: {group: data}", 'desc: Another word.\n      meta: {group: data, owner: "team:other"}', "dvc.yaml")
    assert with_shards.stages["mixture@alignment"].meta["owner"] == "team:other"
    assert with_shards.dvc.is_clean("mixture@alignment")
