"""The registered model in MLflow: versions keyed by the digest of their weights, and the aliases that point at them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import yaml

from orchestration.datasets import dataset_ids
from orchestration.dvc import DvcCommand
from runtime.environment import git_state
from runtime.exits import Plain
from runtime.files import read_json, sha256_json, tensors_digest
from runtime.mlflow_store import locked, open_store
from runtime.params import STAGES, Params, parse_params
from runtime.recipe import load_stages
from runtime.stage import stage_digests

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous_champion"
EXPORT = Path("outputs/exports/diffusers")
GATES = Path("outputs/evaluation") / STAGES[-1] / "gates.json"
REQUIREMENTS = ("torch", "transformers", "diffusers", "safetensors", "pydantic", "pyyaml", "numpy", "pillow", "einops", "peft")


class NotRegistered(Plain):
    """The registry has no such model, version or alias."""


@dataclass(frozen=True)
class Registry:
    """The model `params.registry.model_name` in the store of this clone. Opening it imports MLflow, which takes seconds."""

    root: Path
    params: Params
    client: "MlflowClient"

    @classmethod
    def open(cls, root: Path, params: Params) -> "Registry":
        from mlflow import MlflowClient

        uri = open_store(root, params.registry.experiment)
        return cls(root, params, MlflowClient(uri, uri))

    @property
    def name(self) -> str:
        return self.params.registry.model_name

    def lock(self) -> Any:
        """Held by whoever adds a version or moves an alias: MLflow itself would take both of two racers."""
        return locked(self.root / "outputs" / "registry" / "lock")

    def by_alias(self, alias: str) -> "ModelVersion | None":
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException:
            return None

    def by_digest(self, digest: str) -> "ModelVersion | None":
        """The version that holds these weights, if they were registered before."""
        return next((version for version in self.versions() if version.tags.get("model_digest") == digest), None)

    def versions(self) -> list["ModelVersion"]:
        return list(self.client.search_model_versions(f"name = '{self.name}'"))

    def _aliases(self) -> list[str]:
        from mlflow.exceptions import MlflowException

        try:
            return list(self.client.get_registered_model(self.name).aliases)
        except MlflowException:
            return []

    def tag(self, version: "ModelVersion", tags: dict[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_model_version_tag(self.name, version.version, name, value)

    def resolve(self, uri: str) -> "ModelVersion":
        """The version behind `models:/NAME@ALIAS` or `models:/NAME/NUMBER`.

        Raises:
            NotRegistered: naming what there is instead.
        """
        from mlflow.exceptions import MlflowException

        name, _, alias = uri.removeprefix("models:/").partition("@")
        name, _, number = name.partition("/")
        try:
            return self.client.get_model_version_by_alias(name, alias) if alias else self.client.get_model_version(name, number)
        except MlflowException:
            known = ", ".join(sorted(self._aliases())) or "none yet"
            raise NotRegistered(
                f"{uri}: the registry has no such model. Aliases of {self.name}: {known}. `deepgen run` makes a champion."
            ) from None

    def pipeline_folder(self, version: "ModelVersion") -> Path:
        """The folder with the version's own copy of the pipeline; fetched under outputs/registry if the store is a remote one."""
        import mlflow

        model = self.client.get_logged_model(version.source.removeprefix("models:/"))
        place = urlparse(model.artifact_location)
        if place.scheme in ("", "file"):
            folder = Path(unquote(place.path))
        else:
            target = self.root / "outputs" / "registry" / version.tags["model_digest"][:16]
            target.mkdir(parents=True, exist_ok=True)
            address, store = model.artifact_location, self.client.tracking_uri
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=str(target), tracking_uri=store))
        flavors = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]
        return folder / flavors["python_function"]["artifacts"]["pipeline"]["path"]


def register_export(root: Path, params: Params, dvc: DvcCommand) -> tuple["ModelVersion", bool]:
    """Make the exported pipeline the challenger; the version, and whether it is new. The same weights are one version, however often."""
    registry = Registry.open(root, params)
    digest = tensors_digest(root / EXPORT)
    with registry.lock():
        found = registry.by_digest(digest)
        version = found or _create_version(registry, digest, dvc)
        registry.tag(version, measured_tags(root, digest))
        registry.client.set_registered_model_alias(registry.name, CHALLENGER, version.version)
    return version, found is None


def _create_version(registry: Registry, digest: str, dvc: DvcCommand) -> "ModelVersion":
    import mlflow

    tags = _tags(registry, digest, dvc)
    experiment = registry.client.get_experiment_by_name(registry.params.registry.experiment)
    with _active_store(registry):
        with mlflow.start_run(experiment_id=experiment.experiment_id, run_name=f"challenger {digest[:6]}", tags=tags) as run:
            _log_lineage(registry)
            model = _log_model(registry, digest)
        _ensure_model(registry)
        return registry.client.create_model_version(
            registry.name, source=f"models:/{model.model_id}", run_id=run.info.run_id, model_id=model.model_id, tags=tags
        )


def _ensure_model(registry: Registry) -> None:
    from mlflow.exceptions import MlflowException

    try:
        registry.client.create_registered_model(registry.name, description="Image generation and editing from text and reference images.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def _active_store(registry: Registry) -> Iterator[None]:
    """MLflow's module-level calls go to this registry's store. They leave it in the environment, which is put back for who comes after."""
    import mlflow

    kept = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    try:
        mlflow.set_tracking_uri(registry.client.tracking_uri)
        mlflow.set_registry_uri(registry.client.tracking_uri)
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _log_model(registry: Registry, digest: str) -> Any:
    """The export as a pyfunc: its code by file (no pickle), the rooms it needs beside it, so that it loads elsewhere."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    root, evaluation = registry.root, registry.params.evaluation
    code = Path(__file__).resolve().parent.parent
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt"), ColSpec("string", "image", required=False)]),
        outputs=Schema([ColSpec("string", "image")]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", 0),
                ParamSpec("size", "long", registry.params.data.image_size),
                ParamSpec("steps", "long", evaluation.sampling_steps),
                ParamSpec("guidance", "double", float(evaluation.guidance)),
            ]
        ),
    )
    return mlflow.pyfunc.log_model(
        name="deepgen",
        python_model=str(code / "training" / "pyfunc_model.py"),
        artifacts={"pipeline": str(root / EXPORT)},
        code_paths=[str(code / "model"), str(code / "runtime")],
        signature=signature,
        pip_requirements=list(_requirements()),
        tags={"model_digest": digest},
    )


def _requirements() -> list[str]:
    """The packages that the pipeline needs, as they are installed here, without local build labels."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS]


def _tags(registry: Registry, digest: str, dvc: DvcCommand) -> dict[str, str]:
    """What made this model: weights, data, params, recorded outputs, source code, and the runs it came from."""
    root, params = registry.root, registry.params
    return {
        "model_digest": digest,
        "data_digest": sha256_json(dataset_ids(root, params)),
        "params_digest": sha256_json(parse_params((root / "params.yaml").read_text())),
        "preset": params.preset,
        **{f"dvc.{name.replace('@', '.')}": md5 for name, md5 in dvc.recorded().items()},
        **{f"parent_run.{stage}": run_id for stage, run_id in parent_runs(root).items()},
        **git_state(root),
    }


def measured_tags(root: Path, digest: str) -> dict[str, str]:
    """What the evaluation said of exactly these weights, to be read beside the version; promotion measures for itself."""
    if not (root / GATES).is_file():
        return {}
    evidence = read_json(root / GATES)
    return evidence_tags(evidence["gates"], evidence["evaluation_set_digest"]) if evidence["model_digest"] == digest else {}


def evidence_tags(gates: list[dict[str, Any]], evaluation_set: str) -> dict[str, str]:
    return {"evaluation_set_digest": evaluation_set} | {f"gate.{gate['name']}": repr(gate["value"]) for gate in gates}


def _log_lineage(registry: Registry) -> None:
    """Params, data sets by digest, and the two files that reproduce the run, on the active MLflow run."""
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    values = parse_params((registry.root / "params.yaml").read_text())
    flat = dict(_flatten(values))
    names = sorted(flat)
    for start in range(0, len(names), 100):  # MLflow takes 100 at a time
        mlflow.log_params({name: flat[name] for name in names[start : start + 100]})
    for part, identity in dataset_ids(registry.root, registry.params).items():
        split = registry.params.data.parts[part].split
        mlflow.log_input(MetaDataset(CodeDatasetSource({"path": f"outputs/shards/{part}"}), name=part, digest=identity[:32]), context=split)
    for file in ("dvc.lock", "params.yaml"):
        if (registry.root / file).is_file():
            mlflow.log_artifact(str(registry.root / file))


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, str(value)[:5000])]


def parent_runs(root: Path) -> dict[str, str]:
    """Training stage -> the MLflow run that made its present output, where that is known."""
    values = parse_params((root / "params.yaml").read_text())
    stages = load_stages(root, values)
    found = {}
    for name in STAGES:
        digests = stage_digests(root, stages[name], values)
        for note in (root / "outputs" / "runs" / name).glob("*/mlflow.json"):
            if read_json(note.with_name("run.json"))["digests"] == digests:
                found[name] = read_json(note)["run_id"]
    return found
