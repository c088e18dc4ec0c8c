"""Settings of parts, shards and mixtures, as written under `data:` and `mixture:` in params.yaml. Imports nothing heavy."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints, model_validator

from runtime.settings import Settings

Task = Literal["text_to_image", "image_edit"]
Split = Literal["train", "validation", "evaluation"]
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]  # it names a folder and a DVC stage

MAX_PIXELS = 50_000_000  # of one image, before it is decoded: 150 MB as RGB
DRAWN_SIZE = 64  # pixels a side of a drawn image
KINDS = {"single": 0.1, "position": 0.2, "relation": 0.3, "count": 0.2, "two": 0.15, "word": 0.05}
EDITS = {"recolor": 0.3, "remove": 0.25, "add": 0.25, "move": 0.2}


class ImageRules(Settings):
    """What an image must be to become part of a shard, and how it is encoded where it can't stay as it is."""

    max_bytes: int = Field(50_000_000, ge=1, description="largest encoded file")
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS, description="largest width x height, by the header; the loader's own cap")
    min_side: int = Field(256, ge=1, description="smallest shorter side, pixels once upright; below it the image is dropped")
    max_aspect: float = Field(4.0, ge=1, le=16, description="largest longer side over shorter side; beyond it the image is dropped")
    jpeg_quality: int = Field(95, ge=75, le=100, description="of JPEG files encoded again, at 4:4:4")


class PartConfig(Settings):
    """One catalogue part: where its samples come from and what they may be used for. A large source is declared in parts."""

    source: Literal["drawn"]
    task: Task
    category: Literal["general", "reasoning", "text_rendering"] = "general"
    split: Split
    samples: PositiveInt
    seed: int = 0
    licence: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = Field(
        description="SPDX name; a part of unknown licence is refused"
    )
    kinds: dict[str, PositiveFloat] | None = Field(None, description="share of each kind of drawn scene; null for the world's own")

    @model_validator(mode="after")
    def _kinds_can_be_drawn(self) -> Self:
        allowed = EDITS if self.task == "image_edit" else KINDS
        unknown = sorted(set(self.kinds or ()) - set(allowed))
        if unknown or self.kinds == {}:
            raise ValueError(f"kinds: {self.kinds} given; allowed for {self.task}: null, or a weight for any of {list(allowed)}")
        return self


class DataConfig(Settings):
    """Image size and shards of every part."""

    image_size: int = Field(ge=32, multiple_of=32, description="pixels a side")
    shard_samples: PositiveInt = Field(description="samples a tar")
    store: str | None = Field(None, description="fsspec URL where tars live; null keeps them beside their manifest")
    parts: dict[PartName, PartConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _drawn_images_have_one_size(self) -> Self:
        drawn = [name for name, part in self.parts.items() if part.source == "drawn"]
        if drawn and self.image_size != DRAWN_SIZE:
            raise ValueError(f"image_size: {self.image_size} given, but {drawn[0]!r} is drawn at {DRAWN_SIZE}; allowed: {DRAWN_SIZE}")
        return self


class MixtureConfig(Settings):
    """What a stage reads: how many micro-batches of each task in a cycle, and the weight of each part within its task."""

    seed: int
    ratio: dict[Task, NonNegativeInt]
    parts: dict[PartName, NonNegativeFloat]

    @model_validator(mode="after")
    def _something_is_read(self) -> Self:
        if sum(self.ratio.values()) == 0:
            raise ValueError(f"ratio: {self.ratio} sums to 0; at least one task must be above 0")
        if sum(self.parts.values()) == 0:
            raise ValueError(f"parts: {self.parts} sums to 0; at least one weight must be above 0")
        return self
