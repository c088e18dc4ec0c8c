"""The drawn world's words as a tokenizer with Qwen's control tokens, for recipes whose VLM is our own."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.prompts import SPECIAL_TOKENS

TEMPLATE_WORDS = ("user", "assistant", "Generate", "an", "image:")
QUESTION_WORDS = ("?", "how", "many", "what", "color", "is", "the", "where", "describe", "edit", "and", "a")


def build_tokenizer(vocabulary: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """One token a word; unknown words become `<unk>`.

    Args:
        vocabulary: every word that prompts can hold.
        size: rows of the VLM's embedding.

    Raises:
        ValueError: more words than rows.
    """
    words = list(dict.fromkeys([*SPECIAL_TOKENS, "<unk>", *TEMPLATE_WORDS, *QUESTION_WORDS, *sorted(vocabulary)]))
    if len(words) > size:
        raise ValueError(f"model.vlm.vocab_size: {size} rows for {len(words)} words of the drawn world; give it at least {len(words)}.")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
