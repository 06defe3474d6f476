"""Folders with captions files, `datasets` datasets, and splits of them; every defect by file and row."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_fast.finetune.data import CaptionFolder, DataError, DatasetCaptions, Sample, open_dataset, split

ROWS = [
    {"image": "a.png", "caption": "a, quoted \"red\" one\nover two lines"},
    {"image": "sub/b.jpg", "caption": " green ", "prompt": "what colour?"},
    {"image": "a.png", "caption": "again red", "prompt": ""},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    Image.new("L", (5, 5), 90).save(tmp_path / "sub" / "b.jpg")
    return tmp_path


def write(folder: Path, kind: str, rows: Any = None) -> Path:
    """Good rows, or rows as text."""
    path = folder / f"captions.{kind}"
    if isinstance(rows, str):
        path.write_text(rows)
        return path
    rows = ROWS if rows is None else rows
    if kind == "csv":
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["caption", "image", "prompt", "more"], restval="")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_folder_gives_its_samples(folder: Path, kind: str) -> None:
    write(folder, kind)
    data = CaptionFolder(folder)
    assert len(data) == 3
    found = [data[i] for i in range(3)]
    assert [sample.caption for sample in found] == ['a, quoted "red" one\nover two lines', "green", "again red"]
    # A field of a CSV file cannot be left out.
    assert [sample.prompt for sample in found] == [None, "what colour?", None if kind == "csv" else ""]
    assert [sample.images[0].size for sample in found] == [(8, 6), (5, 5), (8, 6)]
    assert all(sample.images[0].mode == "RGB" for sample in found)
    assert found[0].images[0].getpixel((0, 0)) == (255, 0, 0)
    assert [data.group(i) for i in range(3)] == ["a.png", "sub/b.jpg", "a.png"]
    data.check()


def test_several_pictures_a_sample(folder: Path) -> None:
    write(folder, "json", [{"image": ["a.png", "sub/b.jpg"], "caption": "two"}])
    assert [image.size for image in CaptionFolder(folder)[0].images] == [(8, 6), (5, 5)]


DEFECTS = {
    "missing": ("csv", "image,caption\na.png,x\nno.png,y\n", "captions.csv row 3: there is no picture .*no.png"),
    "empty caption": ("csv", "image,caption\na.png,x\na.png,  \n", "captions.csv row 3: caption is empty"),
    "empty image": ("csv", "image,caption\n,x\n", "captions.csv row 2: image is empty"),
    "twice": ("csv", "image,caption,caption\na.png,x,y\n", "row 1: the column caption stands there twice"),
    "column": ("csv", "image,text\na.png,x\n", "row 1: no column caption; the columns are image, text"),
    "fields": ("csv", "image,caption\na.png,x,y\n", "row 2: 3 fields for 2 columns; quote texts"),
    "quotes": ("csv", 'image,caption\na.png,"x"y\n', "row 2: "),
    "no rows": ("csv", "image,caption\n", "captions.csv holds no captions"),
    "no file": ("csv", "", "row 1: no column image, caption; the columns are none"),
    "line": ("jsonl", '{"image": "a.png", "caption": "x"}\n{"image": \n', "captions.jsonl row 2: no JSON: Expecting value"),
    "key twice": ("jsonl", '{"image": "a.png", "caption": "x", "caption": "y"}', "row 1: caption stands there twice"),
    "type": ("jsonl", '{"image": "a.png", "caption": 3}', r"row 1: caption is 3 \(int\); expected a text"),
    "no caption": ("jsonl", '{"image": "a.png"}', "row 1: caption is missing"),
    "no object": ("jsonl", '["a.png"]', "row 1: a list; expected an object"),
    "prompt": ("jsonl", '{"image": "a.png", "caption": "x", "prompt": 1}', r"row 1: prompt is 1 \(int\)"),
    "image type": ("json", '[{"image": {"a": 1}, "caption": "x"}]', "captions.json entry 1: image is"),
    "no images": ("json", '[{"image": [], "caption": "x"}]', "entry 1: image is an empty list"),
    "no list": ("json", '{"image": "a.png"}', "captions.json holds an object; expected a list"),
    "no json": ("json", '[{"image"\n oh]', "captions.json line 2: no JSON"),
    "json twice": ("json", '[{"image": "a.png", "image": "b"}]', "entry with image 'a.png': image stands there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_named_by_file_and_row(folder: Path, name: str) -> None:
    kind, text, says = DEFECTS[name]
    write(folder, kind, text)
    with pytest.raises(DataError, match=says):
        CaptionFolder(folder)


def test_many_defects_are_counted(folder: Path) -> None:
    write(folder, "csv", "image,caption\n" + "".join(f"{i}.png,x\n" for i in range(9)))
    with pytest.raises(DataError, match=r"row 2: .*row 6: .*; and 4 more$"):
        CaptionFolder(folder)


def test_a_damaged_picture_is_named_when_it_is_read(folder: Path) -> None:
    write(folder, "csv")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:40])
    data = CaptionFolder(folder)
    assert data[1].caption == "green"
    # Line 3 ends the first quoted caption.
    with pytest.raises(DataError, match=r"captions.csv row 3: .*a.png is not an image that Pillow can read"):
        data[0]
    with pytest.raises(DataError, match=r"row 3: .*; .*row 5: .*a.png"):
        data.check()


def test_which_captions_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no captions file was found in .*captions.csv, captions.jsonl, captions.json"):
        CaptionFolder(folder)
    with pytest.raises(DataError, match="is no folder"):
        CaptionFolder(folder / "nowhere")
    write(folder, "csv"), write(folder, "json", ROWS[:1])
    with pytest.raises(DataError, match=r"has captions.csv, captions.json; say which is meant"):
        CaptionFolder(folder)
    assert len(CaptionFolder(folder, "captions.json")) == 1
    with pytest.raises(DataError, match=r"has no captions file other.csv"):
        CaptionFolder(folder, "other.csv")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"ends in '.txt'; expected .csv, .jsonl, .json"):
        CaptionFolder(folder, "notes.txt")
    (folder / "captions.csv").write_bytes(b"image,caption\na.png,\xff\n")
    with pytest.raises(DataError, match=r"captions.csv is not UTF-8 text: byte 20 is 0xff"):
        CaptionFolder(folder, "captions.csv")


class Table:
    """What `datasets.Dataset` has of what is used here."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_a_dataset_gives_its_samples(folder: Path) -> None:
    red = Image.new("L", (3, 3), 9)
    table = Table([{"img": red, "text": " one "}, {"img": [red, str(folder / "a.png")], "text": "two"}])
    data = DatasetCaptions(table, "img", "text")
    assert [len(data), data[0].caption, data[0].prompt, len(data[1].images)] == [2, "one", None, 2]
    assert data[0].images[0].mode == "RGB"
    assert DatasetCaptions(Table([{"img": red, "text": "x", "prompt": "p"}]), "img", "text")[0].prompt == "p"
    with pytest.raises(DataError, match="no column 'image', 'caption'; it has 'img', 'text'"):
        DatasetCaptions(table)
    for row, says in (
        ({"image": red, "caption": ["x", "y"]}, "sample 0 of the dataset: caption is .*expected a text"),
        ({"image": red, "caption": " "}, "sample 0 of the dataset: caption is empty"),
        ({"image": 3, "caption": "x"}, r"sample 0 of the dataset: image is 3 \(int\); expected a picture"),
        ({"image": str(folder / "no.png"), "caption": "x"}, "sample 0 of the dataset: image: .*no.png does not exist"),
        ({"image": red, "caption": "x", "prompt": 2}, r"prompt is 2 \(int\)"),
    ):
        with pytest.raises(DataError, match=says):
            DatasetCaptions(Table([row]))[0]


def test_what_a_source_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "csv")
    assert isinstance(open_dataset(folder), CaptionFolder)
    assert len(open_dataset(str(folder), captions="captions.csv")) == 3
    with pytest.raises(DataError, match="is a file; expected the folder"):
        open_dataset(folder / "captions.csv")
    # Without the library, the error says what it would be for.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"some/name is no folder with a captions file, .*pip install datasets"):
        open_dataset("some/name")
    # With it, a name is looked up, and one that is not found is said to be no folder either.
    asked: list[Any] = []
    table = Table([{"image": Image.new("L", (3, 3)), "caption": "x"}])

    def load_dataset(name: str, subset: str | None) -> Any:
        asked.append((name, subset))
        if name == "some/name":
            return {"train": table, "test": Table(table.rows * 2)}
        raise FileNotFoundError("nothing there")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [len(open_dataset("some/name", subset="s", split=part)) for part in (None, "test")] == [1, 2]
    assert asked == [("some/name", "s")] * 2
    with pytest.raises(DataError, match="no split 'other'; it has 'train', 'test'"):
        open_dataset("some/name", split="other")
    with pytest.raises(DataError, match=r"no/name is neither a folder here nor a dataset .*nothing there"):
        open_dataset("no/name")


def test_a_dataset_that_the_library_saved(folder: Path, tmp_path: Path) -> None:
    import datasets

    rows = {"image": [str(folder / "a.png"), str(folder / "sub" / "b.jpg")], "caption": ["red", "grey"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    for name in ("one", "splits"):
        data = open_dataset(tmp_path / name)
        assert [data[i].caption for i in range(len(data))] == ["red", "grey"]
        assert data[0].images[0].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(DataError, match="has no splits, but split 'test' was asked for"):
        open_dataset(tmp_path / "one", split="test")


class Numbers:
    """Samples by number; `pairs`: two of them show one picture."""

    def __init__(self, count: int, pairs: bool = False) -> None:
        self.count, self.pairs = count, pairs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index

    def group(self, index: int) -> int:
        return index // 2 if self.pairs else index


def test_a_split_is_of_its_seed_and_keeps_pictures_on_one_side() -> None:
    train, held_out = split(Numbers(20), 0.25, seed=3)
    sides = [{part[i] for i in range(len(part))} for part in (train, held_out)]
    assert [len(side) for side in sides] == [15, 5]
    assert sides[0] | sides[1] == set(range(20))
    again = split(Numbers(20), 5, seed=3)[1]
    assert sorted(again.indices) == sorted(held_out.indices)
    assert sorted(split(Numbers(20), 5, seed=4)[1].indices) != sorted(held_out.indices)
    train, held_out = split(Numbers(20, pairs=True), 5)
    assert len(held_out) == 6  # whole pairs
    assert not {train.group(i) for i in range(len(train))} & {held_out.group(i) for i in range(len(held_out))}
    for wrong in (0, 20, 1.0 * 20, -1, 0.001):
        with pytest.raises(ValueError, match="expected some of both"):
            split(Numbers(20), wrong)
    with pytest.raises(ValueError, match=r"held_out is 2.5; expected a share"):
        split(Numbers(20), 2.5)
    with pytest.raises(ValueError, match="2 samples with 1 different pictures"):
        split(Numbers(2, pairs=True), 0.5)


def test_a_sample_is_what_it_was() -> None:
    sample = Sample((), "x")
    with pytest.raises(AttributeError):
        sample.caption = "y"  # type: ignore[misc]
