"""The drawn world as a source: a record is a function of the part's settings and its number."""

from collections.abc import Iterator
from pathlib import Path

from data.config import EDITS, KINDS, PartConfig
from data.drawn import draw_image_edit, draw_text_to_image
from data.images import encode_png
from data.records import Record


class Drawn:
    def __init__(self, name: str, part: PartConfig, root: Path):
        self.name, self.part = name, part

    def __len__(self) -> int:
        assert self.part.samples is not None, "PartConfig let a drawn part without samples through"
        return self.part.samples

    def read(self, start: int, stop: int) -> Iterator[Record]:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.name}: records {start} to {stop} asked for; there are 0 to {len(self)}")
        return (read_record(self.name, self.part, index) for index in range(start, stop))


def read_record(name: str, part: PartConfig, index: int) -> Record:
    """Record number `index` of a drawn part; a function of the part's settings alone."""
    if part.task == "image_edit":
        sample = draw_image_edit(part.split, part.seed, index, part.kinds or EDITS)
    else:
        sample = draw_text_to_image(part.split, part.seed, index, part.kinds or KINDS)
    return Record(
        source_id=f"{part.split}/{part.seed}/{index}",
        source=part.source,
        task=part.task,
        category="text_rendering" if sample.kind == "word" else part.category,
        kind=sample.kind,
        prompt=sample.prompt,
        target=encode_png(sample.target),
        references=tuple(encode_png(image) for image in sample.references),
        licence=part.licence,
        scene=sample.scene,
    )
