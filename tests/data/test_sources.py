import csv
import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from data.config import DRAWN_SIZE, SETTINGS, DataConfig, PartConfig, SourceKind
from data.images import encode_png
from data.records import Reason, Record, Refused
from data.sources import FORMATS, Source, open_source, read_record
from data.sources import files as source_files

HOSTILE_TEXTS = (
    "a red cat",
    'first line\r\nsecond, "quoted"\nthird',
    "قطة حمراء على طاولة",
    "👩‍👩‍👧 e\u0301 \u2028 \u0085 \ufeff inside",
    "  spaces stay  ",
    "<img><|image_1|></img> wears <img><|image_2|></img>.",
    "a,b;c\td\\n{}[]",
)


def png(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def part(source: str, path: Path | str, task: str = "text_to_image", **settings: Any) -> PartConfig:
    values = {"source": source, "path": str(path), "task": task, "split": "train", "licence": "CC0-1.0"}
    return PartConfig.model_validate(values | settings)


def opened(source: str, path: Path, task: str = "text_to_image", **settings: Any) -> Source:
    return open_source("pets", part(source, path, task, **settings), path.parent)


def everything(source: Source) -> list[Record | Refused]:
    found = list(source.read(0, len(source)))
    assert len(found) == len(source), "a record is neither there nor refused"
    return found


def records(source: Source) -> list[Record]:
    found = everything(source)
    assert not [item for item in found if isinstance(item, Refused)]
    return [item for item in found if isinstance(item, Record)]


def reasons(source: Source) -> list[str]:
    return [item.reason.value if isinstance(item, Refused) else "read" for item in everything(source)]


def jsonl(*rows: Any) -> str:
    return "".join(row + "\n" if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(*rows: list[str]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def parquet(path: Path, columns: dict[str, list[Any]], rows_a_group: int = 2) -> Path:
    import pyarrow
    from pyarrow import parquet as format

    path.parent.mkdir(parents=True, exist_ok=True)
    format.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group)
    return path


def arrow(path: Path, columns: dict[str, list[Any]], rows_a_batch: int = 2) -> Path:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    content = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=rows_a_batch)
    return path


def members_of(texts: tuple[str, ...]) -> list[tuple[str, bytes]]:
    return [(f"{i:04d}.{kind}", png(i) if kind == "png" else text.encode()) for i, text in enumerate(texts) for kind in ("png", "txt")]


def source_of(kind: str, folder: Path, texts: tuple[str, ...] = HOSTILE_TEXTS) -> Source:
    """The same records, image i with text i, in each format."""
    images = {f"{i:04d}.png": png(i) for i in range(len(texts))}
    names = list(images)
    root = folder / kind
    if kind == "t2i_pretrain_json":
        write(root, images | {f"notes/{i}.json": json.dumps({"recaption": text}) for i, text in enumerate(texts)})
        rows = [{"image": name, "annotation": f"notes/{i}.json"} for i, name in enumerate(names)]
        write(root, {"list.json": json.dumps(rows, indent=2)})
        return opened(kind, root, caption_field="recaption")
    if kind == "t2i_sft_json":
        rows = [{"type": "T2I_SFT", "txt": t, "image": "", "image_path": n} for n, t in zip(names, texts, strict=True)]
        return opened(kind, write(root, images | {"list.json": "\ufeff" + json.dumps(rows, ensure_ascii=False)}))
    if kind == "folder":
        return opened(kind, write(root, images | {f"{i:04d}.txt": text for i, text in enumerate(texts)}))
    if kind == "jsonl":
        rows = [{"prompt": text, "image": name} for name, text in zip(names, texts, strict=True)]
        return opened("table", write(root, images | {"list.jsonl": jsonl(*rows)}))
    if kind == "csv":
        rows = [["caption", "image"], *([text, name] for name, text in zip(names, texts, strict=True))]
        return opened("table", write(root, images | {"list.csv": "\ufeff" + table(*rows)}))
    if kind == "parquet":
        half = len(texts) // 2
        for file, low, high in (("a", 0, half), ("b", half, len(texts))):
            parquet(root / f"{file}.parquet", {"caption": list(texts[low:high]), "jpg": list(images.values())[low:high]})
        return opened("table", root)
    if kind == "webdataset":
        members = members_of(texts)
        tar(root / "00000.tar", members[:6])
        tar(root / "00001.tar", members[6:], format=tarfile.PAX_FORMAT)
        return opened(kind, root)
    structs = [{"bytes": content, "path": name} for name, content in images.items()]
    if kind == "save_to_disk":
        arrow(root / "data-00000-of-00002.arrow", {"image": structs[:3], "text": list(texts[:3])})
        arrow(root / "data-00001-of-00002.arrow", {"image": structs[3:], "text": list(texts[3:])})
        state = {"_data_files": [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]}
        return opened("hugging_face", write(root, {"state.json": json.dumps(state)}))
    parquet(root / "data" / "train-00000-of-00001.parquet", {"image": structs, "text": list(texts)})
    return opened("hugging_face", root)


KINDS = ("t2i_pretrain_json", "t2i_sft_json", "folder", "jsonl", "csv", "parquet", "webdataset", "save_to_disk", "hugging_face")


def test_every_source_that_settings_name_can_be_opened_and_no_other():
    assert set(FORMATS) == set(get_args(SourceKind)) == set(SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_images_come_back_byte_for_byte(kind, tmp_path):
    found = records(source_of(kind, tmp_path))
    assert [record.prompt.encode() for record in found] == [text.encode() for text in HOSTILE_TEXTS]
    assert [record.target for record in found] == [png(i) for i in range(len(HOSTILE_TEXTS))]
    assert {(record.source, record.task, record.licence, record.references) for record in found} == {
        ("pets", "text_to_image", "CC0-1.0", ())
    }


@pytest.mark.parametrize("kind", [*KINDS, "drawn"])
def test_a_slice_is_the_same_stretch_of_the_whole_wherever_it_starts(kind, tmp_path):
    drawn = PartConfig(source="drawn", task="image_edit", split="train", samples=5, licence="CC0-1.0")
    source = open_source("edits", drawn, tmp_path) if kind == "drawn" else source_of(kind, tmp_path)
    whole = everything(source)
    assert len({record.source_id for record in whole}) == len(whole)
    for start in range(len(source) + 1):
        for stop in range(start, len(source) + 1):
            assert list(source.read(start, stop)) == whole[start:stop], (start, stop)
    for start, stop in ((-1, 1), (2, 1), (0, len(source) + 1)):
        with pytest.raises(IndexError, match=rf"records {start} to {stop} asked for; there are 0 to {len(source)}"):
            source.read(start, stop)


def test_source_ids_say_where_to_look(tmp_path):
    ids = {kind: everything(source_of(kind, tmp_path))[1].source_id for kind in KINDS}
    assert ids == {
        "t2i_pretrain_json": "list.json#2",
        "t2i_sft_json": "list.json#2",
        "folder": "folder/0001.png",
        "jsonl": "list.jsonl#2",
        "csv": "list.csv#3",
        "parquet": "a.parquet#2",
        "webdataset": "00000.tar#0001",
        "save_to_disk": "data-00000-of-00002.arrow#2",
        "hugging_face": "data/train-00000-of-00001.parquet#2",
    }


def test_the_drawn_world_is_a_source_like_any_other(tmp_path):
    config = PartConfig(source="drawn", task="text_to_image", split="train", samples=3, seed=9, licence="CC0-1.0")
    assert list(open_source("captions", config, tmp_path).read(1, 3)) == [read_record("captions", config, i) for i in (1, 2)]


def test_samples_is_the_most_that_a_part_reads(tmp_path):
    folder = write(tmp_path / "pets", {f"{i}.png": png(i) for i in range(4)})
    assert [len(opened("folder", folder, samples=n)) for n in (1, 4, 9, None)] == [1, 4, 4, 4]


# Edits: every source image, in order.


@pytest.mark.parametrize("kind", ["json", "jsonl", "folder", "webdataset", "parquet", "columns"])
def test_an_edit_keeps_all_its_references_in_order(kind, tmp_path):
    images = {f"{i}.png": png(i) for i in range(13)}
    references, instruction = [f"{i}.png" for i in (3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)], "put <img><|image_1|></img> beside the other"
    row = {"input_images": references, "output_image": "0.png", "instruction": instruction, "task_type": "try-on"}
    beside = [(f"d/x.src.{i}.png", images[name]) for i, name in enumerate(references)]
    beside += [("d/x.tgt.png", images["0.png"]), ("d/x.txt", instruction.encode())]
    if kind == "json":
        row["input_image"] = row.pop("input_images")
        source = opened("edit_json", write(tmp_path / "e", images | {"e.json": json.dumps([row])}), "image_edit")
    elif kind == "jsonl":
        source = opened("edit_json", write(tmp_path / "e", images | {"e.jsonl": jsonl(row)}), "image_edit")
    elif kind == "folder":
        source = opened("folder", write(tmp_path / "e", dict(beside)), "image_edit")
    elif kind == "webdataset":
        source = opened("webdataset", tar(tmp_path / "e.tar", beside), "image_edit")
    elif kind == "parquet":
        structs = [[{"bytes": images[name], "path": None} for name in references]]
        columns = {"input_images": structs, "output_image": [images["0.png"]], "instruction": [instruction]}
        source = opened("hugging_face", parquet(tmp_path / "e" / "0.parquet", columns).parent, "image_edit")
    else:
        columns = {f"from{i}": [images[name]] for i, name in enumerate(references)} | {"to": [images["0.png"]], "say": [instruction]}
        chosen = {"image": "to", "prompt": "say", "references": [f"from{i}" for i in range(len(references))]}
        source = opened("table", parquet(tmp_path / "e.parquet", columns), "image_edit", columns=chosen)
    (record,) = records(source)
    assert record.references == tuple(images[name] for name in references)
    assert (record.target, record.prompt) == (images["0.png"], instruction)
    assert record.kind == ("try-on" if "json" in kind else "general")


def test_an_edit_without_a_source_and_a_caption_with_one_are_refused(tmp_path):
    images = {"a.png": png(1), "b.png": png(2), "x.src.1.png": png(3), "x.tgt.png": png(4), "y.src.0.png": png(5)}
    rows = [{"input_images": refs, "output_image": "b.png", "instruction": "x"} for refs in ([], ["a.png"], None, ["a.png", None])]
    folder = write(tmp_path / "e", images | {"e.jsonl": jsonl(*rows)})
    assert reasons(opened("edit_json", folder, "image_edit")) == ["reference_missing", "read", "reference_missing", "record_bad"]
    assert reasons(opened("folder", folder, "image_edit")) == ["reference_missing", "reference_missing", "file_missing", "file_missing"]
    edit = tar(tmp_path / "e.tar", [("x.src.0.png", png(1)), ("x.tgt.png", png(2)), ("x.txt", b"t")])
    assert reasons(opened("webdataset", edit)) == ["record_bad"]


# Lists and tables that break.


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "x", "image": NaN}', "NaN is no finite number"),
        ('{"prompt": "x", "image": "a.png", "n": 1e999}', "1e999 is no finite number"),
        ('{"prompt": "x", "prompt": "y", "image": "a.png"}', "'prompt' comes twice"),
        ('{"prompt": "x", "image": "a.png", "deep": {"a": 1, "a": 2}}', "'a' comes twice"),
        ('{"prompt": "x", "image": "a.png", "n": 18446744073709551616}', "more than 64 bits"),
        ('{"prompt": "x", "image": "a.png", "n": ' + "9" * 5000 + "}", "more than 64 bits"),
        ("[" * 100_000, "recursion"),
        ('{"prompt": "x", "image": "a.png",}', "character"),
        ('{"prompt": "x", "image": "a.p', "Unterminated string"),
        ('["a.png"]', "is a list; expected an object"),
        (b'{"prompt": "\xff", "image": "a.png"}', "no UTF-8"),
        ('{"prompt": ["x"], "image": "a.png"}', "the prompt is a list; expected text"),
        ('{"prompt": "x", "image": 3}', "an image is 3; expected a path"),
        ('{"prompt": "x"}', "an image is None; expected a path"),
        ('{"prompt": "x", "image": "a.png", "reasoning": 1}', "reasoning is a int; expected text"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_and_the_others_are_kept(line, told, tmp_path):
    good = json.dumps({"prompt": "x", "image": "a.png"}).encode()
    content = b"\n".join([b"\xef\xbb\xbf" + good, b"", line if isinstance(line, bytes) else line.encode(), good])
    source = opened("table", write(tmp_path / "t", {"a.png": png(1), "list.jsonl": content}))
    assert reasons(source) == ["read", "record_bad", "read"]
    refused = everything(source)[1]
    assert isinstance(refused, Refused)
    assert told in refused.message
    assert (refused.source_id, refused.stage) == ("list.jsonl#3", "source")


def test_numbers_of_64_bits_and_missing_prompts_are_taken(tmp_path):
    rows = ['{"image": "a.png", "n": 9223372036854775808}', '{"image": "a.png", "prompt": null}']
    assert [r.prompt for r in records(opened("table", write(tmp_path / "t", {"a.png": png(1), "l.jsonl": jsonl(*rows)})))] == ["", ""]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"txt": "x"},\n {"txt": "y"},\n]', r"list.json, line 3, column 1: Expecting value"),
        ('[{"txt": "x"}\n {"txt": "y"}]', r"line 2, column 2: Expecting ','"),
        ('[{"txt": "x"}', r"line 1, column 14: Expecting ','"),
        ('[{"txt": "x"}] []', r"line 1, column 16: Nothing expected"),
        ('{"0.jpg": "x"}', r"line 1, column 1: Expecting '\['.* Name it .jsonl"),
        ("[1,\n" + "[" * 100_000, r"line 2: record 2 is nested too deep"),
        ("", r"line 1, column 1"),
        ("[ ]", r"pets: no record"),
    ],
)
def test_a_broken_array_is_refused_by_line_and_column(content, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        opened("t2i_sft_json", write(tmp_path / "t", {"list.json": content}))


def test_what_is_wrong_within_one_record_of_an_array_spoils_that_record_alone(tmp_path):
    good = b'{"txt": "\xc3\xa9", "image_path": "a.png"}'
    content = (
        b"\xef\xbb\xbf[" + b" ,\n".join([good, b'{"txt": "\xff"}', b'{"n": NaN}', b"3", b'{"n": ' + b"9" * 5000 + b"}", good]) + b"]\n"
    )
    source = opened("t2i_sft_json", write(tmp_path / "t", {"a.png": png(1), "list.json": content}))
    assert reasons(source) == ["read", *["record_bad"] * 4, "read"]


def test_annotations_that_are_missing_or_broken_spoil_their_record_alone(tmp_path):
    notes = {"good": '{"caption": "x", "url": "http://a/b", "aesthetic": 6.5}', "bad": "{", "list": '{"caption": ["x"]}', "none": "{}"}
    rows = [{"image": "a.png", "annotation": f"{name}.json"} for name in (*notes, "absent", "../x")] + [{"image": "a.png"}]
    files = {"a.png": png(1), "l/list.json": json.dumps(rows)} | {f"{name}.json": text for name, text in notes.items()}
    source = opened("t2i_pretrain_json", write(tmp_path, files) / "l", images=str(tmp_path), scores={"beauty": "aesthetic"})
    assert reasons(source) == ["read", "record_bad", "record_bad", "read", "file_missing", "path_outside", "record_bad"]
    first = everything(source)[0]
    assert isinstance(first, Record)
    assert (first.scores, first.origin) == ({"beauty": 6.5}, {"url": "http://a/b", "path": "a.png"})


def test_a_row_of_another_length_is_refused_by_its_line_and_quoted_line_ends_stay(tmp_path):
    rows = 'caption,image\r\n"a\r\nb",a.png\r\nx\r\n\r\nx,a.png,more\r\n"x"y,a.png\r\nq\rr,a.png\r\n\xff,a.png\r\nlast,a.png'
    source = opened("table", write(tmp_path / "t", {"a.png": png(1), "t.csv": rows.encode("latin-1")}))
    assert reasons(source) == ["read", *["record_bad"] * 5, "read"]
    found = everything(source)
    assert [item.source_id for item in found] == [f"t.csv#{line}" for line in (2, 4, 6, 7, 8, 9, 10)]
    assert isinstance(found[0], Record)
    assert found[0].prompt == "a\r\nb"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('caption,image\n"never closed,a.png\nx,a.png\n', "line 2: a quote opened here is never closed"),
        ("image,image\na,b\n", "each once"),
        ("caption,url\nx,http://a/b.png\n", "holds URLs, not images. Fetch them first, with `deepgen fetch`"),
        ("caption,picture\nx,a.png\n", r"no column for image \(image or .*It has \['caption', 'picture'\]: set the part's `columns`"),
        ("", "no record"),
    ],
)
def test_a_table_that_can_not_be_told_into_records_is_refused(content, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        opened("table", write(tmp_path / "t", {"t.csv": content}))


def test_columns_and_scores_go_by_the_names_that_a_part_gives(tmp_path):
    rows = [
        ["say", "file", "a", "why", "from", "by"],
        ["x", "a.png", "5.5", "because", "http://a", "Ann"],
        ["y", "a.png", "", "", "", ""],
        ["z", "a.png", "high", "", "", ""],
        ["z", "a.png", "inf", "", "", ""],
        ["z", "a.png", "nan", "", "", ""],
    ]
    columns = {"prompt": "say", "image": "file", "reasoning": "why", "url": "from", "attribution": "by"}
    folder = write(tmp_path / "t", {"img/a.png": png(1), "t.csv": table(*rows)})
    source = opened("table", folder / "t.csv", columns=columns, scores={"aesthetic": "a"}, images="img")
    assert reasons(source) == ["read", "read", "record_bad", "record_bad", "read"]
    first, second, *_, last = everything(source)
    assert isinstance(first, Record) and isinstance(second, Record) and isinstance(last, Record)
    assert last.scores == {}, "a NaN is how tables write that there is no score"
    assert (first.prompt, first.texts, first.scores) == ("x", {"reasoning": "because"}, {"aesthetic": 5.5})
    assert first.origin == {"url": "http://a", "attribution": "Ann", "path": "a.png"}
    assert (second.texts, second.scores, second.origin) == ({}, {}, {"path": "a.png"})


def test_a_parquet_page_that_is_damaged_costs_its_row_group_and_a_cut_file_the_source(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"prompt": [f"{i}" * 40 for i in range(6)], "image": [os.urandom(999) for _ in range(6)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:300] + bytes(400) + whole[700:])
    found = reasons(opened("table", path))
    assert len(found) == 6 and found[2:] == ["read"] * 4
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"t.parquet: .* fetch it again"):
        opened("table", path)


# Hugging Face.


def test_a_hub_id_in_place_of_a_path_is_told_how_sets_of_the_hub_come(tmp_path):
    with pytest.raises(FileNotFoundError, match="`deepgen fetch` brings a set that the catalogue has and the part names by `data_set`"):
        open_source("pets", part("hugging_face", "someone/pets"), tmp_path)


def test_splits_are_not_mixed_by_accident(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet(tmp_path / "h" / "data" / f"{name}.parquet", {"image": [png(1)], "text": ["x"]})
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\]. Choose one by the part's `glob`"):
        opened("hugging_face", tmp_path / "h")
    assert len(opened("hugging_face", tmp_path / "h", glob="**/train-*")) == 2
    write(tmp_path / "d", {"dataset_dict.json": '{"splits": ["train", "test"]}'})
    with pytest.raises(ValueError, match="Let the part's `path` name one"):
        opened("hugging_face", tmp_path / "d")
    write(tmp_path / "s", {"state.json": '{"_data_files": [{"filename": "../h/x.arrow"}]}'})
    with pytest.raises(ValueError, match="names '../h/x.arrow'; expected files of its own folder"):
        opened("hugging_face", tmp_path / "s")


# Paths.


def test_nothing_outside_the_folder_is_read_and_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "MAX_BYTES", 1000)
    folder = write(tmp_path / "in", {"a.png": png(1), "empty.png": b"", "large.png": bytes(1001), "sub/b.png": png(2)})
    write(tmp_path, {"secret.png": png(3)})
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "up").symlink_to("..")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "within.png").symlink_to("sub/b.png")
    os.mkfifo(folder / "pipe.png")
    names = {
        "a.png": "read",
        "./sub/b.png": "read",
        "within.png": "read",
        "../secret.png": "path_outside",
        "sub/../../secret.png": "path_outside",
        "sub/../a.png": "path_outside",
        str(folder / "a.png"): "path_outside",
        "a.png\0": "path_outside",
        "out.png": "path_outside",
        "up/secret.png": "path_outside",
        "loop.png": "file_missing",
        "pipe.png": "file_missing",
        "sub": "file_missing",
        "A.png": "file_missing",
        "x" * 300: "file_missing",
        "\ud800.png": "file_missing",
        "https://example.org/a.png": "file_missing",
        "file:///etc/passwd": "file_missing",
        "empty.png": "zero_bytes",
        "large.png": "too_many_bytes",
        "": "record_bad",
    }
    rows = [json.dumps({"prompt": "x", "image": name}) for name in names]
    source = opened("table", write(folder, {"list.jsonl": jsonl(*rows)}) / "list.jsonl")
    assert dict(zip(names, reasons(source), strict=True)) == names
    for item in everything(source):
        if isinstance(item, Refused):
            item.message.encode()  # it can be written down


def test_a_list_or_tar_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    tar(tmp_path / "secret.tar", members_of(("x",)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").symlink_to(tmp_path / "secret.tar")
    with pytest.raises(ValueError, match="a link out of"):
        opened("webdataset", tmp_path / "in")


def test_a_folder_reads_what_its_glob_chooses_with_the_captions_beside(tmp_path):
    files: dict[str, bytes | str] = {
        "b/cat.v2.JPG": png(1),
        "b/cat.v2.txt": "two",
        "b/cat.txt": "no",
        "a/dog.webp": png(2),
        "a/dog.json": '{"c": "d"}',
    }
    folder = write(tmp_path / "f", files | {"readme.md": "x", "a/alone.png": png(3)})
    assert [(r.source_id, r.prompt) for r in records(opened("folder", folder, caption_field="c"))] == [
        ("f/a/alone.png", ""),
        ("f/a/dog.webp", "d"),
        ("f/b/cat.v2.JPG", "two"),
    ]
    assert [r.prompt for r in records(opened("folder", folder, glob="b/*.JPG"))] == ["two"]
    odd = os.fsencode(folder) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(png(4))
    assert records(opened("folder", folder, glob="*.png"))[0].source_id.encode() == b"f/\\udcff.png"


# Tars.


def test_the_layout_of_img2dataset_is_read_with_its_columns(tmp_path):
    told = {"caption": "from json", "url": "http://a/b.jpg", "similarity": 0.3, "key": "0001"}
    members = [("0001.jpg", png(1)), ("0001.json", json.dumps(told).encode()), ("0001.txt", b"from txt")]
    folder = tar(tmp_path / "w" / "00000.tar", members).parent
    write(folder, {"00000_stats.json": "{}", "00000.parquet": b"not opened"})
    (record,) = records(opened("webdataset", folder, scores={"clip": "similarity"}))
    assert (record.prompt, record.scores, record.origin) == ("from txt", {"clip": 0.3}, {"url": "http://a/b.jpg"})
    (record,) = records(opened("webdataset", folder, caption_field="caption"))
    assert record.prompt == "from json"


def test_our_own_shards_are_read_back(shards):
    for task, name in (("image_edit", "edits"), ("text_to_image", "captions")):
        source = open_source("again", part("webdataset", shards / name, task), shards)
        kept = json.loads((shards / name / "manifest.json").read_text())["samples"]
        assert len(records(source)) == kept
        assert {len(record.references) for record in records(source)} == ({1, 2} if task == "image_edit" else {0})
        assert all(record.prompt for record in records(source))


def test_a_tar_cut_anywhere_keeps_the_records_before_the_cut_and_says_where(tmp_path):
    texts = ("one", "two", "three", "four")
    whole_path = tar(tmp_path / "w.tar", members_of(texts))
    content, whole = whole_path.read_bytes(), records(opened("webdataset", whole_path))
    end = len(content.rstrip(b"\0"))
    for cut in [0, *range(1, end + 512, 97), *range(512, end, 512)]:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        *kept, last = everything(opened("webdataset", tmp_path / "cut.tar"))
        assert isinstance(last, Refused)
        assert last.reason is (Reason.ZERO_BYTES if cut == 0 else Reason.TRUNCATED), cut
        assert "cut.tar: cut or damaged at byte" in last.message
        assert [r.target for r in kept if isinstance(r, Record)] == [r.target for r in whole[: len(kept)]]
        assert len(kept) >= cut // 2048 - 1, "a record that lies whole before the cut is lost"


def test_a_flipped_header_does_not_end_a_tar_unnoticed(tmp_path):
    content = bytearray(tar(tmp_path / "w.tar", members_of(("one", "two", "three"))).read_bytes())
    content[2048 + 100] ^= 1
    (tmp_path / "w.tar").write_bytes(content)
    assert reasons(opened("webdataset", tmp_path / "w.tar")) == ["record_bad"]
    joined = tar(tmp_path / "a.tar", members_of(("one",))).read_bytes() + tar(tmp_path / "b.tar", members_of(("two",))).read_bytes()
    (tmp_path / "j.tar").write_bytes(joined)
    assert reasons(opened("webdataset", tmp_path / "j.tar")) == ["read", "record_bad"]


@pytest.mark.timeout(30)
def test_a_member_of_negative_size_does_not_send_the_reader_round_and_round(tmp_path):
    back = tarfile.TarInfo("b.png")
    back.size = -2048
    content = tar(tmp_path / "w.tar", members_of(("one",))).read_bytes()[:2048] + back.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    (tmp_path / "w.tar").write_bytes(content)
    assert reasons(opened("webdataset", tmp_path / "w.tar")) == ["read", "truncated"]


def test_unsafe_members_are_never_opened_and_cost_their_record(tmp_path):
    path = tmp_path / "w.tar"
    with tarfile.open(path, "w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"x", link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(content))

        add("dir", tarfile.DIRTYPE)
        for i, unsafe in enumerate(["pkl", "pyd", "pth", "npy", "pickle.gz"]):
            add(f"{i}.png", content=png(i))
            add(f"{i}.{unsafe}", content=b"cos\nsystem\n(S'touch marker'\ntR.")
        add("link.png", tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.png", tarfile.LNKTYPE, link="0.png")
        add("null.png", tarfile.CHRTYPE)
        add("/etc/abs.png", content=png(1))
        add("a/../../up.png", content=png(1))
        add("./fine/ok.png", content=png(9))
        add("fine/ok.png/x", tarfile.DIRTYPE)
        add("fine/twice.png", content=png(9))
        add("fine/twice.png", content=png(9))
        add("empty.png", content=b"")
        add("readme", content=b"hello")
    source = opened("webdataset", path)
    assert reasons(source) == [*["record_bad"] * 8, "path_outside", "path_outside", "read", "record_bad", "zero_bytes", "file_missing"]
    assert everything(source)[10].source_id == "w.tar#fine/ok"


def test_members_of_one_key_lie_side_by_side_once(tmp_path):
    first, second = members_of(("one", "two"))[:2], members_of(("one", "two"))[2:]
    crossed = tar(tmp_path / "c.tar", [first[0], second[0], first[1], second[1], ("z.png", png(3))])
    assert reasons(opened("webdataset", crossed)) == [*["record_bad"] * 4, "read"]
    again = tar(tmp_path / "a.tar", [*first, *second, *first])
    assert reasons(opened("webdataset", again)) == ["record_bad", "read", "record_bad"]


@pytest.mark.parametrize(
    ("name", "mode"), [("w.tar.gz", "w:gz"), ("w.tgz", "w:gz"), ("w.tar", "w:gz"), ("w.tar", "w:xz"), ("w.tar", "w:bz2")]
)
def test_a_compressed_tar_is_refused_with_what_to_do(name, mode, tmp_path):
    with tarfile.open(tmp_path / name, mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(ValueError, match=r"is compressed.* Uncompress it first"):
        opened("webdataset", tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_add_up_whatever_is_flipped_or_cut(kind, tmp_path):
    """Hostile files either refuse to be opened, by a ValueError with words, or account for every record that they say they hold."""
    source_of(kind, tmp_path)
    settings = {"caption_field": "recaption"} if kind == "t2i_pretrain_json" else {}
    name = {"jsonl": "table", "csv": "table", "parquet": "table", "save_to_disk": "hugging_face"}.get(kind, kind)
    victims = [
        file for file in sorted((tmp_path / kind).rglob("*")) if file.suffix in (".json", ".jsonl", ".csv", ".parquet", ".tar", ".arrow")
    ]
    chance, outcomes = random.Random(0), Counter[str]()
    for file in victims or [next((tmp_path / kind).iterdir())]:
        content = file.read_bytes()
        for _ in range(60 // len(victims or [1])):
            harmed = bytearray(content)
            for _ in range(chance.randrange(1, 4)):
                harmed[chance.randrange(len(harmed))] = chance.randrange(256)
            file.write_bytes(harmed[: chance.randrange(len(harmed))] if chance.random() < 0.3 else harmed)
            try:
                found = everything(opened(name, tmp_path / kind, **settings))
            except (ValueError, FileNotFoundError) as error:
                assert str(error)
                outcomes["refused to open"] += 1
            else:
                outcomes.update(type(item).__name__ for item in found)
        file.write_bytes(content)
    assert outcomes["Record"]


# Settings.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": "drawn", "samples": None}, "samples: null given; allowed for source 'drawn': a number above 0"),
        ({"source": "drawn", "path": "x"}, "path: 'x' given; allowed for source 'drawn': null"),
        ({"source": "folder"}, "path: None given; allowed for source 'folder': a file or folder"),
        ({"source": "folder", "path": "s3://bucket/x"}, "path: 's3://bucket/x' given"),
        ({"source": "folder", "path": "x", "kinds": {"word": 1}}, "kinds: .* allowed for source 'folder': null"),
        ({"source": "folder", "path": "x", "columns": {"image": "y"}}, "columns: .* allowed for source 'folder': null"),
        ({"source": "table", "path": "x", "columns": {"picture": "y"}}, "columns.picture"),
        ({"source": "table", "path": "x", "columns": {"image": ["a", "b"]}}, r"columns.image: \['a', 'b'\] given; allowed: one column"),
        (
            {"source": "table", "path": "x", "columns": {"references": "a"}},
            "columns.references: 'a' given; allowed for task 'text_to_image'",
        ),
        ({"source": "table", "path": "x", "caption_field": "y"}, "caption_field: 'y' given; allowed for source 'table': null"),
        ({"source": "edit_json", "path": "x"}, "task: 'text_to_image' given; allowed for source 'edit_json': 'image_edit'"),
        ({"source": "t2i_sft_json", "path": "x", "task": "image_edit"}, "task: 'image_edit' given; allowed"),
        ({"source": "folder", "path": "x", "glob": "../*"}, r"glob: '../\*' given"),
        ({"source": "laion", "path": "x"}, "source"),
    ],
)
def test_an_impossible_source_is_refused_by_key(change, told):
    with pytest.raises(ValidationError, match=told):
        PartConfig.model_validate({"task": "text_to_image", "split": "train", "samples": 8, "licence": "CC0-1.0"} | change)


def test_only_drawn_parts_bind_the_image_size():
    folder = {"source": "folder", "path": "x", "task": "text_to_image", "split": "train", "licence": "CC0-1.0"}
    data = {"image_size": DRAWN_SIZE * 8, "shard_samples": 4, "parts": {"pets": folder}}
    assert DataConfig.model_validate(data).parts["pets"].samples is None


# Files as others publish them.

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples"
shared = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are absent")


@shared
def test_published_triplets_are_read_with_every_reference():
    path = SAMPLES / "edits" / "triplets.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = records(open_source("triplets", part("edit_json", path, "image_edit", images=str(SAMPLES)), SAMPLES))
    assert [r.prompt for r in found] == [row["instruction"] for row in rows]
    assert [len(r.references) for r in found] == [len(row["input_images"]) for row in rows]
    assert max(len(r.references) for r in found) > 1


@shared
def test_the_toy_list_of_omnigen_names_the_files_that_are_missing():
    path = SAMPLES / "records" / "omnigen" / "toy_data.jsonl"
    config = part("edit_json", path, "image_edit", images=str(SAMPLES / "edits" / "omnigen_toy"))
    found = everything(open_source("toy", config, SAMPLES))
    count = Counter(item.reason.value if isinstance(item, Refused) else "read" for item in found)
    assert count == {"reference_missing": 4, "file_missing": 2, "read": 5}
    assert {item.message for item in found if isinstance(item, Refused) and item.reason is Reason.FILE_MISSING} == {
        f"'edit_target_1.png': no such file in {SAMPLES.resolve() / 'edits' / 'omnigen_toy'}"
    }
    assert "<img><|image_1|></img> wears <img><|image_2|></img>." in [item.prompt for item in found if isinstance(item, Record)]


@shared
def test_the_records_of_the_paper_are_read_as_printed(tmp_path):
    for kind, file, task in (("edit_json", "edit_record", "image_edit"), ("t2i_sft_json", "t2i_sft_record", "text_to_image")):
        text = (SAMPLES / "records" / "deepgen_data_md" / f"{file}.json.txt").read_text()
        folder = write(tmp_path / kind, {"list.json": f"[{text}]"})
        with pytest.raises(ValueError, match="list.json, line"):  # the comma after it is there in print, too
            opened(kind, folder, task)
        write(folder, {"list.json": f"[{text.rstrip().rstrip(',')}]"})
        assert reasons(opened(kind, folder, task)) == ["file_missing"]
        write(folder, {name: png(1) for name in ("editing/input_11656.jpg", "editing/output_11656.png", "image/16685.png")})
        assert reasons(opened(kind, folder, task)) == ["read"]


@shared
def test_tars_of_images_alone_have_no_prompts_and_no_images_no_records():
    tars = SAMPLES / "records" / "webdataset_tars"
    found = records(open_source("clip", part("webdataset", tars, glob="clip_*.tar"), SAMPLES))
    assert [(r.source_id, r.prompt) for r in found[:2]] == [
        ("clip_retrieval_image3.tar#123_456", ""),
        ("clip_retrieval_image3.tar#208_495", ""),
    ]
    for name in ("webdataset_compressed.tar", "webdataset_mpdata.tar"):
        assert set(reasons(open_source("none", part("webdataset", tars / name), SAMPLES))) == {"file_missing"}
    with pytest.raises(ValueError, match="webdataset_sample.tgz is compressed"):
        open_source("sample", part("webdataset", tars / "webdataset_sample.tgz"), SAMPLES)


@shared
@pytest.mark.parametrize("name", ["sample_image", "test_1000", "test_bbox"])
def test_a_list_of_urls_says_to_fetch_first(name):
    with pytest.raises(ValueError, match="holds URLs, not images. Fetch them first, with `deepgen fetch` or img2dataset"):
        open_source("urls", part("table", SAMPLES / "records" / "img2dataset" / f"{name}.parquet"), SAMPLES)
