import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.catalog import load_catalog
from data.planning import ASSUMED, Counts, Row, count_catalog, plan, print_plan, read_rates

FIFTY_MILLION = Counts(samples=50_000_000, images=62_500_000, images_per_sample={"alignment": 1.25})
ROOT = Path(__file__).resolve().parents[2]


def figures(rows: list[Row]) -> dict[tuple[str, str], float]:
    return {(row.name, row.unit): row.value for row in rows}


def test_fifty_million_samples_take_the_figures_worked_out_on_paper():
    found = figures(plan(FIFTY_MILLION, None, cores=2, machines=1))
    assert found["shards", ""] == 12_500
    assert found["storage", "TB"] == pytest.approx(8.4, rel=0.01)
    assert found["build, bytes kept", "core-h"] == pytest.approx(33, rel=0.01)
    assert found["build, all resized", "core-h"] == pytest.approx(278, rel=0.01)
    assert found["build, bytes kept", "h"] == pytest.approx(19, rel=0.03)
    assert found["build, all resized", "h"] == pytest.approx(163, rel=0.01)
    assert found["read and write once", "h"] == pytest.approx(4.6, rel=0.02)


def test_a_build_is_never_faster_than_its_disks():
    for machines in (1, 4):
        found = figures(plan(FIFTY_MILLION, None, cores=64, machines=machines))
        assert found["build, bytes kept", "h"] == found["read and write once", "h"]
    wide = figures(plan(FIFTY_MILLION, {"io_bytes_per_s": 1e12}, cores=64, machines=1))
    assert wide["build, bytes kept", "h"] == pytest.approx(0.6, rel=0.02)


def test_machines_divide_hours_and_leave_core_hours():
    one, four = (figures(plan(FIFTY_MILLION, None, 8, machines)) for machines in (1, 4))
    assert four["build, all resized", "h"] == pytest.approx(one["build, all resized", "h"] / 4)
    assert four["build, all resized", "core-h"] == one["build, all resized", "core-h"]


def test_the_feed_follows_the_gpus_and_the_task_ratio():
    found = figures(plan(FIFTY_MILLION, {"gpu_samples_per_s": 10.0}, 8, 1, gpus=64))
    assert found["feed of alignment", "images/s"] == pytest.approx(64 * 10 * 1.25)
    assert found["feed of alignment", "cores"] == pytest.approx(64 * 10 * 1.25 / (700 * 0.8))


def test_the_catalogue_counts_each_set_once_and_an_edit_twice():
    counts = count_catalog(load_catalog())
    edits = 6_610_000 + 100_000
    assert counts.samples == 35_010_000 + 10_295_000 + 150_000 + 560_000 + edits
    assert counts.images == counts.samples + edits
    assert counts.images_per_sample == {"alignment": 5 / 4, "sft": 4 / 3}


def test_a_figure_says_whether_it_was_measured():
    basis = {(row.name, row.unit): row.basis for row in plan(FIFTY_MILLION, None, 8, 1)}
    assert {b for (name, _), b in basis.items() if name not in ("samples", "images", "shards")} == {"assumed"}
    rates = {"prepare_kept_per_s": 500.0, "bytes_per_image": 90_000.0}
    rows = plan(FIFTY_MILLION, rates, 8, 1)
    basis = {(row.name, row.unit): row.basis for row in rows}
    assert basis["storage", "TB"] == basis["build, bytes kept", "core-h"] == "measured"
    assert basis["build, bytes kept", "h"] == "assumed core_share, io_bytes_per_s"
    assert basis["build, all resized", "core-h"] == "assumed"
    assert figures(rows)["storage", "TB"] == pytest.approx(5.6, rel=0.01)


def test_the_printed_plan_shows_formulas_and_where_each_rate_comes_from(capsys):
    print_plan(plan(FIFTY_MILLION, {"decode_per_s": 650.0}, 8, 2), {"decode_per_s": 650.0})
    printed = capsys.readouterr().out
    assert "= images x bytes_per_image  [assumed]" in printed
    assert "max(core-h / (8 x 2 x core_share), read and write once)" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("decode_per_s")] == ["measured"]
    assert printed.count("assumed: ") == len(ASSUMED) - 1


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"decode_per_s": 700}, 'holds no "rates"'),
        ([1], 'holds no "rates"'),
        ({"rates": {"decode": 700}}, r"rates \['decode'\] are unknown; allowed: \['bytes_per_image'"),
        ({"rates": {"decode_per_s": 0}}, "rates.decode_per_s is 0; expected a number above 0, in images/s a core"),
        ({"rates": {"decode_per_s": "700"}}, "rates.decode_per_s is '700'"),
        ({"rates": {"decode_per_s": True}}, "rates.decode_per_s is True"),
    ],
)
def test_rates_that_say_nothing_are_refused(tmp_path, held, told):
    (tmp_path / "rates.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=f"rates.json: .*{told}"):
        read_rates(tmp_path / "rates.json")


def test_other_keys_of_a_benchmark_s_file_are_its_own(tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({"machine": "x", "rates": {"loader_per_s": 500}}))
    assert read_rates(tmp_path / "rates.json") == {"loader_per_s": 500.0}


@pytest.mark.parametrize("size", [{"cores": 0, "machines": 1}, {"cores": 1, "machines": 0}, {"cores": 1, "machines": 1, "gpus": 0}])
def test_a_plan_for_nothing_is_refused(size):
    with pytest.raises(ValueError, match="each must be at least 1"):
        plan(FIFTY_MILLION, None, **size)


def test_the_command_plans_a_preset_and_names_the_presets_there_are():
    command = [sys.executable, "-m", "data", "plan", "--cores", "32", "--machines", "2", "--preset"]
    done = subprocess.run([*command, "deepgen-5b"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("deepgen-5b: 64 GPUs; built on 2 x 32 cores")
    wrong = subprocess.run([*command, "deepgen"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "preset 'deepgen' is unknown; allowed: ['deepgen-5b', " in wrong.stderr
