"""What the DiT is told of each prompt, computed once a run: VLM and connector are frozen in stage 3."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from data.loader import Batch
from model.deepgen import Condition, DeepGen
from runtime.files import sha256_bytes
from training.batching import stack_pixels

LIMIT = 4_000_000_000  # bytes; the prompts that were asked for longest ago make room


class Conditions:
    """Each prompt is read by itself, so that no condition depends on its batch, its rank, or on what a resumed run has already read."""

    def __init__(self, model: DeepGen, limit: int = LIMIT) -> None:
        self.model, self.limit = model, limit
        self.held: OrderedDict[tuple[str, ...], Condition] = OrderedDict()
        self.bytes = self.computed = 0

    def of(self, batch: Batch, rows: Sequence[int], prompt: str | None = None) -> Condition:
        """Of the prompts in `rows` of the batch, with their references; or of `prompt` in their place."""
        return Condition.cat([self._one(prompt if prompt is not None else batch.prompts[row], batch, row) for row in rows])

    @torch.no_grad()
    def _one(self, prompt: str, batch: Batch, row: int) -> Condition:
        images = [array[row] for array in batch.reference_images]
        name = (prompt, *(sha256_bytes(image.tobytes()) for image in images))
        if name not in self.held:
            references = tuple(stack_pixels([image], self.model.device) for image in images)
            condition = self.model.encode_condition([prompt], references)
            self.held[name] = condition
            self.computed += 1
            self.bytes += size_of(condition)
            while self.bytes > self.limit and len(self.held) > 1:
                self.bytes -= size_of(self.held.popitem(last=False)[1])
        self.held.move_to_end(name)
        return self.held[name]


def size_of(condition: Condition) -> int:
    tensors: tuple[Tensor, ...] = (condition.prompt_embeds, condition.pooled_prompt_embeds)
    return sum(tensor.nbytes for tensor in tensors)
