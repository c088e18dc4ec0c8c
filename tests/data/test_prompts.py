import json
from pathlib import Path

import pytest

from data.prompts import UnknownLayout, read_prompts, read_rl_mixture

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples" / "prompts"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are absent")

PUBLISHED = [
    ("geneval/evaluation_metadata.jsonl", 553, "a photo of a bench"),
    ("geneval/generation_prompts.txt", 553, "a photo of a bench"),
    ("geneval/bagel_evaluation_metadata_long.first150.jsonl", 150, "A realistic wooden bench sits"),
    ("deepgen_rl/eval/geneval_prompt.txt", 553, "A clear photo of a wooden bench"),  # of 555 lines two are blank
    ("dpg_bench/prompts", 1065, "An expansive field"),
    ("dpg_bench/first100_uniworld_dpgbench_prompts.json", 100, "On a worn-out stretch"),
    ("deepgen_rl/eval/prompts_dpgbench.first300.jsonl", 300, "An expansive field"),
    ("unigenbench/test_prompts_en.csv", 600, "In the style of classical ink painting"),
    ("unigenbench/test_prompts_zh.csv", 600, "古典水墨画风格"),
    ("unigenbench/first60_test_prompts_en_long.csv", 60, "A classical Chinese ink wash"),
    ("unigenbench/first60_test_prompts_zh_long.csv", 60, "一幅意境悠远"),
    ("unigenbench/first300_train_prompt.txt", 300, "Please draw a whale"),
    ("wise/cultural_common_sense.json", 400, "Traditional food of the Mid-Autumn"),
    ("wise/natural_science.json", 300, "An apple tree"),
    ("wise/spatio-temporal_reasoning.json", 300, "The Sydney Opera House"),
    ("wise/bagel_final_data_first60.json", 60, "Traditional food"),
    ("t2i_corebench/R-GR.json", 90, "Your task is to analyze"),
    ("t2i_corebench/first15_C-MA.json", 15, "A single old wooden treasure chest"),
    ("gedit/uniworld_gedit_edit.json", 604, "Change the background to a city street."),
    ("imgedit/basic_edit.json", 737, "Change the tortoise's shell"),
    ("kris/first60_bagel_final_data.json", 60, "Please fill in the correct number"),
    ("longtext_bench/text_prompts.first60.jsonl", 60, "A lively and bustling"),
    ("longtext_bench/text_prompts_zh.first60.jsonl", 60, "阳光明媚的白天"),
    ("echo4o/Geneval++.jsonl", 280, "A photo of a brown bus"),
    ("echo4o/Geneval++.txt", 280, "A photo of a brown bus"),
    ("echo4o/first40_Imagine.jsonl", 40, "A photo of a monkey"),
    ("echo4o/Imagine.txt", 270, "A photo of a monkey"),
]


@needs_samples
@pytest.mark.parametrize(("path", "count", "first"), PUBLISHED)
def test_a_published_file_is_read_whole_and_in_order(path, count, first):
    prompts = read_prompts(SAMPLES / path)
    assert len(prompts) == count
    assert prompts[0].startswith(first)


@needs_samples
def test_two_layouts_of_one_benchmark_give_the_same_prompts():
    geneval = read_prompts(SAMPLES / "geneval/evaluation_metadata.jsonl")
    assert read_prompts(SAMPLES / "geneval/generation_prompts.txt") == geneval
    folder = read_prompts(SAMPLES / "dpg_bench/prompts")
    assert read_prompts(SAMPLES / "deepgen_rl/eval/prompts_dpgbench.first300.jsonl") == folder[:300]  # both in lexical order of the names
    assert set(read_prompts(SAMPLES / "dpg_bench/first100_uniworld_dpgbench_prompts.json")) < set(folder)


@needs_samples
def test_a_judge_s_instructions_are_no_prompts():
    with pytest.raises(UnknownLayout, match=r"imgedit/prompts.json: keys \['action', 'add'.* are of no layout we read. Known: GenEval"):
        read_prompts(SAMPLES / "imgedit/prompts.json")


ROW = {"id": "animal/1.jpg", "prompt": "Remove the café", "edit_type": "remove"}


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("detailed.jsonl", '{"tag": "x", "include": [], "prompt": "a", "detailed_caption": "a long a"}', ["a long a"]),
        ("crlf.json", json.dumps({"7": ROW}, indent=1).replace("\n", "\r\n"), ["Remove the café"]),
        ("crlf.txt", "one\r\n\r\n two \r\n", ["one", " two "]),
        ("bom.txt", "\ufeffone\ntwo", ["one", "two"]),
        ("separator.txt", "one\u2028still one\ntwo", ["one\u2028still one", "two"]),
        ("lines.json", '{"prompt": "a", "key": "1"}\n \n{"prompt": "b", "key": "2"}\n', ["a", "b"]),
        ("vendored.csv", 'index,prompt,sub_dims\n0,"a, b","{""x"": 1}"\n', ["a, b"]),
        ("bad_json.csv", 'index,prompt_en,sub_dims_en\n0,a,"{""x"": 1 ""y"": 2}"\n1,b,{}\n', ["a", "b"]),
        ("newline.csv", 'index,prompt_en,sub_dims_en\n0,"a\nb",{}\n', ["a\nb"]),
        ("lines.jsonl", '{"ID": "R-GR-001", "Prompt": "two\\nlines"}', ["two\nlines"]),
        ("rise.json", '[{"index": "1", "category": "causal", "image": "x", "instruction": "melt it", "reference": "r"}]', ["melt it"]),
        ("cvtg.json", '{"data_list": [{"index": 0, "prompt": "a sign", "carrier_list": [], "sentence_list": []}]}', ["a sign"]),
    ],
)
def test_quirks_of_published_files_are_read(tmp_path, name, text, prompts):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "x.json",
            b'[{"caption": "a", "url": "b"}]',
            r"x.json: keys \['caption', 'url'\] are of no layout we read. Known: .*; UniGenBench",
        ),
        ("x.csv", b"index,text\n0,a\n", r"keys \['index', 'text'\]"),
        ("x.json", b'["a", "b"]', r"keys \[\]"),
        ("x.jsonl", b'{"key": "1", "prompt": "a"}\n{"key": "2", "prompt": ', "line 2 is not JSON"),
        ("x.jsonl", b'{"key": "1", "prompt": "a"}\n{"key": "2", "prompt": " "}', "item 1: ' ' stands where a prompt was expected"),
        ("x.json", b'[{"key": "1", "prompt": "a"}, {"key": "2"}]', "item 1: None stands"),
        ("x.csv", b"index,prompt_en\n0,a\n1\n", "row 1: None stands"),
        ("x.txt", b"\n \n", "holds no prompt"),
        ("x.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("x.parquet", b"PAR1", ".parquet; expected one of"),
    ],
)
def test_a_file_of_no_known_layout_is_refused_by_name_and_keys(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnknownLayout, match=f"(?s){name}.*{told}" if not told.startswith(name) else told):
        read_prompts(tmp_path / name)


def test_a_folder_without_prompts_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(UnknownLayout, match="a folder without .txt files"):
        read_prompts(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "gone.txt")


RECIPE = """
sampling_mode: sample_proportional
datasets:
  - {name: ocr, path: ocr.txt, sample_weight: 3.0, rewards: [unifiedreward_think: 0.2, clip_sim: 0.1, ocr: 0.7]}
  - {name: general, path: general.txt, sample_weight: 1.0, rewards: [unifiedreward_think: 0.7, clip_sim: 0.3]}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "ocr.txt").write_text('a sign "A"\na sign "B"\n')
    (tmp_path / "general.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_an_rl_recipe_gives_prompts_rewards_and_shares(recipe):
    mixture = read_rl_mixture(recipe)
    ocr, general = mixture.datasets
    assert ocr.rewards == {"unifiedreward_think": 0.2, "clip_sim": 0.1, "ocr": 0.7}
    assert general.prompts == ("one", "two", "three")
    assert mixture.shares() == {"ocr": pytest.approx(6 / 9), "general": pytest.approx(3 / 9)}
    recipe.write_text(RECIPE.replace("sample_proportional", "weight_only"))
    assert read_rl_mixture(recipe).shares()["ocr"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("sample_weight: 3.0", "sample_weight: 0", "datasets.0.sample_weight: .*greater than 0"),
        ("sample_weight: 3.0", "sample_weight: .inf", "datasets.0.sample_weight: .*finite"),
        ("clip_sim: 0.3", "clip_sim: -0.3", "datasets.1.rewards.clip_sim"),
        ("unifiedreward_think: 0.7, clip_sim: 0.3", "clip_sim: 0", r"datasets.1: rewards: \{'clip_sim': 0.0\} sums to 0"),
        ("ocr: 0.7", "clip_sim: 0.7", "names a reward twice"),
        ("[unifiedreward_think: 0.7, clip_sim: 0.3]", "[{ocr: 1, clip_sim: 1}]", "expected a list of one reward and its weight each"),
        ("name: general", "name: ocr", r"datasets: \['ocr'\] stands there twice"),
        ("sample_proportional", "proportional", "sampling_mode"),
        ("name: general, ", "", "datasets.1.name"),
    ],
)
def test_an_impossible_rl_recipe_is_refused_by_key(recipe, old, new, told):
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=f"(?s)recipe.yaml can't be used:.*{told}"):
        read_rl_mixture(recipe)


@needs_samples
def test_missing_prompt_files_of_the_published_recipe_are_named_together():
    with pytest.raises(FileNotFoundError) as error:
        read_rl_mixture(SAMPLES / "deepgen_rl/deepgen_train.yaml")
    for name in ("unigenbench_train_data_ocr", "qwenimage_textrender", "text_render_less", "blip3o_60k", "share_4o_img", "corebench"):
        assert name in str(error.value)


@needs_samples
def test_the_published_recipe_is_read_as_it_is(tmp_path):
    (tmp_path / "deepgen_train.yaml").write_bytes((SAMPLES / "deepgen_rl/deepgen_train.yaml").read_bytes())
    names = (
        "unigenbench_train_data_ocr qwenimage_textrender text_render_less unigenbench_train_data_general blip3o_60k share_4o_img corebench"
    )
    for name in names.split():
        (tmp_path / f"{name}.txt").write_text("a prompt\n")
    mixture = read_rl_mixture(tmp_path / "deepgen_train.yaml")
    assert [s.name for s in mixture.datasets] == names.split()
    assert [s.sample_weight for s in mixture.datasets] == [3, 3, 3, 1, 1, 1, 1]
    assert mixture.datasets[-1].rewards == {"unifiedreward_think": 0.7, "clip_sim": 0.3}
