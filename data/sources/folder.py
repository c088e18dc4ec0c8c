"""A folder of images with their captions beside them.

text_to_image: cat.jpg with cat.txt, or cat.json whose `caption_field` is the caption.
image_edit: cat.src.0.png, cat.src.1.png, ..., cat.tgt.png, and cat.txt or cat.json with the instruction.
A list of pairs in the folder, such as pairs.jsonl, is read by source `edit_json`.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data.config import PartConfig
from data.sources.files import IMAGES, read_inside, shown
from data.sources.members import caption_of, images_of
from data.sources.reader import Found, Reader

ROLE = re.compile(r"(.+)\.((?:src\.\d{1,4}|tgt)\.\w+)", re.IGNORECASE | re.DOTALL)


class Folder(Reader):
    def __init__(self, name: str, part: PartConfig, root: Path):
        super().__init__(name, part, root)
        if not self.path.is_dir():
            raise ValueError(f"{name}: {self.path} is a file; source 'folder' reads a folder of images.")
        self.records = self._records()
        self.total = len(self.records)

    def _records(self) -> list[tuple[str, dict[str, str]]]:
        """Each record's name and its members: extension -> path in the folder. Sorted by name."""
        files = set(_walk(self.path))
        chosen = files if self.part.glob is None else {os.path.relpath(path, self.path) for path in self.path.glob(self.part.glob)} & files
        records: dict[str, dict[str, str]] = {}
        for path in sorted(chosen):
            stem, suffix = os.path.splitext(path)
            if suffix[1:].lower() not in IMAGES:
                continue
            role = ROLE.fullmatch(path) if self.part.task == "image_edit" else None
            name, extension = (role[1], role[2]) if role else (path, suffix[1:])
            members = records.setdefault(name, {})
            members[extension.lower()] = path
            members |= {text: told for text in ("txt", "json") if (told := f"{name if role else stem}.{text}") in files}
        return sorted(records.items())

    def find(self, start: int, stop: int) -> Iterator[tuple[str, Callable[[], Found]]]:
        for name, members in self.records[start:stop]:
            yield f"{shown(self.path.name)}/{shown(name)}", partial(self._found, members)

    def _found(self, members: dict[str, str]) -> Found:
        target, references = images_of(members)
        prompt, row = caption_of(members, lambda extension: read_inside(self.folder, members[extension]), self.part.caption_field)
        return Found(prompt, members[target], [members[reference] for reference in references], row)


def _walk(folder: Path) -> Iterator[str]:
    """Every file under `folder`, from there; links to folders are not followed."""
    for parent, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(parent, name), folder) for name in names)
