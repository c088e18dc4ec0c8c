"""Settings of parts, shards and mixtures, as written under `data:` and `mixture:` in params.yaml. Imports nothing heavy."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from runtime.settings import Settings

Task = Literal["text_to_image", "image_edit"]
Split = Literal["train", "validation", "evaluation"]
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]  # it names a folder and a DVC stage
LANDED = "_SUCCESS"  # the marker of a snapshot that was copied whole

SourceKind = Literal["drawn", "t2i_pretrain_json", "t2i_sft_json", "edit_json", "folder", "table", "webdataset", "hugging_face", "prompts"]
RecordField = Literal["prompt", "image", "references", "kind", "reasoning", "render_text", "negative_prompt", "url", "attribution"]
Column = Annotated[str, StringConstraints(min_length=1)]

# What a source may be told beyond task, split, seed and licence. Every source but the drawn world needs `path`.
_FILES = {"path", "glob", "scores"}
SETTINGS: dict[str, set[str]] = {
    "drawn": {"kinds"},
    "t2i_pretrain_json": _FILES | {"images", "caption_field"},
    "t2i_sft_json": _FILES | {"images"},
    "edit_json": _FILES | {"images"},
    "folder": _FILES | {"caption_field"},
    "table": _FILES | {"images", "columns"},
    "webdataset": _FILES | {"caption_field"},
    "hugging_face": _FILES | {"images", "columns"},
    "prompts": {"path"},
}
TASK_OF: dict[str, Task] = {
    "t2i_pretrain_json": "text_to_image",
    "t2i_sft_json": "text_to_image",
    "edit_json": "image_edit",
    "prompts": "text_to_image",
}

MAX_PIXELS = 50_000_000  # of one image, before it is decoded: 150 MB as RGB
DRAWN_SIZE = 64  # pixels a side of a drawn image
KINDS = {"single": 0.15, "position": 0.15, "count": 0.15, "two": 0.15, "relation": 0.15, "reasoning": 0.15, "word": 0.1}
EDITS = {
    "recolor": 0.15,
    "remove": 0.15,
    "add": 0.15,
    "move": 0.15,
    "replace": 0.15,
    "reasoning": 0.1,
    "combine": 0.1,
    "word": 0.05,
    "pick": 0.0,
}


Deduplicate = Literal["none", "exact", "near"]
EvaluationLeak = Literal["fail", "remove", "allow"]


class TextRules(Settings):
    """What a prompt must be."""

    max_characters: PositiveInt = 4000
    boilerplate: tuple[str, ...] = Field(
        default=("image", "photo", "picture", "an image", "a photo", "untitled", "no caption", "n/a", "none", "null", "stock photo"),
        description="prompts that say nothing, folded to lower case without a full stop",
    )
    scripts: tuple[str, ...] | None = Field(
        default=None, description="first words of Unicode names (latin, cjk, ...) that most letters must be of; null for any"
    )


class ImageRules(Settings):
    """What an image must be to become part of a shard, and how it is encoded where it can't stay as it is."""

    max_bytes: int = Field(default=50_000_000, ge=1, description="largest encoded file")
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, le=MAX_PIXELS, description="largest width x height, by the header; the loader's own cap"
    )
    min_side: int = Field(default=256, ge=1, description="smallest shorter side, pixels once upright; below it the image is dropped")
    max_aspect: float = Field(default=4.0, ge=1, le=16, description="largest longer side over shorter side; beyond it the image is dropped")
    jpeg_quality: int = Field(default=95, ge=75, le=100, description="of JPEG files encoded again, at 4:4:4")


class PartConfig(Settings):
    """One catalogue part: where its samples come from and what they may be used for. A large source is declared in parts."""

    source: SourceKind
    task: Task
    category: Literal["general", "reasoning", "text_rendering"] = "general"
    split: Split
    samples: PositiveInt | None = Field(None, description="at most this many; null for all, which the endless drawn world does not have")
    seed: int = 0
    licence: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = Field(
        description="SPDX name; a part of unknown licence is refused"
    )
    data_set: PartName | None = Field(
        None,
        description="entry of data/catalog.yaml that this part holds; its task, category and licence are checked against it, and its "
        "fetched files are what `path` is read from",
    )
    kinds: dict[str, PositiveFloat] | None = Field(None, description="share of each kind of drawn scene; null for the world's own")
    path: str | None = Field(
        None,
        min_length=1,
        description="file or folder, absolute or from the project root; with `data_set` from the folder of its first repository, null for "
        "that folder itself",
    )
    glob: str | None = Field(None, min_length=1, description="which files of a folder; null for all that the source can read")
    images: str | None = Field(None, min_length=1, description="folder that image paths start from; null for that of `path`")
    caption_field: str | None = Field(None, min_length=1, description="key of the caption in a record's own JSON file; null for 'caption'")
    columns: dict[RecordField, Column | tuple[Column, ...]] | None = Field(
        None, min_length=1, description="what the table calls our fields; several columns only for references"
    )
    scores: dict[Column, Column] | None = Field(None, min_length=1, description="score, as rules name it: the column that holds it")
    content: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="digest of what `path` holds, from `python -m data pin PART`")
    min_scores: dict[str, float] = Field({}, description="score column -> least value; a record without it is dropped")
    max_scores: dict[str, float] = Field({}, description="score column -> greatest value; a record without it is dropped")
    deduplicate: Deduplicate | None = Field(None, description="within the part; null: none if drawn, else near")

    @model_validator(mode="after")
    def _source_takes_these_settings(self) -> Self:
        allowed = SETTINGS[self.source]
        for key in sorted(set().union(*SETTINGS.values()) - allowed):
            if (value := getattr(self, key)) is not None:
                raise ValueError(f"{key}: {value!r} given; allowed for source {self.source!r}: null. It takes {sorted(allowed)}")
        if self.source == "drawn" and self.samples is None:
            raise ValueError("samples: null given; allowed for source 'drawn': a number above 0, for it never ends")
        path = "." if self.path is None and self.data_set else self.path
        if self.source != "drawn" and (path is None or "://" in path or "\0" in path):
            raise ValueError(f"path: {self.path!r} given; allowed for source {self.source!r}: a file or folder on this machine")
        for key in ("path", "images") if self.data_set else ():
            if ".." in PurePosixPath(getattr(self, key) or "").parts:
                raise ValueError(f"{key}: {getattr(self, key)!r} given; allowed with data_set: a place in the fetched folder")
        if self.task != TASK_OF.get(self.source, self.task):
            raise ValueError(f"task: {self.task!r} given; allowed for source {self.source!r}: {TASK_OF[self.source]!r}")
        if self.glob and (PurePosixPath(self.glob).is_absolute() or ".." in PurePosixPath(self.glob).parts):
            raise ValueError(f"glob: {self.glob!r} given; allowed: a pattern within the folder of `path`, such as '**/*.jsonl'")
        return self

    @model_validator(mode="after")
    def _prompts_are_for_training(self) -> Self:
        if self.source == "prompts" and self.split != "train":
            raise ValueError(f"split: {self.split!r} given; allowed for source 'prompts': 'train', for it has no pictures to compare with")
        if self.source == "prompts" and self.deduplicate == "near":
            raise ValueError("deduplicate: 'near' given; allowed for source 'prompts': null, 'exact' or 'none', for it has no pictures")
        return self

    @model_validator(mode="after")
    def _columns_fit_the_task(self) -> Self:
        for key, column in (self.columns or {}).items():
            if not isinstance(column, str) and key != "references":
                raise ValueError(f"columns.{key}: {list(column)} given; allowed: one column")
            if key == "references" and self.task != "image_edit":
                raise ValueError(f"columns.references: {column!r} given; allowed for task {self.task!r}: none")
        return self

    @model_validator(mode="after")
    def _kinds_can_be_drawn(self) -> Self:
        allowed = EDITS if self.task == "image_edit" else KINDS
        unknown = sorted(set(self.kinds or ()) - set(allowed))
        if unknown or self.kinds == {}:
            raise ValueError(f"kinds: {self.kinds} given; allowed for {self.task}: null, or a weight for any of {list(allowed)}")
        return self


class PreparationRules(Settings):
    """What a record is judged by before it is written; equal rules give equal bytes."""

    image_size: int
    images: ImageRules
    texts: TextRules


class DataConfig(Settings):
    """Image size and shards of every part."""

    image_size: int = Field(ge=32, multiple_of=32, description="pixels a side of a square image; others have about this area")
    shard_samples: PositiveInt = Field(description="samples a tar")
    store: str | None = Field(None, description="fsspec URL of a folder that takes the tars; null keeps them beside their manifest")
    images: ImageRules = ImageRules()
    texts: TextRules = TextRules()
    evaluation_prompts: tuple[str, ...] = Field(
        (), description="prompt files that no training sample may repeat, beside the parts whose split is evaluation"
    )
    near_distance: int = Field(2, ge=0, le=2, description="bits of 64 that the hashes of near duplicates may differ by")
    parts: dict[PartName, PartConfig] = Field(min_length=1)

    @property
    def rules(self) -> PreparationRules:
        return PreparationRules(image_size=self.image_size, images=self.images, texts=self.texts)

    @field_validator("store")
    @classmethod
    def _store_is_one_url(cls, store: str | None) -> str | None:
        if store is not None and (not re.match(r"[a-z][a-z0-9+.-]*://", store) or "::" in store):
            raise ValueError(f"{store!r} given; allowed: null, or one URL as file:///data/store or s3://bucket/folder")
        if store is not None and urlsplit(store).password is not None:  # it would be in every manifest
            raise ValueError("a URL with a password given; allowed: one without, its credentials in the environment")
        return store

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
    evaluation_leak: dict[PartName, EvaluationLeak] = Field(
        {}, description="what happens to a part's samples that are in an evaluation set; a part not named here fails, or allows if drawn"
    )

    @model_validator(mode="after")
    def _something_is_read(self) -> Self:
        if sum(self.ratio.values()) == 0:
            raise ValueError(f"ratio: {self.ratio} sums to 0; at least one task must be above 0")
        if sum(self.parts.values()) == 0:
            raise ValueError(f"parts: {self.parts} sums to 0; at least one weight must be above 0")
        return self


class StageMixtureConfig(MixtureConfig):
    """The same, and what goes with it."""

    auxiliary: MixtureConfig | None = Field(None, description="of mr_grpo: what its auxiliary loss on real data reads")
