"""The registered model in MLflow: versions keyed by the digest of their weights, and the aliases that point at them."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import yaml

from orchestration.datasets import dataset_ids, recipe_digest, training_samples
from orchestration.dvc import DvcCommand
from orchestration.provenance import environment_tags, log_provenance
from runtime.environment import git_state
from runtime.exits import Plain
from runtime.files import folder_files, read_json, sha256_file, sha256_json, tensors_digest
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
KEPT = "evaluation"  # the folder of GATES, among the artifacts of the run that registered a version
REQUIREMENTS = ("torch", "transformers", "diffusers", "safetensors", "pydantic", "pyyaml", "numpy", "pillow", "einops", "peft")


ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for a missing model or version, and a missing alias
AGAIN = "`deepgen run` registers the export again."
PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".bin", ".pt", ".pth", ".ckpt")


class NotRegistered(Plain):
    """The registry has no such model, version or alias."""


class Untrusted(Plain):
    """A version's files are missing, are not the registered ones, or hold a pickle: it is neither promoted nor served."""


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
        """The version behind an alias, None if there is none. A store that doesn't answer is an error, not an absence."""
        return _if_present(lambda: self.client.get_model_version_by_alias(self.name, alias))

    def get(self, number: str) -> "ModelVersion | None":
        """A version by its number, None if there is none, or no longer."""
        return _if_present(lambda: self.client.get_model_version(self.name, number))

    def point(self, alias: str, number: str) -> None:
        self.client.set_registered_model_alias(self.name, alias, number)

    def by_digest(self, digest: str) -> "ModelVersion | None":
        """The newest version that holds these weights, if they were registered before."""
        found = [version for version in self.versions() if version.tags.get("model_digest") == digest]
        return max(found, key=lambda version: int(version.version), default=None)

    def is_intact(self, version: "ModelVersion") -> bool:
        """Whether a version's files are the ones that were registered."""
        try:
            self.verify(version)
        except Untrusted:
            return False
        return True

    def versions(self) -> list["ModelVersion"]:
        return list(self.client.search_model_versions(f"name = '{self.name}'"))

    def tag(self, version: "ModelVersion", tags: dict[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_model_version_tag(self.name, version.version, name, value)

    def resolve(self, uri: str) -> "ModelVersion":
        """The version behind `models:/NAME@ALIAS` or `models:/NAME/NUMBER`.

        Raises:
            NotRegistered: naming what there is instead.
        """
        name, _, alias = uri.removeprefix("models:/").partition("@")
        name, _, number = name.partition("/")
        if name != self.name:
            raise NotRegistered(f"{uri}: the model of this project is {self.name} (registry.model_name in params.yaml), not {name}.")
        found = self.by_alias(alias) if alias else self.get(number)
        if found is None:
            model = _if_present(lambda: self.client.get_registered_model(self.name))
            known = ", ".join(sorted(model.aliases)) if model is not None and model.aliases else "none yet"
            raise NotRegistered(f"{uri}: the registry has no such model. Aliases of {self.name}: {known}. `deepgen run` makes a champion.")
        return found

    def pipeline_folder(self, version: "ModelVersion") -> Path:
        """The folder with the version's own copy of the pipeline.

        Raises:
            Untrusted: there is none, or something in the version is a pickle.
        """
        return _pipeline_in(self._trusted_folder(version))

    def _trusted_folder(self, version: "ModelVersion") -> Path:
        model = _if_present(lambda: self.client.get_logged_model(version.source.removeprefix("models:/")))
        if model is None:
            raise Untrusted(f"{_named(version)} was not registered by deepgen: its source is {version.source}. {AGAIN}")
        folder = self.local_folder(model)
        if not (folder / "MLmodel").is_file():
            raise Untrusted(f"{_named(version)}: its files are gone from {folder}. {AGAIN}")
        if pickle := find_pickle(folder):
            raise Untrusted(f"{_named(version)}: {folder / pickle} is or names a pickle, and loading that would run whatever it holds.")
        return folder

    def local_folder(self, model: Any) -> Path:
        """The folder with all files of a logged model; fetched under outputs/registry if the store is a remote one."""
        import mlflow

        place = urlparse(model.artifact_location)
        if place.scheme in ("", "file"):
            return Path(unquote(place.path))
        target = self.root / "outputs" / "registry" / "fetched" / model.model_id
        target.mkdir(parents=True, exist_ok=True)
        address, store = model.artifact_location, self.client.tracking_uri
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=str(target), tracking_uri=store))

    def verify(self, version: "ModelVersion") -> tuple[Path, str]:
        """A version's pipeline and the digest of its weights, once its files are shown to be the ones that were registered.

        Raises:
            Untrusted: they are not.
        """
        folder = self._trusted_folder(version)
        try:
            pipeline = _pipeline_in(folder)
            weights, files = tensors_digest(pipeline), files_digest(folder)
        except (OSError, ValueError, KeyError, TypeError, struct.error, OverflowError, MemoryError) as error:
            raise Untrusted(f"{_named(version)}: its files were changed, they can't be read any more ({error}). {AGAIN}") from None
        registered = version.tags.get("model_digest")
        if weights != registered:
            raise Untrusted(
                f"{_named(version)} holds weights {weights[:12]}, it was registered with {registered}: its files were changed. {AGAIN}"
            )
        if files != version.tags.get("files_digest"):
            raise Untrusted(f"{_named(version)}: settings or code beside its weights are not what was registered. {AGAIN}")
        return pipeline, weights


def _named(version: "ModelVersion") -> str:
    return f"version {version.version} of {version.name}"


def _pipeline_in(folder: Path) -> Path:
    flavors = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]
    return folder / flavors["python_function"]["artifacts"]["pipeline"]["path"]


def _if_present(ask: Callable[[], Any]) -> Any:
    """What MLflow answers; None where it says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None


def files_digest(folder: Path) -> str:
    """Digest of a version's files but for its weights, which have their own, and for the note that MLflow leaves where it loads a model."""
    files = [file for file in folder_files(folder) if file.suffix != ".safetensors" and file.name != "registered_model_meta"]
    return sha256_json([(str(file.relative_to(folder)), sha256_file(file)) for file in files])


def find_pickle(folder: Path) -> str | None:
    """The first file under `folder` that is a pickle, by its name or by its first bytes, or an MLmodel that has MLflow load one."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as handle:
            head = handle.read(4)
        pickled = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        zipped = head == b"PK\x03\x04"  # what torch.save makes
        looks_it = file.suffix != ".safetensors" and (pickled or zipped)
        if looks_it or file.suffix in PICKLES or (file.name == "MLmodel" and not _is_code_model(file)):
            return str(file.relative_to(folder))
    return None


def _is_code_model(description: Path) -> bool:
    """Whether MLflow loads a model from its source file, and from nothing else."""
    try:
        (function,) = yaml.safe_load(description.read_text())["flavors"].values()
        return function["loader_module"] == "mlflow.pyfunc.loaders.code_model" and "python_model" not in function
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return False


def register_export(root: Path, params: Params, dvc: DvcCommand) -> tuple["ModelVersion", bool]:
    """Make the exported pipeline the challenger; the version, and whether it is new.

    The same weights are one version, however often, unless its files were damaged meanwhile: then they are registered anew.

    Raises:
        Untrusted: the export holds a pickle.
    """
    if pickle := find_pickle(root / EXPORT):
        raise Untrusted(f"{EXPORT / pickle} is a pickle, which runs code when it is loaded: it is not registered.")
    registry = Registry.open(root, params)
    digest = tensors_digest(root / EXPORT)
    with registry.lock():
        found = registry.by_digest(digest)
        if found is not None and not registry.is_intact(found):
            found = None
        version = found or _create_version(registry, digest, dvc)
        registry.tag(version, measured_tags(root, digest))
        registry.point(CHALLENGER, version.version)
    return version, found is None


def _create_version(registry: Registry, digest: str, dvc: DvcCommand) -> "ModelVersion":
    import mlflow

    tags = _tags(registry, digest, dvc)
    experiment = registry.client.get_experiment_by_name(registry.params.registry.experiment)
    with _active_store(registry):
        with mlflow.start_run(experiment_id=experiment.experiment_id, run_name=f"challenger {digest[:6]}", tags=tags) as run:
            _log_lineage(registry)
            _keep_evaluation(registry.root, digest)
            model = _log_model(registry, digest)
        _ensure_model(registry)
        files = files_digest(registry.local_folder(registry.client.get_logged_model(model.model_id)))
        return registry.client.create_model_version(
            registry.name,
            source=f"models:/{model.model_id}",
            run_id=run.info.run_id,
            model_id=model.model_id,
            tags=tags | {"files_digest": files},
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
    """What made this model: weights, data, params, recorded outputs, source code, packages, and the runs it came from."""
    root, params = registry.root, registry.params
    return {
        "model_digest": digest,
        "data_digest": sha256_json(dataset_ids(root, params)),
        "params_digest": sha256_json(parse_params((root / "params.yaml").read_text())),
        "recipe_digest": recipe_digest(root),
        "samples": str(training_samples(root, params)),
        "preset": params.preset,
        **{f"dvc.{name.replace('@', '.')}": md5 for name, md5 in dvc.recorded().items()},
        **{f"parent_run.{stage}": run_id for stage, run_id in parent_runs(root).items()},
        **environment_tags(),
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


def _keep_evaluation(root: Path, digest: str) -> None:
    """Put the evaluation of these weights, pictures and all, on the active MLflow run: in the clone the next one takes its place."""
    import mlflow

    if (root / GATES).is_file() and read_json(root / GATES)["model_digest"] == digest:
        mlflow.log_artifacts(str((root / GATES).parent), KEPT)


def _log_lineage(registry: Registry) -> None:
    """Params, data sets by digest, what reproduces the run and what is told of its making, on the active MLflow run."""
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
    log_provenance(registry.root, registry.params)


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
