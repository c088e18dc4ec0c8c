"""Parts of prompts without pictures, which reinforcement learning draws from, and what their evaluation items mark."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.build import build_part
from data.config import DataConfig, ImageRules, MixtureConfig, PartConfig
from data.loader import Loader, read_part
from data.mixture import resolve_mixture
from data.pictures import save_facts, save_samples
from data.prompts import read_prompts
from data.removal import EvaluationLeak, find_contamination, find_removed
from data.rows import read_table

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples" / "prompts"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are absent")
WORDS = [f"a picture of thing number {i}" for i in range(13)]


def prompts_part(path: str, **more: Any) -> PartConfig:
    return PartConfig.model_validate(
        {"source": "prompts", "task": "text_to_image", "split": "train", "licence": "CC0-1.0", "path": path} | more
    )


def data_of(part: PartConfig, **more: Any) -> DataConfig:
    return DataConfig(image_size=64, shard_samples=5, images=ImageRules(min_side=32), parts={"rl": part}, **more)


def built(root: Path, prompts: list[str], **more: Any) -> DataConfig:
    (root / "rl.txt").write_text("\n".join(prompts) + "\n")
    data = data_of(prompts_part("rl.txt"), **more)
    build_part("rl", data, root / "shards" / "rl", root)
    return data


MIXTURE = MixtureConfig(seed=5, ratio={"text_to_image": 1}, parts={"rl": 1})


def test_a_file_of_prompts_becomes_a_part_and_every_prompt_comes_once_an_epoch_on_any_number_of_ranks(tmp_path: Path):
    built(tmp_path, WORDS)
    mixture = resolve_mixture("mr_grpo", MIXTURE, tmp_path / "shards")
    alone = list(islice(Loader(mixture, tmp_path / "shards", 4), 13))
    seen = [prompt for batch in alone for prompt in batch.prompts]
    assert sorted(seen[:13]) == sorted(WORDS) and sorted(seen) == sorted(WORDS * 4)
    for batch in alone:
        assert batch.target_images.shape == (0, 64, 64, 3) and batch.reference_images == () and batch.parts == ("rl",) * 4
    for index in range(13):
        two = [Loader(mixture, tmp_path / "shards", 4, rank, 2).batch(index) for rank in range(2)]
        assert sum((batch.prompts for batch in two), ()) == alone[index].prompts
        assert sum((batch.positions for batch in two), ()) == alone[index].positions


def test_the_same_prompt_twice_is_one(tmp_path: Path):
    built(tmp_path, [*WORDS, WORDS[3]])
    assert len(list(read_part(tmp_path / "shards" / "rl"))) == 13
    aside = read_table(tmp_path / "shards" / "rl" / "set_aside.parquet").to_pylist()
    assert [(row["source_id"], row["reason"], row["message"]) for row in aside] == [("rl.txt[13]", "duplicate", "the words of rl.txt[3]")]


def test_people_can_look_at_one(tmp_path: Path):
    built(tmp_path, WORDS)
    samples = list(read_part(tmp_path / "shards" / "rl"))
    assert {sample.target.shape for sample in samples} == {(0, 64, 3)}
    save_samples(samples, tmp_path / "samples.png")
    save_facts(tmp_path / "shards" / "rl", tmp_path / "facts.png")
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "facts.png").is_file()


def test_among_parts_with_pictures_it_makes_a_batch_of_prompts_alone(tmp_path: Path):
    data = built(tmp_path, WORDS)
    drawn = PartConfig(source="drawn", task="text_to_image", split="train", samples=8, licence="CC0-1.0")
    both = data.model_copy(update={"parts": data.parts | {"drawn": drawn}})
    build_part("drawn", both, tmp_path / "shards" / "drawn", tmp_path)
    config = MixtureConfig(seed=5, ratio={"text_to_image": 1}, parts={"rl": 1, "drawn": 1})
    batch = Loader(resolve_mixture("mr_grpo", config, tmp_path / "shards"), tmp_path / "shards", 4).batch(0)
    assert sorted(batch.parts) == ["drawn", "drawn", "rl", "rl"] and batch.target_images.shape == (0, 64, 64, 3)
    assert [bool(scene) for scene in batch.scenes] == [part == "drawn" for part in batch.parts]


def contamination(
    config: MixtureConfig, data: DataConfig, root: Path, removed: dict[str, list[int]] | None = None
) -> dict[str, dict[str, int]]:
    mixture = resolve_mixture("mr_grpo", config, root / "shards", removed)
    return find_contamination(mixture, config, data, root / "shards", root)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"split": "evaluation"}, "allowed for source 'prompts': 'train'"),
        ({"deduplicate": "near"}, "allowed for source 'prompts': null, 'exact' or 'none'"),
        ({"task": "image_edit"}, "allowed for source 'prompts': 'text_to_image'"),
        ({"glob": "*.txt"}, "glob: '\\*.txt' given; allowed for source 'prompts': null"),
    ],
)
def test_what_a_part_of_prompts_can_not_be_is_refused(more: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        prompts_part("rl.txt", **more)


def test_prompts_of_an_evaluation_set_are_refused_and_where_they_are_allowed_its_scores_are_marked(tmp_path: Path):
    (tmp_path / "test.txt").write_text("\n".join([*WORDS[:3], "another", "and one more"]) + "\n")
    data = built(tmp_path, [*WORDS, WORDS[0].upper() + "!"], evaluation_prompts=("test.txt",))
    with pytest.raises(
        EvaluationLeak, match=r"4 samples of 'rl' are in an evaluation set(.|\n)*rl.txt\[0\]: test.txt\[0\]: the same prompt"
    ):
        find_removed("mr_grpo", MIXTURE, data, tmp_path / "shards", tmp_path)
    assert contamination(MIXTURE, data, tmp_path) == {}
    allowed = MIXTURE.model_copy(update={"evaluation_leak": {"rl": "allow"}})
    assert not any(find_removed("mr_grpo", allowed, data, tmp_path / "shards", tmp_path).values())
    assert contamination(allowed, data, tmp_path) == {"test.txt": {"items": 3, "of": 5}}
    assert contamination(allowed, data, tmp_path, {"rl": [1, 2]}) == {"test.txt": {"items": 1, "of": 5}}, "what is taken down is not read"


@needs_samples
def test_the_published_rl_prompts_that_are_a_benchmarks_test_set_are_caught(tmp_path: Path):
    """T2I-CoReBench's test prompts, with their line ends flattened, stand in a published recipe's training file."""
    training = SAMPLES / "deepgen_rl" / "corebench.first120.txt"
    tests = tuple(str(file) for file in sorted((SAMPLES / "t2i_corebench").glob("*.json")))
    data = data_of(prompts_part(str(training)), evaluation_prompts=tests)
    build_part("rl", data, tmp_path / "shards" / "rl", tmp_path)
    with pytest.raises(EvaluationLeak, match="samples of 'rl' are in an evaluation set"):
        find_removed("mr_grpo", MIXTURE, data, tmp_path / "shards", tmp_path)
    allowed = MIXTURE.model_copy(update={"evaluation_leak": {"rl": "allow"}})
    marks = contamination(allowed, data, tmp_path)
    assert sum(row["items"] for row in marks.values()) >= 30 and all(row["items"] <= row["of"] for row in marks.values())


@needs_samples
def test_a_real_prompt_file_is_read_whole_and_in_order(tmp_path: Path):
    file = SAMPLES / "deepgen_rl" / "unigenbench_train_data_ocr.first300.txt"
    data = data_of(prompts_part(str(file)))
    manifest = build_part("rl", data, tmp_path / "shards" / "rl", tmp_path)
    assert manifest["counts"]["input"] == len(read_prompts(file)) == manifest["counts"]["written"] + manifest["counts"]["deduplicated"]
    assert all(np.prod(sample.target.shape) == 0 for sample in islice(read_part(tmp_path / "shards" / "rl"), 5))
