"""What is fetched is what was pinned, whole, accepted and inside its folder; or it is not there. Against a hub on 127.0.0.1."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import exits
from runtime.fetch import AlreadyFetching, _alone, fetch
from runtime.fetched import FetchRefused, Wanted, fetched_files, published_at
from runtime.files import read_json
from runtime.hub import FetchFailed, Hub, part_of
from tests.runtime.fake_hub import REVISION, FakeHub, serving

REPO = Path(__file__).parents[2]
WEIGHTS = bytes(range(256)) * 40
VLM = Wanted("vlm", "maker/parts", "model", REVISION, "qwen-research")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = {
        "config.json": b'{"a": 1}',
        "dit/model.safetensors": WEIGHTS,
        "merges.txt": b"",
        "README.md": b"hello",
        "model.bin": b"x" * 2000,
    }
    with serving(files) as hub:
        yield hub


def bring(
    root: Path, hub: FakeHub, *wants: Wanted, accepted: str = "qwen-research", dry_run: bool = False, token: str | None = None
) -> str:
    said: list[str] = []
    fetch(root, wants or (VLM,), accepted.split(), Hub(hub.endpoint, token, timeout=0.5, pause=0.001), dry_run, said.append)
    return "\n".join(said)


def content(root: Path, wanted: Wanted = VLM) -> dict[str, bytes]:
    folder = root / wanted.folder
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_fetched_folder_holds_the_allowed_files_of_the_commit_and_a_receipt_of_them(tmp_path: Path, hub: FakeHub):
    said = bring(tmp_path, hub)
    assert content(tmp_path) == {"config.json": b'{"a": 1}', "dit/model.safetensors": WEIGHTS, "merges.txt": b""}
    assert VLM.folder == Path("outputs/fetched/model/maker--parts") / REVISION
    assert "left out 1 .bin, 1 .md" in said
    receipt = read_json(tmp_path / VLM.receipt)
    assert receipt["licence_accepted"] == "qwen-research" and receipt["revision"] == REVISION
    assert all(REVISION in path for path, _ in hub.requests)
    found = fetched_files(tmp_path, VLM)
    assert found is not None and found["dit/model.safetensors"].bytes == len(WEIGHTS)


def test_a_second_run_asks_nothing_and_a_damaged_file_alone_is_loaded_again(tmp_path: Path, hub: FakeHub):
    bring(tmp_path, hub)
    hub.requests.clear()
    assert "nothing to fetch" in bring(tmp_path, hub) and hub.requests == []
    (tmp_path / VLM.folder / "config.json").write_bytes(b"{}")
    bring(tmp_path, hub)
    assert [path.rsplit("/", 1)[1] for path in hub.bodies] == ["config.json"]
    assert content(tmp_path)["config.json"] == b'{"a": 1}'


def test_what_lies_there_without_a_receipt_counts_only_if_its_bytes_are_right(tmp_path: Path, hub: FakeHub):
    folder = tmp_path / VLM.folder
    (folder / "dit").mkdir(parents=True)
    (folder / "dit" / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(b'{"b": 1}')
    bring(tmp_path, hub)
    assert not [path for path in hub.bodies if path.endswith("model.safetensors")]
    assert content(tmp_path)["config.json"] == b'{"a": 1}'


def test_two_parts_of_one_repository_share_a_folder_and_keep_receipts_of_their_own(tmp_path: Path, hub: FakeHub):
    dit, rest = replace(VLM, name="dit", allow_patterns=("dit/*",)), replace(VLM, name="rest", allow_patterns=("*.txt",))
    bring(tmp_path, hub, dit, rest)
    assert set(content(tmp_path)) == {"dit/model.safetensors", "merges.txt"}
    assert set(fetched_files(tmp_path, dit) or {}) == {"dit/model.safetensors"}
    assert fetched_files(tmp_path, replace(dit, allow_patterns=("*",))) is None, "a receipt of something else"


def test_a_data_set_comes_with_its_lists_and_pictures_and_weights_without(tmp_path: Path):
    files = {"list.jsonl": b"{}", "a/b.jpg": b"picture", "rows.parquet": b"rows", "load.py": b"print()", "x.zip": b"PK"}
    with serving(files) as hub:
        data = replace(VLM, name="pets", repo_type="dataset")
        assert "left out 1 .py, 1 .zip" in bring(tmp_path, hub, data)
        assert set(content(tmp_path, data)) == {"list.jsonl", "a/b.jpg", "rows.parquet"}
        bring(tmp_path, hub)
        assert set(content(tmp_path)) == {"rows.parquet"}


def test_a_fetched_path_says_what_was_published_there():
    data = replace(VLM, repo="maker/pets-2", repo_type="dataset")
    assert published_at(str(data.folder)) == published_at(str(data.folder / "tars" / "a.tar")) == f"maker/pets-2@{REVISION}"
    for other in (str(data.folder.parent), "/" + str(data.folder), str(replace(data, revision=None).folder), "photos", "."):
        assert published_at(other) is None


def test_two_names_of_one_repository_are_loaded_and_counted_once(tmp_path: Path, hub: FakeHub):
    other = replace(VLM, name="other")
    assert "to download 10.2 kB" in bring(tmp_path, hub, VLM, other)
    assert len(hub.bodies) == 2 and fetched_files(tmp_path, VLM) == fetched_files(tmp_path, other) is not None


def test_a_listing_in_pages_is_read_to_its_end_and_at_our_own_address(tmp_path: Path, hub: FakeHub):
    hub.page_length = 2
    bring(tmp_path, hub)
    assert len(content(tmp_path)) == 3


def test_an_unaccepted_licence_is_named_and_nothing_is_asked(tmp_path: Path, hub: FakeHub):
    with pytest.raises(FetchRefused, match="--accept qwen-research"):
        bring(tmp_path, hub, accepted="mit")
    assert hub.requests == [] and not (tmp_path / "outputs").exists()


def test_a_gate_needs_a_token_which_goes_to_the_hub_and_into_no_message(tmp_path: Path, hub: FakeHub):
    gated = replace(VLM, gated=True)
    with pytest.raises(FetchRefused, match="export HF_TOKEN"):
        bring(tmp_path, hub, gated)
    assert hub.requests == []
    for code in (401, 403):
        hub.gate = code
        with pytest.raises(FetchRefused, match=f"HTTP {code}.*maker/parts, then export HF_TOKEN") as refusal:
            bring(tmp_path, hub, gated, token="hf_secret")
        assert "hf_secret" not in str(refusal.value)
    hub.gate = None
    bring(tmp_path, hub, gated, token="hf_secret")
    assert all(headers["authorization"] == "Bearer hf_secret" for _, headers in hub.requests)
    assert "hf_secret" not in (tmp_path / VLM.receipt).read_text()


def test_a_revision_or_licence_that_nobody_wrote_down_is_refused_by_name(tmp_path: Path, hub: FakeHub):
    with pytest.raises(FetchRefused, match="vlm: maker/parts has no pinned revision.*full commit hash"):
        bring(tmp_path, hub, replace(VLM, revision=None))
    with pytest.raises(FetchRefused, match="vlm: maker/parts has no licence"):
        bring(tmp_path, hub, replace(VLM, licence=None))
    birds = Wanted(
        "birds", "maker/birds", "dataset", None, None, revision_in="catalog.yaml birds.hub", licence_in="catalog.yaml birds.licence"
    )
    with pytest.raises(FetchRefused, match=r"(?s)hash into catalog.yaml birds\.hub\n.*name into catalog.yaml birds\.licence\n"):
        bring(tmp_path, hub, birds)
    with pytest.raises(FetchRefused, match="branches and tags move"):
        replace(VLM, revision="main")
    assert hub.requests == []


@pytest.mark.parametrize("path", ["config.json", "dit/model.safetensors"])
def test_other_bytes_than_the_commits_are_named_and_removed(tmp_path: Path, hub: FakeHub, path: str):
    hub.served[path] = bytes([hub.files[path][0] ^ 1]) + hub.files[path][1:]
    with pytest.raises(FetchFailed, match=f"{path} came with other bytes: expected"):
        bring(tmp_path, hub)
    assert path not in content(tmp_path) and not list(tmp_path.rglob("*.part"))
    assert fetched_files(tmp_path, VLM) is None
    hub.served = dict(hub.files)
    bring(tmp_path, hub)
    assert content(tmp_path)[path] == hub.files[path]


def test_a_body_longer_or_shorter_than_announced_is_refused(tmp_path: Path, hub: FakeHub):
    hub.served["config.json"] = b"x" * 5000
    with pytest.raises(FetchFailed, match="the commit says 8 bytes are to come, the server 5000"):
        bring(tmp_path, hub)


def test_a_connection_cut_mid_file_goes_on_where_it_was(tmp_path: Path, hub: FakeHub):
    hub.cuts["dit/model.safetensors"] = [3000, 4000]
    bring(tmp_path, hub)
    assert content(tmp_path)["dit/model.safetensors"] == WEIGHTS
    ranges = [headers.get("range") for path, headers in hub.requests if path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=3000-", "bytes=7000-"]


def test_a_run_that_gave_up_is_gone_on_with_by_the_next(tmp_path: Path, hub: FakeHub):
    hub.cuts["dit/model.safetensors"] = [3000] + [0] * 5
    with pytest.raises(FetchFailed, match="tries in vain"):
        bring(tmp_path, hub)
    hub.requests.clear()
    bring(tmp_path, hub)
    assert [headers.get("range") for path, headers in hub.requests if path.endswith("model.safetensors")] == ["bytes=3000-"]
    assert content(tmp_path)["dit/model.safetensors"] == WEIGHTS


def test_a_server_that_ignores_ranges_sends_the_whole_and_it_is_taken_once(tmp_path: Path, hub: FakeHub):
    hub.ranges, hub.cuts["dit/model.safetensors"] = False, [3000]
    bring(tmp_path, hub)
    assert content(tmp_path)["dit/model.safetensors"] == WEIGHTS


def test_a_busy_server_is_asked_again_and_a_dripping_one_given_up(tmp_path: Path, hub: FakeHub):
    hub.busy = 2
    assert "to download" in bring(tmp_path, hub, dry_run=True)
    hub.drip.add("dit/model.safetensors")
    part = part_of(tmp_path / VLM.folder / "dit" / "model.safetensors")
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:-200])  # seconds at its pace; each connection gains a little
    began = time.monotonic()
    bring(tmp_path, hub)
    ranges = [headers.get("range") for path, headers in hub.requests if path.endswith("model.safetensors")]
    assert len(ranges) > 2 and time.monotonic() - began < 60


def test_a_repository_of_pickles_is_refused(tmp_path: Path):
    with serving({"config.json": b"{}", "pytorch_model.bin": b"x" * 2000}) as hub, pytest.raises(FetchRefused, match="pickles only"):
        bring(tmp_path, hub)
    assert hub.bodies == []


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json", "a//x.json", "a\\x.json", "./x.json", "a\n.json"])
def test_a_listed_name_that_would_leave_the_folder_is_refused(tmp_path: Path, hub: FakeHub, name: str):
    hub.names["config.json"] = name
    with pytest.raises(FetchRefused, match="expected a path inside the repository"):
        bring(tmp_path, hub)
    assert hub.bodies == []


def test_a_disk_too_small_is_refused_before_anything_comes(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(FetchRefused, match="1.0 GB free, 1.0 GB needed .10.2 kB to download"):
        bring(tmp_path, hub)
    assert hub.bodies == []


def test_a_dry_run_lists_and_downloads_nothing(tmp_path: Path, hub: FakeHub):
    said = bring(tmp_path, hub, accepted="", dry_run=True)
    assert "10.2 kB" in said and "--accept qwen-research" in said and str(VLM.folder) in said
    assert hub.bodies == [] and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("place", ["http://example.org/x", "file:///etc/hostname", "ftp://127.0.0.1/x", "http://169.254.169.254/x"])
def test_a_redirect_away_from_https_is_refused(tmp_path: Path, hub: FakeHub, place: str):
    hub.redirect = place
    with pytest.raises((FetchRefused, FetchFailed), match="expected an https address|HTTP 302"):
        bring(tmp_path, hub)
    assert fetched_files(tmp_path, VLM) is None


def test_a_token_does_not_follow_a_redirect_to_another_host(tmp_path: Path, hub: FakeHub):
    with serving(hub.files) as other:
        hub.redirect = f"{other.endpoint}/maker/parts/resolve/{REVISION}/config.json"
        bring(tmp_path, hub, replace(VLM, allow_patterns=("config.json",)), token="hf_secret")
    assert other.requests and all("authorization" not in headers for _, headers in other.requests)


@pytest.mark.parametrize("endpoint", ["http://example.org", "ftp://127.0.0.1", "https://user:word@example.org", "huggingface"])
def test_an_endpoint_that_is_not_https_is_refused(endpoint: str):
    with pytest.raises(FetchRefused, match="expected an https address"):
        Hub(endpoint)


def test_two_fetches_into_one_project_do_not_mix(tmp_path: Path, hub: FakeHub):
    with _alone(tmp_path), pytest.raises(AlreadyFetching, match=f"process {os.getpid()}"):
        bring(tmp_path, hub)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_command_stopped_or_killed_mid_file_is_gone_on_with_by_the_next(tmp_path: Path, hub: FakeHub, end: signal.Signals):
    preset = (REPO / "presets" / "deepgen-5b.yaml").read_text().replace("66285546d2b821cf421d4f5eb2576359d3770cd3", REVISION)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_text(preset.replace("repo: Qwen/Qwen2.5-VL-3B-Instruct", "repo: maker/parts"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(REPO / name, tmp_path / name)
    command = [sys.executable, "-c", "from orchestration.cli import main; main()"]
    command += ["fetch", "--preset", "mine", "--only", "vlm", "--accept", "qwen-research"]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(REPO), "HF_TOKEN": ""}
    hub.drip.add("dit/model.safetensors")
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    part = part_of(tmp_path / VLM.folder / "dit" / "model.safetensors")
    while not part.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(end)
    _, said = process.communicate(timeout=60)
    if end == signal.SIGINT:
        assert process.returncode == exits.INTERRUPTED and "Go on with the same command" in said, said
    assert fetched_files(tmp_path, VLM) is None and "dit/model.safetensors" not in content(tmp_path)
    hub.drip.clear()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert content(tmp_path)["dit/model.safetensors"] == WEIGHTS
