"""Sources: each an addressable stream of records."""

from data.config import PartConfig
from data.drawn import EDITS, KINDS, draw_image_edit, draw_text_to_image
from data.images import encode_png
from data.records import Record


def read_record(name: str, part: PartConfig, index: int) -> Record:
    """Record number `index` of a part; a function of the part's settings alone."""
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
