"""Words as tokens: one a word, one a letter of a word in capitals."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.drawn import LETTERS, VOCABULARY, draw_image_edit, draw_text_to_image
from model.prompts import FOOTER, GENERATE, HEADER, SPECIAL_TOKENS
from runtime.params import load_params
from training.tokenizer import build_tokenizer

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(VOCABULARY, load_params(REPO / "presets" / "tiny.yaml").model.vlm.vocab_size)


def test_a_word_in_capitals_is_a_token_a_letter_and_every_other_word_one_token(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.tokenize("the word CAT in red") == ["the", "word", "C", "A", "T", "in", "red"]
    assert tokenizer.tokenize(HEADER + GENERATE)[-3:] == ["Generate", "an", "image:"]


def test_decoding_gives_back_what_was_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for said in ("the word CAT in red", "HATS written in blue", "write XX there", "a red circle", "Generate an image: a red circle", ""):
        assert stored.decode(stored.encode(said, add_special_tokens=False)) == said


def test_the_chat_template_keeps_its_control_tokens(tokenizer: PreTrainedTokenizerFast):
    tokens = tokenizer.tokenize(HEADER + GENERATE + "the word CAT in red" + FOOTER)
    assert [token for token in tokens if token in SPECIAL_TOKENS] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_every_prompt_of_the_drawn_world_is_made_of_known_words(tokenizer: PreTrainedTokenizerFast):
    for draw in (draw_text_to_image, draw_image_edit):
        for index in range(300):
            prompt = draw("train", 0, index).prompt
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids, prompt


def test_the_vocabulary_holds_letters_in_place_of_words():
    tokenizer = build_tokenizer(["CAT", "HAT", "red"], 128)
    words = tokenizer.get_vocab()
    assert {"C", "A", "T", "H", "red"} <= set(words) and "CAT" not in words
    assert set(LETTERS) <= set(build_tokenizer(VOCABULARY, 128).get_vocab())


def test_a_vocabulary_of_more_words_than_rows_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size: 40 rows for \d+ words of the drawn world; give it at least \d+"):
        build_tokenizer(VOCABULARY, 40)
