"""`image_data` of /generate, `image_url` parts of chats, and files that an Engine may name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sglang.srt.entrypoints.generate_request_body import read_generate
from sglang.srt.entrypoints.image_files import with_files
from sglang.srt.entrypoints.openai.chat_messages import messages_with_images, template_messages
from sglang.srt.entrypoints.request_fields import raw_from_python
from sglang.srt.errors import RequestError


def images_of(**fields: Any) -> tuple[tuple[str, ...], ...]:
    return read_generate(raw_from_python(fields)).images


@pytest.mark.parametrize(
    ("text", "image_data", "expected"),
    [
        ("a", None, ()),
        ("a", "", ()),
        ("a", [], ()),
        (["a", "b"], [None, None], ()),
        ("a", "x", (("x",),)),
        ("a", ["x", "y"], (("x", "y"),)),
        ("a", [["x", "y"]], (("x", "y"),)),
        (["a", "b"], "x", (("x",), ("x",))),
        (["a", "b"], ["x", None], (("x",), ())),
        (["a", "b"], [["x", "y"], "z"], (("x", "y"), ("z",))),
    ],
)
def test_image_data(text: Any, image_data: Any, expected: Any) -> None:
    assert images_of(text=text, image_data=image_data) == expected


@pytest.mark.parametrize(
    ("text", "image_data"), [(["a", "b"], ["x"]), ("a", [["x"], ["y"]]), ("a", 5), ("a", [5])]
)
def test_image_data_that_fits_no_prompt(text: Any, image_data: Any) -> None:
    with pytest.raises(RequestError, match="image_data"):
        images_of(text=text, image_data=image_data)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "be kind"}, {"role": "user", "content": list(parts)}]


TEXT = {"type": "text", "text": "what?"}
IMAGE = {"type": "image_url", "image_url": {"url": "u", "detail": "auto"}}


def test_parts_of_chats() -> None:
    messages, sources = messages_with_images(
        [*user(TEXT, IMAGE), *user({"type": "image_url", "image_url": "v"}, TEXT)]
    )
    assert sources == ["u", "v"]
    assert [message["content"] for message in messages] == [
        "be kind",
        [{"type": "text", "text": "what?"}, {"type": "image"}],
        "be kind",
        [{"type": "image"}, {"type": "text", "text": "what?"}],
    ]


def test_texts_stay_texts() -> None:
    messages, sources = messages_with_images(user(TEXT, TEXT))
    assert sources == []
    assert messages == template_messages(user(TEXT, TEXT))


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (user({"type": "image_url", "image_url": {}}), r"content\[0\]': an image_url part"),
        (user(IMAGE, {"type": "video_url"}), r"content\[1\].*video_url"),
        ([{"role": "assistant", "content": [IMAGE]}], "only text parts"),
    ],
)
def test_parts_that_are_not_served(messages: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        messages_with_images(messages)


def test_files_of_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(b"picture")
    named = [str(path), path, path.as_uri(), [str(path), None]]
    assert with_files(named) == [b"picture", b"picture", b"picture", [b"picture", None]]
    kept = ["http://x/a.png", "data:,", "AAAA", "A" * 10_000, b"bytes"]
    assert with_files(kept) == kept
    with pytest.raises(RequestError, match="No such file"):
        with_files((tmp_path / "none.png").as_uri())
    assert images_of(text="a", image_data=b"picture") == (("cGljdHVyZQ==",),)


def test_images_of_pillow() -> None:
    image = Image.new("RGBA", (3, 2), (9, 8, 7, 255))
    packed = with_files([image])[0]
    with Image.open(io.BytesIO(packed)) as found:
        assert (found.format, found.size, found.getpixel((2, 1))) == ("PNG", (3, 2), (9, 8, 7))
    assert with_files(5) == 5
