"""The stage commands of this room: build a part's shards, resolve a stage's mixture."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from data.build import TABLES, Stopped, build_part, plan_chunks
from data.catalog import load_catalog
from data.config import MixtureConfig
from data.data_sets import check_parts, located
from data.loader import read_part
from data.mixture import cycle, part_counts, resolve_mixture
from data.pictures import save_facts, save_samples, save_shares
from data.pinning import check_content
from data.removal import find_contamination, find_removed, leak_policy
from data.store import upload_tars
from runtime.exits import Interrupted
from runtime.files import write_json
from runtime.progress import Progress
from runtime.published import verify_part
from runtime.stage import StageRun
from runtime.store import Store, shard_store

SHOWN = 24  # samples that are decoded before a part is published, and drawn
COUNTED = 2000  # samples a task whose parts are counted


def run_shards(run: StageRun) -> None:
    """Build `outputs/shards/<part>/`; chunks and shards finished by an interrupted build are kept.

    With `data.store` the tars are brought there first, and what is published is the manifest that names them, index and tables.

    Raises:
        ParamsError: a part differs from the catalogue's entry that it names, or the catalogue refuses that entry.
        FileNotFoundError: what the part reads is not there; for a data set, with the command that fetches it.
        OtherContent: it holds other bytes than were pinned or published.
        StoreError: `data.store` can't be opened or written.
        Interrupted: asked to stop; the same command goes on.
    """
    name = run.stage.key or ""
    data = run.params.data
    catalog = load_catalog()
    check_parts(data, catalog)
    if data.store is not None:
        Store(data.store).check_writable()
    data = located(name, run.params, catalog, run.root)
    check_content(name, data.parts[name], run.root)
    folder = run.folder / "shards"
    chunks = plan_chunks(name, data, run.root)
    workers = max(1, min(len(os.sched_getaffinity(0)), len(chunks) // 4))  # a worker costs seconds to start
    try:
        with Progress(chunks[-1].stop, "record", f"shards {name}", run.folder / "progress.jsonl") as progress:
            manifest = build_part(name, data, folder, run.root, workers, progress.update, lambda: bool(run.stop))
    except Stopped:
        raise Interrupted(f"stopped between shards; what is done is in {folder.relative_to(run.root)}, the same command goes on") from None
    out = run.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if data.store is not None:
        manifest |= {"store": data.store}  # no part of the dataset id: the same data may lie anywhere
        _upload(run, folder, manifest)
    tars = [] if data.store is not None else [shard["name"] for shard in manifest["shards"]]
    for file in [*TABLES, *tars]:
        os.link(folder / file, out / file)
    write_json(out / "manifest.json", manifest)
    shown = list(read_part(out, SHOWN)) if manifest["samples"] else []  # what can't be read back is not published
    write_json(out / "manifest.json", manifest | {"decoded": len(shown)})
    run.publish(out)
    shutil.rmtree(folder)
    counts = ", ".join(f"{ending} {number}" for ending, number in manifest["counts"].items())
    reasons = ", ".join(f"{reason} {number}" for reason, number in manifest["reasons"].items()) or "nothing set aside"
    print(f"{name}: {counts} ({reasons})", flush=True)
    pictures = {"facts": run.folder / "facts.png"}
    save_facts(run.out, pictures["facts"])
    if shown:
        pictures = {"a look inside": run.folder / "samples.png"} | pictures
        save_samples(shown, pictures["a look inside"])
    size = sum(shard["bytes"] for shard in manifest["shards"])
    facts = {"samples": manifest["samples"], "shards": len(manifest["shards"]), "bytes": size, "dataset_id": manifest["dataset_id"]}
    run.report(facts | manifest["counts"] | {"reasons": reasons}, pictures)


def _upload(run: StageRun, folder: Path, manifest: dict[str, Any]) -> None:
    """Bring the tars into the store; those that an interrupted upload brought are left as they are."""
    store = shard_store(manifest)
    assert store is not None, "upload is for manifests that name a store"
    tars = len(manifest["shards"])
    with Progress(tars, "tar", f"upload {manifest['part']}", run.folder / "progress.jsonl") as progress:
        for _ in upload_tars(folder, manifest, store):
            progress.update(1)
            if run.stop and progress.done < tars:
                raise Interrupted(f"stopped with {progress.done} of {tars} tars in {store.folder}; the same command goes on from there")


def run_mixture(run: StageRun) -> None:
    """Write `outputs/mixture/<stage>.json`, after checking every part it reads, and that no evaluation sample is among them.

    Tars in a store are not fetched for it: they must be there with their sizes, and the loader checks each image that it reads.

    Raises:
        ParamsError: a part differs from the catalogue's entry that it names, or the catalogue refuses that entry.
        EvaluationLeak: a part whose policy is fail holds samples of an evaluation set.
        FileNotFoundError: a part that is not built.
    """
    check_parts(run.params.data, load_catalog())
    stage = run.stage.key or ""
    config = run.params.mixture[stage]  # type: ignore[index]
    mixture = _resolve(run, stage, config)
    if config.auxiliary is not None:
        mixture["auxiliary"] = _resolve(run, stage, config.auxiliary)
    picture = run.folder / "shares.png"
    save_shares(mixture, picture)
    write_json(run.folder / "mixture.json", mixture)
    run.publish(run.folder / "mixture.json")
    samples = {f"{task} samples": sum(part["samples"] for part in parts) for task, parts in mixture["tasks"].items()}
    taken = {f"{name} taken out": sum(rows.values()) for name, rows in mixture["taken_out"].items() if rows}
    run.report({"mixture_hash": mixture["mixture_hash"], "cycle": ", ".join(cycle(mixture))} | samples | taken, {"shares": picture})


def _resolve(run: StageRun, stage: str, config: MixtureConfig) -> dict[str, Any]:
    shards = run.root / "outputs" / "shards"
    for name, weight in config.parts.items():
        if weight > 0 and (shards / name).is_dir():
            verify_part(shards / name, whole=False)
    removed = find_removed(stage, config, run.params.data, shards, run.root)
    mixture = resolve_mixture(stage, config, shards, {name: sorted(rows) for name, rows in removed.items()})
    names = [part["part"] for parts in mixture["tasks"].values() for part in parts]
    contamination = find_contamination(mixture, config, run.params.data, shards, run.root)
    for name, found in contamination.items():
        print(f"{stage}: {found['items']} of the {found['of']} items of {name} are trained on; its scores will say so", flush=True)
    mixture |= {
        "realised": {"samples": COUNTED, "parts": part_counts(mixture, COUNTED)},
        "evaluation_leak": {name: leak_policy(config, run.params.data, name) for name in names},
        "taken_out": {name: dict(Counter(str(row.reason) for row in rows.values())) for name, rows in removed.items()},
    }
    return mixture | ({"contamination": contamination} if contamination else {})
