"""The parts of DeepGen, and which of them train in each stage: one table; nothing else freezes (paper sections 3.1-3.3)."""

from collections.abc import Callable, Iterable

from torch import nn

TRAINED: dict[str, tuple[str, ...]] = {
    "alignment": ("think_tokens", "connector"),
    "sft": ("think_tokens", "connector", "dit", "vlm_lora"),
    "mr_grpo": ("dit",),
}

BELONGS: dict[str, Callable[[str], bool]] = {
    "vlm": lambda name: name.startswith("vlm.") and ".lora_" not in name,
    "vlm_lora": lambda name: name.startswith("vlm.") and ".lora_" in name,
    "think_tokens": lambda name: name == "connector.think_tokens",
    "connector": lambda name: name.startswith("connector.") and name != "connector.think_tokens",
    "dit": lambda name: name.startswith("dit."),
    "vae": lambda name: name.startswith("vae."),
}


def part_of(name: str) -> str:
    """The part that a parameter of `DeepGen` belongs to."""
    return next(part for part, belongs in BELONGS.items() if belongs(name))


def parameter_report(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, str | int]]:
    """Rows of part, trained and frozen parameter counts and dtypes."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in BELONGS}
    for name, parameter in named:
        parts[part_of(name)].append(parameter)
    rows: list[dict[str, str | int]] = []
    for part, parameters in parts.items():
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "-"
        rows.append({"part": part, "trained": trained, "frozen": total - trained, "dtype": dtypes})
    return rows
