"""A list of addresses reaches the open internet over https and nothing else, and no body is endless."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from runtime.fetched import FetchRefused
from runtime.guarded_img2dataset import Refused, is_public, read_bounded
from runtime.url_list import ENVIRONMENT, arguments, fetch_urls
from tests.runtime.fake_hub import REVISION, serving

STAND_IN = """
import json, multiprocessing, os, socket, sys, urllib.request
from pathlib import Path

def attempt(url):
    try:
        if url.startswith("connect "):
            socket.create_connection((url.split()[1], 443), timeout=5)
        else:
            urllib.request.urlopen(url, timeout=5)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "reached"

def main():
    options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
    urls = Path(options["url_list"]).read_text().splitlines()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers = pool.map(attempt, urls)
    Path(options["output_folder"], "answers.json").write_text(json.dumps(dict(zip(urls, answers))))
    Path(options["output_folder"], "environment.json").write_text(json.dumps(dict(os.environ)))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose environment holds a stand-in that opens, in a spawned worker as img2dataset does, each address of the list."""
    package = tmp_path / "stand_in" / "img2dataset"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(STAND_IN)
    (tmp_path / ENVIRONMENT / "bin").mkdir(parents=True)
    (tmp_path / ENVIRONMENT / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return tmp_path


def test_what_is_not_https_to_a_public_address_is_refused_in_the_workers(project: Path):
    secret = project / "secret"
    secret.write_text("x")
    with serving({"x.txt": b"x"}) as hub:
        urls = [secret.as_uri(), f"{hub.endpoint}/x.txt", "ftp://127.0.0.1/x", f"https://127.0.0.1:{hub.server_port}/x"]
        urls += [
            f"https://localhost:{hub.server_port}/x",
            f"https://0x7f000001:{hub.server_port}/x",
            "connect 169.254.169.254",
            "connect 10.0.0.1",
        ]
        (project / "list.txt").write_text("\n".join(urls))
        assert fetch_urls(project, project / "list.txt", project, "url", None, 1) == 0
    answers = json.loads((project / "answers.json").read_text())
    assert set(answers) == set(urls)
    assert all("expected an https address" in answer or "not a public address" in answer for answer in answers.values()), answers
    assert hub.requests == []


def test_neither_a_proxy_nor_a_secret_is_handed_down(project: Path):
    (project / "list.txt").write_text("ftp://127.0.0.1/x")
    fetch_urls(project, project / "list.txt", project, "url", None, 1)
    handed = json.loads((project / "environment.json").read_text())
    assert "PATH" in handed and not {"https_proxy", "HF_TOKEN"} & handed.keys()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1", "0.0.0.0", "224.0.0.1", "a"]
)
def test_a_host_inside_is_not_public(host: str):
    assert not is_public(host) and is_public("93.184.215.14")


def test_a_body_is_bounded_in_bytes_and_time_and_whole_or_an_error(tmp_path: Path):
    with serving({"x.txt": b"x" * 900}) as hub:
        address = f"{hub.endpoint}/a/b/resolve/{REVISION}/x.txt"
        with urllib.request.urlopen(address) as response:
            assert read_bounded(response) == b"x" * 900
        with urllib.request.urlopen(address) as response, pytest.raises(Refused, match="allowed: 100 bytes"):
            read_bounded(response, max_bytes=100)
        hub.cuts["x.txt"] = [500]
        with urllib.request.urlopen(address) as response, pytest.raises(Exception, match="IncompleteRead.500 bytes read, 400 more"):
            read_bounded(response)
        hub.drip.add("x.txt")
        with urllib.request.urlopen(address) as response, pytest.raises(Refused):
            read_bounded(response, max_seconds=0.2)


def test_pictures_stay_undecoded_and_opt_outs_are_kept():
    options = arguments(Path("a/list.csv.gz"), Path("out"), "URL", "TEXT", 2)
    assert {"--input_format=csv.gz", "--url_col=URL", "--caption_col=TEXT", "--disable_all_reencoding=True"} <= set(options)
    assert any("noimageai" in option for option in options)
    with pytest.raises(FetchRefused, match="told by its ending"):
        arguments(Path("list.pickle"), Path("out"), "url", None, 1)


def test_without_img2dataset_the_command_says_how_to_install_it(tmp_path: Path):
    with pytest.raises(FetchRefused, match=r"-m venv .*pip install img2dataset"):
        fetch_urls(tmp_path, tmp_path / "list.txt", tmp_path, "url", None, 1)


def test_the_guard_needs_no_package_of_ours():
    guard = Path(__file__).parents[2] / "runtime" / "guarded_img2dataset.py"
    done = subprocess.run([sys.executable, "-I", "-S", str(guard)], capture_output=True, text=True)
    assert "No module named 'img2dataset'" in done.stderr
