"""The preference reward: the algebra of win rates, a judge on loopback, and each way in which a service fails (R1 to R11)."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.exits import Plain
from training.rewards.config import PreferenceConfig
from training.rewards.preference import Answers, JudgeChanged, Preference, parse_answer, win_rates
from training.rewards.scores import Group, Scores
from training.rewards.service import Breaker, retry_after

from .fake_judge import MODEL, FakeJudge

LIGHT = (10, 90, 50, 200)
RATES = torch.tensor([0.0, 2 / 3, 1 / 3, 1.0])
DEADLINE = 1.5


@pytest.fixture
def judge() -> Iterator[Callable[..., FakeJudge]]:
    judges: list[FakeJudge] = []

    def start(*args: Any, **settings: Any) -> FakeJudge:
        judges.append(FakeJudge(*args, **settings))
        return judges[-1]

    yield start
    for one in judges:
        one.close()


def group(lights: tuple[int, ...] = LIGHT, name: str = "0:x", task: str = "text_to_image", prompt: str = "a red circle") -> Group:
    return Group(name, task, prompt, tuple(np.full((8, 8, 3), light, np.uint8) for light in lights), {})


def preference(judge: FakeJudge, folder: Path, **changes: Any) -> Preference:
    values = {
        "endpoint": judge.endpoint,
        "model": MODEL,
        "deadline_s": DEADLINE,
        "attempts": 2,
        "breaker_failures": 1000,
        "replay_share": 0.0,
    }
    return Preference(PreferenceConfig.model_validate(values | changes), folder / "judge.jsonl")


# ---------------------------------------------------------------- win rates


def random_wins(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    wins, valid = torch.zeros(2, size, size)
    for i, j in combinations(range(size), 2):
        wins[i, j] = float(torch.randint(3, ())) / 2
        wins[j, i], valid[i, j], valid[j, i] = 1 - wins[i, j], 1.0, 1.0
    return wins, valid


def test_the_rates_of_a_group_sum_to_half_its_size():
    rates, there = win_rates(*random_wins(8), 1)
    assert rates.sum() == pytest.approx(4.0) and there.all()


def test_the_rates_move_with_the_images_and_turn_over_with_the_verdicts():
    wins, valid = random_wins(6)
    order = torch.randperm(6)
    rates, _ = win_rates(wins, valid, 1)
    torch.testing.assert_close(win_rates(wins[order][:, order], valid, 1)[0], rates[order])
    torch.testing.assert_close(win_rates(wins.T, valid, 1)[0], 1 - rates)


def test_ties_everywhere_are_one_half_for_all():
    valid = 1 - torch.eye(5)
    assert torch.equal(win_rates(0.5 * valid, valid, 1)[0], torch.full((5,), 0.5))


def test_a_pair_that_was_not_compared_is_no_tie():
    wins, valid = random_wins(4)
    wins[0, 1] = wins[0, 2] = wins[0, 3] = 1.0
    wins[1, 0] = wins[2, 0] = wins[3, 0] = 0.0
    valid[0, 1] = valid[1, 0] = 0.0
    rates, there = win_rates(wins, valid, 3)
    assert rates[0] == 1.0 and there.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("<think>..</think><answer>Image 1 is better</answer>", 1),
        ("<answer> image 2 is better. </answer>", 2),
        ("<think><answer>Image 1 is better</answer></think><answer>Image 2 is better</answer>", 2),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", None),
        ("Image 1 is better", None),
        ("<answer>both</answer>", None),
        ("<answer>Image 3 is better</answer>", None),
        (None, None),
        (1e30, None),
        (["Image 1 is better"], None),
    ],
)
def test_what_does_not_say_which_is_better_says_nothing(text: Any, place: int | None):
    assert parse_answer({"choices": [{"message": {"content": text}}]}) == place


@pytest.mark.parametrize(
    "reply", [None, 7, "x", [], {}, {"choices": []}, {"choices": [{}]}, {"choices": {"0": 1}}, {"choices": [{"message": 4}]}]
)
def test_a_reply_of_another_shape_says_nothing(reply: Any):
    assert parse_answer(reply) is None


# ---------------------------------------------------------------- a judge that answers


def test_every_two_images_are_compared_in_both_orders_and_the_better_one_wins(judge, tmp_path: Path):
    one = judge()
    reward = preference(one, tmp_path)
    scores = reward(group())
    torch.testing.assert_close(scores.values[:, 0], RATES)
    assert scores.valid.all() and scores.applies.all()
    assert sorted(one.seen) == sorted((float(a), float(b)) for a in LIGHT for b in LIGHT if a != b)
    facts = reward.facts()
    assert facts["judge/requests"] == 13 and facts["judge/parsed_share"] == facts["judge/answered_share"] == 1.0
    assert facts["judge/position_bias"] == facts["judge/contradiction_share"] == 0.0 and facts["judge/latency_max_s"] > 0


def test_a_judge_that_likes_the_first_place_tells_nothing_apart_and_its_bias_is_told(judge, tmp_path: Path):
    reward = preference(judge(prefer=lambda first, second: 1), tmp_path)
    assert torch.equal(reward(group()).values[:, 0], torch.full((4,), 0.5))
    facts = reward.facts()
    assert facts["judge/position_bias"] == 0.5 and facts["judge/contradiction_share"] == 1.0


def test_an_edit_is_not_asked_about(judge, tmp_path: Path):
    one = judge()
    assert not preference(one, tmp_path)(group(task="image_edit")).applies.any() and one.number == 0


def test_no_more_requests_are_under_way_than_allowed(judge, tmp_path: Path):
    one = judge(delay=0.02)
    preference(one, tmp_path, concurrency=3)(group())
    assert 1 < one.most <= 3


def test_the_key_goes_into_the_header_and_nowhere_else(judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    one = judge(lambda number: "status=401")
    reward = preference(one, tmp_path, api_key_env="JUDGE_KEY")
    reward(group())
    assert all(headers["Authorization"] == "Bearer s3cret" for headers in one.headers)
    out, err = capfd.readouterr()
    assert not any("s3cret" in text for text in (out, err, caplog.text, str(reward.facts()), str(reward.config)))


def test_a_key_that_the_environment_lacks_is_named(judge, tmp_path: Path):
    with pytest.raises(Plain, match="the environment has no JUDGE_KEY"):
        preference(judge(), tmp_path, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize("endpoint", ["ftp://x/v1", "http://user:pass@x/v1", "x", "http://x/v1?key=1", "file:///etc"])
def test_an_endpoint_that_is_no_plain_url_is_refused(endpoint: str):
    with pytest.raises(ValueError, match="without user, query or fragment"):
        PreferenceConfig(endpoint=endpoint, model=MODEL)


# ---------------------------------------------------------------- R1 to R11


def assert_masked(scores: Scores) -> None:
    assert scores.applies.all() and not scores.valid.any() and scores.coverage == 0.0


@pytest.mark.parametrize("fault", ["reset", "status=500", "retry_after=0.1", "html", "status=429", "status=302"])
def test_r1_what_fails_is_tried_again_a_bounded_number_of_times_and_then_missing(judge, tmp_path: Path, fault: str):
    one = judge(lambda number: fault)
    reward = preference(one, tmp_path)
    assert_masked(reward(group()))
    assert one.number == (12 if fault in ("html", "status=302") else 24), "12 comparisons, two attempts where a second may help"
    assert any(name.startswith("judge/failed_") for name in reward.facts())


def test_r1_nobody_listens(judge, tmp_path: Path):
    one = judge()
    reward = preference(one, tmp_path)
    one.close()
    assert_masked(reward(group()))
    assert reward.facts()["judge/failed_connection"] == 2


def test_r1_what_fails_once_is_answered_the_second_time(judge, tmp_path: Path):
    one = judge(lambda number: "status=503" if number < 12 else "")
    torch.testing.assert_close(preference(one, tmp_path, attempts=13)(group()).values[:, 0], RATES)


@pytest.mark.parametrize("fault", ["hang=60", "drip", "endless_headers", "retry_after=3600"])
def test_r2_nothing_waits_past_the_deadline(judge, tmp_path: Path, fault: str):
    reward = preference(judge(lambda number: fault), tmp_path)
    began = time.monotonic()
    assert_masked(reward(group()))
    assert time.monotonic() - began < 1.1 * DEADLINE + 0.3  # the greeting, and a busy machine


def test_r2_what_was_answered_by_then_counts(judge, tmp_path: Path):
    scores = preference(
        judge(prefer=lambda a, b: 1 if a > b else 2, delay=0.0, fault=lambda n: "hang=60" if n == 0 else ""), tmp_path, min_comparisons=2
    )(group())
    assert scores.valid.all() and scores.values[0, 0] == 0.0 and scores.values[3, 0] == 1.0


def test_r3_a_reply_to_another_request_is_refused(judge, tmp_path: Path):
    reward = preference(judge(lambda number: "other_id"), tmp_path)
    assert_masked(reward(group()))
    assert reward.facts()["judge/failed_other_request"] == 24


@pytest.mark.parametrize(
    "said", ["NaN", "Infinity", "null", '"1e30"', "1e30", '"Image 1 is better"', "[]", '"<answer>Image 9 is better</answer>"']
)
def test_r4_what_is_no_verdict_is_missing_and_counted(judge, tmp_path: Path, said: str):
    reward = preference(judge(lambda number: f"says={said}"), tmp_path)
    assert_masked(reward(group()))
    assert reward.facts()["judge/parsed_share"] == 0.0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("huge", "too_large"), ("text={", "no_json"), ("pickled", "no_json"), ("gzipped", "compressed"), ("deep", "no_json")],
)
def test_r5_no_reply_is_read_beyond_its_cap_decompressed_or_unpickled(judge, tmp_path: Path, fault: str, kind: str):
    one = judge(lambda number: fault)
    one.marker = str(tmp_path / "unpickled")
    reward = preference(one, tmp_path, attempts=1)
    assert_masked(reward(group()))
    assert reward.facts()[f"judge/failed_{kind}"] == 12 and not Path(one.marker).exists()


def test_r7_an_image_that_was_compared_with_too_few_is_missing(judge, tmp_path: Path):
    one = judge()
    one.fault = lambda number: "status=404" if 10.0 in one.seen[number] else ""
    scores = preference(one, tmp_path, min_comparisons=2)(group())
    assert scores.valid[:, 0].tolist() == [False, True, True, True]


def test_r8_a_judge_of_another_name_is_refused_before_it_is_asked(judge, tmp_path: Path):
    one = judge()
    one.model = "judge-8b@2"
    with pytest.raises(JudgeChanged, match=r"serves judge-8b@2, params\.yaml names judge-8b@1"):
        preference(one, tmp_path)(group())
    assert one.number == 0


def test_r8_a_judge_that_changes_its_name_on_the_way_ends_the_run(judge, tmp_path: Path):
    with pytest.raises(JudgeChanged, match="answered as 'judge-9b'"):
        preference(judge(lambda number: "other_model=judge-9b" if number == 7 else ""), tmp_path)(group())


def test_r8_a_judge_that_answers_the_same_question_differently_ends_the_run(judge, tmp_path: Path):
    asked: list[tuple[float, float]] = []

    def fickle(first: float, second: float) -> int:
        asked.append((first, second))
        return 1 + asked.count((first, second)) % 2

    reward = preference(judge(prefer=fickle), tmp_path, replay_share=1.0, concurrency=1)
    with pytest.raises(JudgeChanged, match="asked twice 0% had one answer"):
        for number in range(3):
            reward(group(tuple(light + number for light in LIGHT)))


def test_r8_one_that_agrees_with_itself_goes_on(judge, tmp_path: Path):
    one = judge()
    reward = preference(one, tmp_path, replay_share=1.0)
    torch.testing.assert_close(reward(group()).values[:, 0], RATES)
    assert one.number == 24 and reward.facts()["judge/agreement"] == 1.0


def test_r9_an_answer_that_comes_after_the_deadline_is_in_no_later_score(judge, tmp_path: Path):
    one = judge(lambda number: "hang=2" if number < 12 else "")
    reward = preference(one, tmp_path)
    assert_masked(reward(group(name="0:x")))
    time.sleep(1.0)
    other = reward(group(tuple(255 - light for light in LIGHT), name="1:y"))
    torch.testing.assert_close(other.values[:, 0], 1 - RATES)


def test_r10_a_resumed_run_has_the_same_scores_without_asking_again(judge, tmp_path: Path):
    first = preference(judge(), tmp_path)(group())
    one = judge(prefer=lambda a, b: 1)
    again = preference(one, tmp_path)(group())
    assert torch.equal(first.values, again.values) and one.number == 0
    preference(one, tmp_path)(group(prompt="another"))
    assert one.number == 12, "another prompt is another question"


def test_r10_an_answer_that_a_kill_cut_short_is_asked_again(tmp_path: Path):
    file = tmp_path / "judge.jsonl"
    answers = Answers(file)
    answers.put("a", 1)
    answers.put("b", 2)
    file.write_bytes(file.read_bytes()[:-5])
    left = Answers(file)
    assert left.get("a") == 1 and left.get("b") is None
    left.put("b", 2)
    assert Answers(file).held == {"a": 1, "b": 2}
    assert [json.loads(line) for line in file.read_text().split("\n") if line.endswith("}")][-1] == {"question": "b", "place": 2}


def test_r11_a_flapping_judge_scores_all_the_same_and_retries_stay_bounded(judge, tmp_path: Path):
    one = judge(lambda number: "status=503" if number % 10 in (1, 4, 7) else "")
    reward = preference(one, tmp_path, attempts=4, deadline_s=20)
    for number in range(4):
        assert reward(group(tuple(light + number for light in LIGHT))).coverage == 1.0
    facts = reward.facts()
    assert facts["judge/retries"] == facts["judge/failed_status_503"] <= 3 * 48 and facts["judge/answered_share"] == 1.0


def test_r11_a_judge_that_is_down_is_left_alone_for_a_while(judge, tmp_path: Path):
    one = judge(lambda number: "status=500")
    reward = preference(one, tmp_path, breaker_failures=5, breaker_s=600, concurrency=1)
    assert_masked(reward(group()))
    assert one.number <= 6 and reward.facts()["judge/breaker_opened"] == 1


def test_a_breaker_opens_lets_one_try_and_closes_again():
    now = [0.0]
    breaker = Breaker(2, 10.0, clock=lambda: now[0])
    for _ in range(2):
        assert breaker.lets()
        breaker.tell(False)
    assert not breaker.lets() and breaker.opened == 1
    now[0] = 10.0
    assert breaker.lets() and not breaker.lets(), "half open: one"
    breaker.tell(False)
    assert not breaker.lets()
    now[0] = 20.0
    assert breaker.lets()
    breaker.tell(True)
    assert breaker.lets() and breaker.lets() and breaker.opened == 1


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("Wed, 21 Oct 2026", None), (None, None), ("1e9", None)]
)
def test_retry_after_is_read_where_it_is_a_number_of_seconds(value: str | None, seconds: float | None):
    assert retry_after(value) == seconds
