"""What MR-GRPO does to what it is not rewarded for: both tasks on evaluation samples, as they ship, and when that ends the stage."""

import math
import statistics
from collections.abc import Sequence

from accelerate import Accelerator

from data.loader import read_part
from model.deepgen import DeepGen
from runtime.exits import Plain
from runtime.files import read_json, write_json
from runtime.stage import StageRun, rank
from training.checkpoint import TrainState
from training.config import MRGRPOConfig
from training.ranks import from_first_rank
from training.scoring import score
from training.tracking import Tracker
from training.validation import Validation, aside

START = "probe.json"  # of the run folder: what the start's weights got right, sample by sample
CAUSE = {"image_edit": "max_edit_fall", "text_to_image": "max_strict_fall"}


class RewardHacked(Plain):
    """What is not rewarded fell by more than the recipe allows."""


class Probe(Validation):
    """Held-out loss and boards as in every stage, and the strict share of both tasks at the sampler that is shipped.

    The samples are the start's, so that a fall is paired; it counts where it is sure: by more than two standard errors beyond the limit.
    """

    def __init__(
        self, run: StageRun, config: MRGRPOConfig, accelerator: Accelerator, model: DeepGen, state: TrainState, tracker: Tracker
    ) -> None:
        super().__init__(run, config, accelerator, model, state, tracker)
        self.probe, file = config.probe, run.folder / START
        if self.probe is None:
            return
        if rank() == 0 and not file.is_file():
            write_json(file, self.strict())
        self.start: dict[str, list[bool]] = from_first_rank(read_json(file) if rank() == 0 else {})

    def look(self, step: int) -> dict[str, float]:
        row = super().look(step)
        if self.probe is None or step % self.probe.every:
            return row
        now: dict[str, list[bool]] = from_first_rank(self.strict() if rank() == 0 else {})
        for task, right in now.items():
            row[f"probe/{task}"] = statistics.fmean(right)
            limit = getattr(self.probe, CAUSE[task])
            fall, error = paired(self.start[task], right)
            if limit is not None and fall - 2 * error > limit:
                raise RewardHacked(
                    f"mr_grpo: step {step}: {task} is right for {row[f'probe/{task}']:.2f} of {len(right)} samples, "
                    f"{fall:.2f} +- {error:.2f} below the start; mr_grpo.probe.{CAUSE[task]} is {limit}. The checkpoints before are in "
                    f"{self.run.folder}. Look at the strips of what is rewarded; lower mr_grpo.optimizer.lr or steps, or raise kl_weight "
                    "or the auxiliary share."
                )
        return row

    def strict(self) -> dict[str, list[bool]]:
        """Task -> of each sample, whether all of it is right. The averaged weights are asked where there are."""
        assert self.probe is not None
        config, found = self.run.params.evaluation, {}
        with aside(self.model, self.state.ema):
            for part in config.parts:
                samples = list(read_part(self.run.root / "outputs" / "shards" / part, self.probe.samples))
                scored = score(self.model, samples, config.sampling_steps, config.guidance, config.batch_size, config.seed)
                found[samples[0].task] = [bool(row.strict) for row in scored]
        return found


def paired(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """By how much the share of right ones fell on the same samples, and its standard error."""
    falls = [float(was) - float(is_) for was, is_ in zip(before, after, strict=True)]
    return statistics.fmean(falls), statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
