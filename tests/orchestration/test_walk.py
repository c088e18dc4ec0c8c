"""A person's walk through the pages of `deepgen ui`, in a headless browser, on the toy project.

Each step leaves a screenshot in the test's temporary folder, which pytest keeps where a test failed.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.orchestration.conftest import Toy, free_port, make_toy, stop

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PAGE_SECONDS, RUN_SECONDS = 120, 300  # a page that waits for the server; a run that waits in the queue first

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]


class Walk:
    """A page of the browser, and where it finds Dagster and MLflow."""

    def __init__(self, page: Page, toy: Toy, dagster: str, mlflow: str, pictures: Path) -> None:
        self.page, self.toy, self.dagster, self.mlflow, self.pictures = page, toy, dagster, mlflow, pictures

    def open(self, path: str) -> None:
        self.page.goto(self.dagster + path)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).first.click()

    def see(self, words: str, seconds: float = PAGE_SECONDS) -> None:
        """Wait until the page shows `words`."""
        expect(self.page.get_by_text(words).first).to_be_visible(timeout=1000 * seconds)

    def picture(self, name: str) -> None:
        self.page.screenshot(path=self.pictures / f"{len(list(self.pictures.iterdir())):02d}_{name}.png")

    def open_newest_run(self, target: str) -> None:
        """The page of the newest run, once it is one of `target`, as the list of runs names it."""
        self.open("/runs?view=runs&show_runs_within_backfills=true")
        row = self.page.locator("[class*=RunsFeedRow_rowGrid]", has=self.page.locator("a[href^='/runs/']")).first
        expect(row).to_contain_text(target)
        row.locator("a[href^='/runs/']").first.click()

    def run_ends(self, how: str) -> None:
        """Wait for the run whose page is open."""
        expect(self.page.get_by_text(how, exact=True).first).to_be_visible(timeout=1000 * RUN_SECONDS)

    def open_event_with(self, key: str) -> None:
        """On an asset's page of events, the newest whose metadata has `key`."""
        events = self.page.locator("[class*=AssetEventList_assetListRow]")
        expect(events.first).to_be_visible()
        for event in events.all():
            event.click()
            self.page.wait_for_timeout(1000)
            if self.page.locator("td", has_text=key).count():
                return
        raise AssertionError(f"no event shows {key}")

    def launch_job(self, name: str, button: str, at: str = "") -> None:
        """From the job's page to the page of the run that it starts."""
        self.open(f"/locations/orchestration.definitions/jobs/{name}{at}")
        self.press(button)
        if not at:
            self.page.get_by_text("View", exact=True).click()  # of the message that it was launched; a launchpad goes there by itself

    def aliases_in_mlflow(self) -> dict[str, str]:
        """What the registered model's page shows: alias to version."""
        self.page.goto("about:blank")  # MLflow shows what it has cached else
        self.page.goto(f"{self.mlflow}/#/models/deepgen?workflowType=machine_learning")
        self.see("@ challenger")
        rows = self.page.locator("tr, [role=row]").filter(has_text="Version ").all_inner_texts()
        words = [row.split() for row in rows if "@" in row]
        return {row[i + 1]: row[row.index("Version") + 1] for row in words for i, word in enumerate(row) if word == "@"}


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    toy, pictures = make_toy(tmp_path / "toy"), tmp_path / "pictures"
    pictures.mkdir()
    dagster, mlflow = free_port(), free_port()
    ui = toy.start("ui", "--dagster-port", str(dagster), "--mlflow-port", str(mlflow), TOY_SECONDS="1", TOY_BOARD="alignment")
    try:
        toy.wait_for("Ctrl-C stops them", 240)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM)
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.set_default_timeout(1000 * PAGE_SECONDS)
            expect.set_options(timeout=1000 * PAGE_SECONDS)
            yield Walk(page, toy, f"http://127.0.0.1:{dagster}", f"http://127.0.0.1:{mlflow}", pictures)
            browser.close()
    finally:
        stop(ui)


def test_an_engineer_materializes_watches_is_refused_promotes_and_rolls_back(walk: Walk):
    walk.toy.edit("floors: {text_to_image: 0.0", "floors: {text_to_image: 0.6")  # the toy reaches .5

    walk.open("/asset-groups")
    walk.press("Materialize all")
    walk.page.get_by_text("All", exact=True).click()  # partitions
    walk.picture("launch")
    walk.press("Launch backfill")
    walk.see("View")

    walk.open_newest_run("12 assets")  # the backfill's second run; its first are the parts of the data
    walk.page.get_by_placeholder("Filter").first.fill("alignment: ")
    walk.see("alignment: 1/4")
    walk.picture("progress")
    walk.page.get_by_placeholder("Filter").first.fill("")
    walk.run_ends("Failure")
    walk.see("text_to_image: 0.5 is below its floor 0.6")
    walk.picture("refused")

    walk.open("/assets/alignment?view=events")
    walk.open_event_with("board")
    shown = walk.page.locator("img[src^='data:image/png']").first
    expect(shown).to_be_visible()
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [256, 256]
    walk.picture("board")

    walk.open("/assets/evaluation_mr_grpo?view=checks")
    walk.page.get_by_text("floors_are_met").first.click()
    walk.see("text_to_image: 0.5 is below its floor 0.6")
    walk.picture("check")
    assert walk.aliases_in_mlflow() == {"challenger": "1"}

    walk.toy.edit("text_to_image: 0.6", "text_to_image: 0.4")
    walk.launch_job("retrain", "Materialize all")
    walk.run_ends("Success")
    assert walk.aliases_in_mlflow() == {"challenger": "1", "champion": "1"}
    walk.picture("promoted")

    walk.toy.edit("mr_grpo:\n  steps: 2", "mr_grpo:\n  steps: 3")
    walk.launch_job("retrain", "Materialize all")
    walk.run_ends("Success")
    assert walk.aliases_in_mlflow() == {"challenger": "2", "champion": "2", "previous_champion": "1"}
    walk.picture("promoted")

    walk.launch_job("rollback", "Launch Run", at="/playground")
    walk.run_ends("Success")
    walk.picture("rolled_back")
    aliases = walk.aliases_in_mlflow()
    walk.picture("rolled_back")
    assert aliases["champion"] == "1"
    walk.open("/assets/champion")
    walk.see("rollback")
    walk.picture("champion")
