"""`dvc.yaml`, read: the stages, their commands, inputs and outputs are written there and nowhere else."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PLACE = re.compile(r"\$\{([^}]+)\}")


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, with `foreach` unrolled and templates filled.

    name is DVC's (`sft`, `shards@drawn_edit`); group and key are its two halves; deps and outs are paths relative to the root;
    params are dotted keys of params.yaml.
    """

    name: str
    group: str
    key: str | None
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    desc: str = ""
    meta: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def code(self) -> tuple[str, ...]:
        """Dependencies that are source code; the others are inputs made by other stages or kept in git."""
        return tuple(dep for dep in self.deps if dep.split("/")[0] in CODE)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dep for dep in self.deps if dep not in self.code)


CODE = ("data", "model", "training", "runtime", "orchestration")


def overlap(a: str, b: str) -> bool:
    """Whether two paths are one, or one lies inside of the other."""
    return a == b or a.startswith(b.rstrip("/") + "/") or b.startswith(a.rstrip("/") + "/")


def stages_above(stage: Stage, stages: dict[str, Stage]) -> set[str]:
    """The stages whose outputs this one reads: as they are, a part of them, or a folder that holds them."""
    return {
        other.name
        for path in stage.inputs  # outermost: a part of the data has none, and there may be thousands of parts
        for other in stages.values()
        for out in other.outs
        if other.name != stage.name and overlap(path, out)
    }


def look_up(params: dict[str, Any], dotted: str) -> Any:
    """Value at `a.b.c`.

    Raises:
        KeyError: naming the dotted key that params.yaml lacks.
    """
    value: Any = params
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(f"params.yaml has no key {dotted!r}, which dvc.yaml uses.")
        value = value[part]
    return value


def load_stages(root: Path, params: dict[str, Any]) -> dict[str, Stage]:
    """Every stage of `root`/dvc.yaml by its DVC name, in the order of the file."""
    stages: dict[str, Stage] = {}
    for group, spec in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].items():
        if "foreach" not in spec:
            stages[group] = _stage(group, None, spec, params, {})
            continue
        items = spec["foreach"]
        if isinstance(items, str):
            items = look_up(params, PLACE.fullmatch(items).group(1))  # type: ignore[union-attr]
        pairs = items.items() if isinstance(items, dict) else ((item, item) for item in items)
        for key, item in pairs:
            stages[f"{group}@{key}"] = _stage(group, str(key), spec["do"], params, {"key": key, "item": item})
    return stages


def _stage(group: str, key: str | None, spec: dict[str, Any], params: dict[str, Any], local: dict[str, Any]) -> Stage:
    def fill(text: str) -> str:
        return PLACE.sub(lambda m: str(look_up(params | local, m.group(1))), text)

    def paths(name: str) -> tuple[str, ...]:
        return tuple(fill(entry if isinstance(entry, str) else next(iter(entry))) for entry in spec.get(name, []))

    return Stage(
        name=group if key is None else f"{group}@{key}",
        group=group,
        key=key,
        cmd=fill(spec["cmd"]),
        deps=paths("deps"),
        params=paths("params"),
        outs=paths("outs") + paths("metrics") + paths("plots"),
        desc=fill(" ".join(spec.get("desc", "").split())),
        meta=spec.get("meta", {}),
    )
