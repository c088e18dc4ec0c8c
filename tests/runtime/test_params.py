"""Wrong params stop before any work, naming key, value and what is allowed."""

import json
from pathlib import Path

import pytest

from runtime.params import ParamsError, check_params, load_params, parse_params

REPO = Path(__file__).parents[2]
PRESETS = ["smoke", "tiny", "small", "h200", "deepgen-5b"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_complete_file_that_names_itself(preset: str):
    assert load_params(REPO / "presets" / f"{preset}.yaml").preset == preset


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = (REPO / "presets" / "tiny.yaml").read_text()
    assert old in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "ema_decay",
            "ema_decai",
            r"alignment\.ema_decai: unknown key; did you mean 'ema_decay'\? allowed here: async_checkpoints, batch_size",
        ),
        ("preset: tiny", "presett: tiny", r"presett: unknown key; did you mean 'preset'"),
        ("steps: 430", "steps: -4", r"alignment\.steps: -4 given; input should be greater than 0"),
        ("lr: 1.0e-3", "lr: fast", r"alignment\.optimizer\.lr: 'fast' given; input should be a valid number"),
        ("image_edit: 1, text_to_image: 1", "image_edit: 0, text_to_image: 0", r"mixture\.alignment\.ratio: .* sums to 0"),
        (
            "{drawn_text_to_image: 1.0, drawn_image_edit: 1.0}",
            "{drawn_text_to_image: 1.0, drawn_image_edit: 0.0}",
            r"mixture\.alignment: ratio\.image_edit is 1, but the weights of its image_edit parts sum to 0",
        ),
        (
            "drawn_text_to_image: 1.0,",
            "drwn: 1.0,",
            r"mixture\.alignment\.parts: names 'drwn', which data\.parts lacks; allowed: \['drawn_",
        ),
        ("[6, 5, 4", "[9, 5, 4", r"model\.vlm\.stacked_layers: \[9\] lie beyond this VLM of 6 layers; allowed: 0\.\.6"),
        ("batch_size: 64", "batch_size: 65", r"alignment\.batch_size: 65 must be a multiple of 64 .* nearest: 64, 128"),
        ("stochastic_steps: 3", "stochastic_steps: 8", r"mr_grpo\.stochastic_steps: 8 of 8 rollout_steps; allowed: 1\.\.7"),
        ("licence: CC0-1.0", 'licence: ""', r"data\.parts\.drawn_text_to_image\.licence: '' given"),
        ("weight_decay: 0.0,", "weight_decay: .nan,", r"alignment\.optimizer\.weight_decay: nan given"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(ParamsError, match=message):
        load_params(changed(tmp_path, old, new))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_accumulation_makes_up_the_batch_for_any_ranks_and_micro_batch_or_is_refused(ranks: int, micro: int):
    values = parse_params((REPO / "presets" / "tiny.yaml").read_text())
    values["mr_grpo"] |= {"prompts_per_step": 12, "auxiliary": {"batch_size": 24, "share": 0.1}}
    values["sft"] |= {"batch_size": 2 * ranks, "micro_batch_size": 1}
    values["launch"]["processes"] = ranks
    for size in (2, 6, 16, 24, 40, 48, 192):
        values["alignment"] |= {"batch_size": size, "micro_batch_size": micro}
        unit = micro * ranks * 2  # as many micro-batches of each task
        if size % unit:
            nearest = ", ".join(str(n * unit) for n in (size // unit, size // unit + 1) if n)
            with pytest.raises(ParamsError, match=rf"alignment\.batch_size: {size} must be a multiple of {unit} .* nearest: {nearest}\n"):
                check_params(values)
        else:
            assert check_params(values).alignment.accumulation(ranks) * micro * ranks == size


def test_every_problem_is_told_at_once(tmp_path: Path):
    path = changed(tmp_path, "steps: 430", "steps: -4")
    path.write_text(path.read_text().replace("threads: 1", "threads: 0"))
    with pytest.raises(ParamsError, match=r"(?s)alignment\.steps.*launch\.threads"):
        load_params(path)


def test_a_key_written_twice_is_refused():
    with pytest.raises(ParamsError, match="steps: written twice"):
        parse_params("sft: {steps: 1, steps: 2}")


def test_numbers_are_those_of_yaml_1_2():
    assert parse_params("a: 1e-4\nb: 12\nc: -1.5\nd: 1e3") == {"a": 1e-4, "b": 12, "c": -1.5, "d": 1000.0}


def test_yaml_that_makes_objects_is_refused():
    with pytest.raises(ParamsError, match="is not YAML"):
        parse_params("a: !!python/object/apply:os.system ['true']")


def test_the_default_params_are_a_preset():
    text = (REPO / "params.yaml").read_text()
    assert text in [(REPO / "presets" / f"{preset}.yaml").read_text() for preset in PRESETS]


def test_the_schema_has_bounds_for_every_number_people_tune():
    from runtime.params import Params

    schema = json.dumps(Params.model_json_schema())
    assert '"exclusiveMinimum": 0' in schema and '"additionalProperties": false' in schema


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  prompts_per_step: 8", "  prompts_per_step: 0", "mr_grpo.prompts_per_step: 0 given"),
        ("binding: 1.0, position", "binding: 1.0, strict: 1.0, position", r"no reward is called 'strict'; allowed: .* never a reward"),
        ("held_out_reward: relation", "held_out_reward: binding", "held_out_reward: binding is trained on"),
        (
            "  auxiliary: {batch_size: 32, share: 0.1}",
            "  auxiliary: null",
            "mixture.mr_grpo.auxiliary: given, but mr_grpo.auxiliary is null",
        ),
        ("{batch_size: 32, share: 0.1}", "{batch_size: 33, share: 0.1}", "mr_grpo.auxiliary.batch_size: 33 must be a multiple of 4"),
        ("share: 0.1}", "share: 0.1, weight: 0.1}", "weight: 0.1 and share: 0.1 given; allowed: one of them"),
        ("  stochastic_steps: 3", "  stochastic_steps: 8", "stochastic_steps: 8 of 8 rollout_steps; allowed: 1..7"),
        ("  sampler: flow_sde\n  eta: 0.7", "  sampler: cps_sde\n  eta: 1.7", "eta: 1.7 given; allowed for cps_sde: up to 1"),
        ("  group_size: 16", "  group_size: 16\n  part_rewards: {nowhere: {count: 1.0}}", "part_rewards: names 'nowhere'"),
        (
            "  group_size: 16",
            "  group_size: 16\n  part_rewards: {drawn_text_to_image: {count: 0.0}}",
            "at least one weight must be above 0",
        ),
    ],
)
def test_what_stage_three_can_not_do_is_refused_before_it_starts(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(ParamsError, match=message):
        load_params(changed(tmp_path, old, new))


def test_each_prompt_set_may_weigh_its_own_rewards():
    values = parse_params((REPO / "presets" / "tiny.yaml").read_text())
    values["mr_grpo"]["part_rewards"] = {"drawn_text_to_image": {"word": 0.7, "clip": 0.1, "count": 0.0}}
    config = check_params(values).mr_grpo
    assert config.weights_of("drawn_text_to_image") == {"word": 0.7, "clip": 0.1}
    assert config.weights_of("another") == config.rewards and {"word", "clip", "binding"} <= set(config.trained_rewards)
