"""What tests of promotion have in common: second models, evaluated and registered, and refusals that must change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.dvc import DvcCommand
from orchestration.promotion import promote
from orchestration.promotion_log import read_history
from orchestration.registry import CHALLENGER, CHAMPION, EXPORT, GATES, PREVIOUS, Registry, register_export
from runtime.exits import Plain
from runtime.files import read_json, tensors_digest, write_json
from tests.orchestration.conftest import Toy
from tests.orchestration.toy import write_weights

SAMPLES = GATES.with_name("samples.json")


class NothingChanged(DvcCommand):
    """DVC's word without asking it, where the test is about something else."""

    def changes(self, name: str) -> list[Any]:
        return []


def second_model(toy: Toy, strict: float = 0.5, seed: float = 9.0) -> str:
    """Other weights, evaluated, exported and recorded, as a second run would leave them; their digest."""
    for folder in (toy.root / "outputs" / "mr_grpo" / "model", toy.root / EXPORT):
        write_weights(folder / "dit" / "model.safetensors", [seed])
    digest = tensors_digest(toy.root / EXPORT)
    measure(toy, strict, digest)
    record(toy)
    return digest


def measure(toy: Toy, strict: float, digest: str) -> None:
    """Gates and verdicts as an evaluation writes them; `strict` is a multiple of 1/8, for there are eight samples."""
    edit_gates(toy, strict, model_digest=digest)
    verdicts = {
        task: [row | {"strict": i < strict * len(rows)} for i, row in enumerate(rows)]
        for task, rows in read_json(toy.root / SAMPLES).items()
    }
    write_json(toy.root / SAMPLES, verdicts)


def edit_gates(toy: Toy, strict: float | None = None, **changes: Any) -> None:
    """Change the gate file alone."""
    evidence = read_json(toy.root / GATES) | changes
    if strict is not None:
        evidence["gates"] = [row | {"value": strict} for row in evidence["gates"]]
    (toy.root / GATES).write_text(json.dumps(evidence))


def record(toy: Toy) -> None:
    toy.dvc.commit(toy.stages["evaluation@mr_grpo"])


def challenge(toy: Toy) -> Registry:
    """Register the export."""
    register_export(toy.root, toy.params, toy.dvc)
    return open_registry(toy)


def open_registry(toy: Toy) -> Registry:
    return Registry.open(toy.root, toy.params)


def aliases(toy: Toy) -> dict[str, str]:
    """Alias -> version."""
    registry = open_registry(toy)
    found = {alias: registry.by_alias(alias) for alias in (CHALLENGER, CHAMPION, PREVIOUS)}
    return {alias: str(version.version) for alias, version in found.items() if version is not None}


def refused(toy: Toy, words: str, dvc: DvcCommand | None = None) -> str:
    """Promotion refuses in these words, and nothing has moved; all that it says."""
    before, rows = aliases(toy), read_history(toy.root)
    with pytest.raises(Plain, match=words) as refusal:
        promote(toy.root, toy.params, dvc or toy.dvc)
    assert aliases(toy) == before and read_history(toy.root) == rows
    return str(refusal.value)


def weights_of(registry: Registry, number: str) -> Path:
    """The file with the weights of a version."""
    return registry.pipeline_folder(registry.client.get_model_version(registry.name, number)) / "dit" / "model.safetensors"
