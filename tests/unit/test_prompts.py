import json
from pathlib import Path
from typing import Any

import pytest

from ldm.prompts import MAX_SEED, Prompt, read_prompts, read_seeds
from ldm.registry import ConfigError


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", (0, 1, 2, 3)), ("3,7,11", (3, 7, 11)), (" 9 , 0 - 2", (9, 0, 1, 2)), ("5", (5,)), ("4-4", (4,))],
)
def test_seeds_are_numbers_and_ranges(text: Any, seeds: tuple[int, ...]) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3-1", "runs backwards; write 1-3"),
        ("1,2,1", "seed 1 is given twice"),
        ("0-3,2", "seed 2 is given twice"),
        ("-1", "neither a number from 0"),
        ("0--3", "neither"),
        ("", "neither"),
        ("1,", "neither"),
        ("a", "neither"),
        ("1.5", "neither"),
        (str(MAX_SEED + 1), "too large"),
        ("0-2000000", "more than 1000000 seeds"),
    ],
)
def test_other_seeds_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_seeds(text)
    assert "\n" not in str(caught.value)


def test_prompts_from_the_config_itself() -> None:
    assert read_prompts("a cat") == (Prompt("a cat"),)
    assert read_prompts("") == (Prompt(""),)
    record = {"prompt": "b", "negative": "c", "hints": {"canny": "x/y.png"}}
    assert read_prompts(["a", record]) == (Prompt("a"), Prompt("b", "c", {"canny": Path("x/y.png")}))
    assert read_prompts(record) == read_prompts([record])


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff# animals\r\na cat\r\n\n  a dog \n#\n  # a bird\n#1 dad\n".encode())
    assert [p.text for p in read_prompts(str(file))] == ["a cat", "a dog", "#1 dad"]


def test_jsonl_and_yaml_hold_texts_and_records(tmp_path: Path) -> None:
    record = {"prompt": "line\u2028two", "hints": {"canny": "h.png"}}
    (tmp_path / "p.jsonl").write_text(f'{json.dumps(record, ensure_ascii=False)}\n\n# more\n"a"\n', encoding="utf-8")
    want = (Prompt("line\u2028two", None, {"canny": tmp_path / "h.png"}), Prompt("a"))
    assert read_prompts(str(tmp_path / "p.jsonl")) == want
    (tmp_path / "p.yaml").write_text('- {prompt: "line\\u2028two", hints: {canny: h.png}}\n- a\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.yaml")) == want


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "sample.prompts is not set"),
        ([], "has no prompts"),
        ([3], r"sample.prompts\[0\] is 3, must be a text or a record"),
        (["a", {"promt": "b"}], r"prompts\[1\]: unknown key 'promt'.*did you mean 'prompt'"),
        ({"negative": "b"}, "both must be text"),
        ({"prompt": "b", "negative": 3}, "both must be text"),
        ({"prompt": "b", "hints": ["x.png"]}, "must map adapter names"),
        ("nowhere/p.txt", "does not exist"),
    ],
)
def test_other_prompts_are_refused_in_one_line(value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_prompts(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"\n \n", "has no prompts"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("p.jsonl", b'"a"\n{"prompt": \n', "p.jsonl line 2: not valid JSON"),
        ("p.jsonl", b"3\n", "p.jsonl line 1 is 3"),
        ("p.yaml", b"prompt: a\n", "top level is dict, must be a list"),
        ("p.yaml", b"- [a\n", "not valid YAML"),
        ("p.yaml", b"- !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("p.yaml", b"- a\n- {prompt: b, seed: 3}\n", "p.yaml item 2: unknown key 'seed'"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_misspelt_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(ConfigError, match=r"did you mean 'prompts\.txt'"):
        read_prompts(str(tmp_path / "promts.txt"))


def test_a_record_may_name_image_and_mask_beside_its_file(tmp_path: Path) -> None:
    record = {"prompt": "a", "hints": {"canny": "h.png"}, "image": "i.png", "mask": "m.png"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    (prompt,) = read_prompts(str(tmp_path / "p.jsonl"))
    assert (prompt.image, prompt.mask) == (tmp_path / "i.png", tmp_path / "m.png")
    assert prompt.files == tuple(tmp_path / name for name in ("h.png", "i.png", "m.png"))
    with pytest.raises(ConfigError, match=r"sample.prompts\[0\]: mask is 3, must be an image file"):
        read_prompts({"prompt": "a", "mask": 3})
