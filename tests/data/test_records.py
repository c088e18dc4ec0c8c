from data.config import PartConfig
from data.sources import read_record


def test_a_key_is_sixteen_hex_digits_of_the_content():
    part = PartConfig(source="drawn", task="image_edit", split="train", samples=2, licence="CC0-1.0")
    first, again, other = (read_record("edits", part, i) for i in (0, 0, 1))
    assert first.key == again.key != other.key
    assert len(first.key) == 16
    assert set(first.key) <= set("0123456789abcdef")
