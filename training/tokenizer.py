"""The drawn world's words as a tokenizer with Qwen's control tokens, for recipes whose VLM is our own."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.prompts import SPECIAL_TOKENS

TEMPLATE_WORDS = ("user", "assistant", "Generate", "an", "image:")
QUESTION_WORDS = ("?", "how", "many", "what", "color", "is", "the", "where", "describe", "edit", "and", "a", "in", "word", "picture")


def build_tokenizer(vocabulary: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """One token a word, but one a letter of a word in capitals, so that any such word can be written; unknown words become `<unk>`.

    Args:
        vocabulary: every word that prompts can hold.
        size: rows of the VLM's embedding.

    Raises:
        ValueError: more words than rows.
    """
    letters = pre_tokenizers.Split(Regex("[A-Z](?![a-z])"), "isolated")
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    known = [piece for word in sorted(vocabulary) for piece, _ in splitter.pre_tokenize_str(word)]
    words = list(dict.fromkeys([*SPECIAL_TOKENS, "<unk>", *TEMPLATE_WORDS, *QUESTION_WORDS, *known]))
    if len(words) > size:
        raise ValueError(f"model.vlm.vocab_size: {size} rows for {len(words)} words of the drawn world; give it at least {len(words)}.")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex("(?<= [A-Z]) (?=[A-Z]( |$))"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
