"""Stages as assets: what is skipped, what is recorded, and what is refused."""

import os
import subprocess
import sys
import time

import dagster as dg
import pytest

from orchestration.assets import asset_name, group_stages, upstream
from orchestration.data_checks import check_shards
from orchestration.model_checks import improved, not_finite
from orchestration.stage_process import StageFailed, command_of
from runtime import exits
from runtime.params import parse_params
from runtime.published import ShardMismatch
from runtime.recipe import load_stages
from tests.orchestration.conftest import PROJECT, Toy, cached, failure_text


def project_stages():
    return load_stages(PROJECT, parse_params((PROJECT / "params.yaml").read_text()))


def test_every_stage_of_dvc_yaml_is_an_asset_and_partitioned_ones_share_one():
    names = set(group_stages(project_stages()))
    assert {"shards", "mixture_sft", "alignment", "sft", "mr_grpo", "evaluation_sft", "export_diffusers"} <= names
    assert not any("@" in name for name in names)


def test_edges_are_the_inputs_written_in_dvc_yaml():
    stages = project_stages()
    edges = {asset_name(stage): upstream(stage, stages) for stage in stages.values()}
    assert edges["mixture_sft"] == ["shards"]
    assert edges["sft"] == ["alignment", "latents", "mixture_sft"]
    assert edges["evaluation_mr_grpo"] == ["mr_grpo", "shards"]
    assert edges["shards"] == []


def test_definitions_load_in_three_seconds_without_torch_or_mlflow():
    code = (
        "import sys; from orchestration.definitions import defs; d = defs(); d.resolve_job_def('pipeline'); d.resolve_job_def('retrain')\n"
        "print([name for name in ('torch', 'mlflow', 'transformers', 'pandas') if name in sys.modules])"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - began < 3 * (1 + os.getloadavg()[0])  # the bound is for an idle core


def test_python_in_a_command_is_this_interpreter():
    assert command_of(project_stages()["sft"]) == [sys.executable, "-m", "training", "sft"]


def test_a_materialized_stage_is_clean_for_dvc_and_repro_finds_nothing_to_do(with_shards: Toy):
    toy = with_shards
    result = toy.materialize("mixture_sft")
    assert result.success and cached(result, "mixture_sft") == [False]
    assert toy.dvc.is_clean("mixture@sft") and toy.dvc.is_clean("shards@drawn_image_edit")
    done = subprocess.run([os.environ["DVC_BIN"], "repro", "mixture@sft"], cwd=toy.root, capture_output=True, text=True, check=True)
    assert "Running stage" not in done.stdout


def test_a_clean_stage_is_skipped_and_keeps_its_data_version(with_shards: Toy):
    toy = with_shards
    first, second = toy.materialize("mixture_sft"), toy.materialize("shards", "mixture_sft")
    assert cached(second, "mixture_sft") == [True] and cached(second, "shards") == [True] * 4
    versions = [run.asset_materializations_for_node("mixture_sft")[0].tags["dagster/data_version"] for run in (first, second)]
    assert versions[0] == versions[1] == toy.dvc.recorded()["mixture@sft"]


def test_a_skipped_stage_still_shows_what_was_reported_when_it_was_made(with_shards: Toy):
    with dg.DagsterInstance.ephemeral() as instance:
        first, second = (with_shards.materialize("shards", "mixture_sft", instance=instance) for _ in range(2))
    for name in ("mixture_sft", "shards"):
        before, after = (run.asset_materializations_for_node(name) for run in (first, second))
        assert len(before) == len(after)
        for made, skipped in zip(before, after, strict=True):
            assert {**skipped.metadata, "cached": None} == {**made.metadata, "cached": None}
    assert "fingerprint" in second.asset_materializations_for_node("mixture_sft")[0].metadata


def test_a_stage_that_dvc_ran_is_clean_for_dagster(with_shards: Toy):
    toy = with_shards
    subprocess.run([os.environ["DVC_BIN"], "repro", "mixture@sft"], cwd=toy.root, check=True, capture_output=True)
    assert cached(toy.materialize("mixture_sft"), "mixture_sft") == [True]


def test_a_deleted_or_edited_output_is_made_again(with_shards: Toy):
    toy = with_shards
    path = toy.root / "outputs" / "mixture" / "alignment.json"
    good = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(good.replace(b"1", b"2", 1))):
        spoil()
        assert cached(toy.materialize("mixture_alignment"), "mixture_alignment") == [False]
        assert path.read_bytes() == good


def test_a_shard_that_is_not_the_one_in_its_manifest_fails_the_check_by_name(with_shards: Toy):
    toy = with_shards
    stage = toy.stages["shards@drawn_image_edit"]
    assert check_shards(toy.root, stage)[0] == []
    shard = toy.root / "outputs" / "shards" / "drawn_image_edit" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"d", b"e", 1))
    with pytest.raises(ShardMismatch, match="drawn_image_edit/shard-000000.tar.*Rebuild"):
        check_shards(toy.root, stage)
    shard.unlink()
    with pytest.raises(ShardMismatch, match="missing"):
        check_shards(toy.root, stage)


def test_params_that_change_before_the_commit_are_refused_and_the_output_is_kept(with_shards: Toy, monkeypatch: pytest.MonkeyPatch):
    toy = with_shards
    monkeypatch.setenv("TOY_EDIT", "mixture@sft")
    result = toy.materialize("mixture_sft")
    assert not result.success
    assert "params changed while it ran" in failure_text(result, "mixture_sft")
    assert "mixture@sft" not in toy.dvc.recorded()
    assert (toy.root / "outputs" / "mixture" / "sft.json").exists()


def test_a_failing_command_is_told_with_its_code_its_last_lines_and_what_to_type(with_shards: Toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_FAIL", "alignment")
    result = with_shards.materialize("alignment")
    assert "failed with exit code 7" in failure_text(result, "alignment") and "deepgen run" in failure_text(result, "alignment")
    data = result.failure_data_for_node("alignment").user_failure_data
    assert "the last words of a failing stage" in data.metadata["last_lines"].value
    assert data.metadata["exit_code"].value == 7


def test_an_interrupted_stage_reads_as_resumable():
    error = StageFailed(project_stages()["sft"], exits.INTERRUPTED, [])
    assert "interrupted; its state is saved" in str(error) and "goes on from there" in str(error)


def test_what_is_not_a_finite_number_is_found_wherever_it_lies():
    assert not_finite({"a": {"b": [1.0, 2]}}) == []
    assert not_finite({"a": {"b": [1.0, float("nan")]}, "c": float("inf"), "d": None}) == ["a.b.1 is nan", "c is inf", "d is None"]
    assert not_finite({}) == ["there are no metrics"]


def test_a_stage_learnt_if_its_loss_fell_or_its_reward_rose():
    assert improved("sft", {"loss_first": 1.0, "loss_last": 0.5}) == []
    assert improved("sft", {"loss_first": 1.0, "loss_last": 1.5}) == ["loss went from 1 to 1.5"]
    assert improved("sft", {"loss_first": 1.0, "loss_last": float("nan")}) != []
    assert improved("mr_grpo", {"reward_first": 0.1, "reward_last": 0.2}) == []


def test_metrics_with_nan_stop_what_comes_after_in_the_same_run(with_shards: Toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_NAN", "alignment")
    result = with_shards.materialize("alignment", "evaluation_alignment")
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    assert not checks["numbers_are_finite"].passed and "loss_last is nan" in checks["numbers_are_finite"].description
    assert "alignment" in with_shards.dvc.recorded()
    assert not (with_shards.root / "outputs" / "evaluation").exists()
