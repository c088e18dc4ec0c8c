"""A file of prompts, without pictures: what reinforcement learning draws from."""

from collections.abc import Iterator
from pathlib import Path

from data.config import PartConfig
from data.prompts import read_prompts
from data.records import Record, Refused
from data.sources.files import shown


class Prompts:
    """A record a prompt, in the order of the file, or of the folder of .txt files, as `data.prompts` reads them."""

    def __init__(self, name: str, part: PartConfig, root: Path):
        """Raises as `data.prompts.read_prompts`."""
        self.name, self.part = name, part
        path = root / str(part.path)
        self.file, self.prompts = shown(path.name), read_prompts(path)[: part.samples]

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, start: int, stop: int) -> Iterator[Record | Refused]:
        for number, prompt in enumerate(self.prompts[start:stop], start):
            yield Record(
                source_id=f"{self.file}[{number}]",
                source=self.name,
                task=self.part.task,
                category=self.part.category,
                kind=self.part.category,
                prompt=prompt,
                target=None,
                references=(),
                licence=self.part.licence,
            )
