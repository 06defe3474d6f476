"""MiniGPT-4's prompts: cut where images stand and tokenised apart, in the original's words, for training and for chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline

from mllm_fast.models.minigpt4 import MiniGPT4Processor
from mllm_fast.models.minigpt4_processing import STYLES
from tests.models.minigpt4_models import IMAGE, PAD, QUERIES, config, llama, minigpt4, processor, tokenizer

# Of OpenAI's CLIP, which the original's BlipImageEvalProcessor has.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. Please "
    "answer my questions."
)


def picture(shade: int = 10) -> Image.Image:
    return Image.new("RGB", (40, 30), (shade, 2 * shade, 0))


def pieces(prompt: str) -> list[int]:
    """The original's `get_context_emb`, with image tokens for images."""
    ids: list[int] = []
    for i, piece in enumerate(prompt.split("<ImageHere>")):
        ids += [IMAGE] * QUERIES * bool(i) + tokenizer()(piece, add_special_tokens=i == 0)["input_ids"]
    return ids


def test_the_tokenizer_tells_pieces_from_the_whole() -> None:
    """Or these tests would show nothing: a piece begins with a space of its own, and no piece but the first with bos."""
    whole, apart = (tokenizer()(text, add_special_tokens=False)["input_ids"] for text in ("ab", "b"))
    assert whole[-len(apart) :] != apart
    assert tokenizer()("b")["input_ids"] == [1, *apart]


def test_prompts_and_pictures() -> None:
    prompts = ["###Human: <Img><ImageHere></Img> this? <Img><ImageHere></Img>", "<ImageHere>", "Hi th", "<ImageHere>"]
    out = processor()([picture(i) for i in (10, 20, 30, 40)], prompts)
    rows = [pieces(prompt) for prompt in prompts]
    length = max(map(len, rows))
    assert out["input_ids"].tolist() == [[PAD] * (length - len(row)) + row for row in rows]
    assert out["attention_mask"].tolist() == [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    assert out["pixel_values"].shape == (4, 3, 56, 56)
    for image, shade in zip(out["pixel_values"], (10, 20, 30, 40), strict=True):
        colours = [(c / 255 - m) / s for c, m, s in zip((shade, 2 * shade, 0), MEAN, STD, strict=True)]
        torch.testing.assert_close(image[:, 3, 5], torch.tensor(colours), atol=1e-5, rtol=1e-5)
    assert list(processor()(None, "Hi")) == ["input_ids", "attention_mask"]
    assert list(processor()(picture())) == ["pixel_values"]


def test_pictures_are_squeezed_into_a_square() -> None:
    """The original resizes both sides and crops nothing: a bright edge of a wide picture is still there."""
    wide = np.zeros((30, 120, 3), dtype=np.uint8)
    wide[:, -30:] = 255
    image = processor()(Image.fromarray(wide))["pixel_values"][0]
    assert image[0, 28, 50] > 1.5
    assert image[0, 28, 5] < -1.5


def test_instructions() -> None:
    """The template of the original's configurations, which training and benchmarks share."""
    assert processor().instruct("Describe this image in detail.") == (
        "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
    )
    assert processor("llama2").instruct("What?", images=2) == (
        "[INST] <Img><ImageHere></Img> <Img><ImageHere></Img> What? [/INST] "
    )
    assert processor("v2").instruct("Hi", images=0) == "[INST] Hi [/INST]"
    assert processor().stop_strings == ["###"]
    assert processor("llama2").stop_strings == ["</s>"]


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'What\'s "this"?'}]},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And its colour?"},
]
CONVERSATIONS = {
    "vicuna": SYSTEM
    + '###Human: <Img><ImageHere></Img> What\'s "this"?###Assistant: A dog.###Human: And its colour?###'
    "Assistant: ",
    "llama2": SYSTEM
    + '<s>[INST] <Img><ImageHere></Img> What\'s "this"? [/INST] A dog.<s>[INST] And its colour? [/INST] ',
    "v2": '<s>[INST] <Img><ImageHere></Img> What\'s "this"? [/INST]A dog.<s>[INST] And its colour? [/INST]',
}


@pytest.mark.parametrize("style", STYLES)
def test_conversations(style: str) -> None:
    """The strings that the original's `Conversation.get_prompt` makes."""
    text = processor(style).apply_chat_template(CHAT, add_generation_prompt=True)
    assert text == CONVERSATIONS[style]
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    begin = STYLES[style].user
    assert (
        processor(style).apply_chat_template(own)
        == f"Be brief.{STYLES[style].separator}{begin}Hi{STYLES[style].separator}"
    )


def test_a_conversation_with_its_picture() -> None:
    """As transformers' pipelines ask for it."""
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
    p = processor()
    out = p.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    text = p.apply_chat_template(chat, add_generation_prompt=True)
    assert out["input_ids"].tolist() == [pieces(text)]
    assert torch.equal(out["pixel_values"], p(picture())["pixel_values"])
    # "v2" begins with bos itself, which is not said twice.
    first = processor("v2").apply_chat_template(chat[:1], tokenize=True, return_dict=True)["input_ids"][0, :2].tolist()
    assert first[0] == 1
    assert first[1] != 1


def test_training_batch() -> None:
    p, tok = processor(), tokenizer()
    prompts, answers = [p.instruct("What?"), "###Human: Hi ###Assistant: "], ["th$$a", "Hello there, you"]
    out = p.training_batch([[picture()], []], prompts, answers, max_answer_tokens=6)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        said = tok(answer + "###", add_special_tokens=False)["input_ids"][:6]
        ids = pieces(prompt) + said
        length = len(out["input_ids"][row])
        assert out["input_ids"][row].tolist() == ids + [PAD] * (length - len(ids))
        assert out["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (length - len(ids))
        learned = [-100 if i == PAD else i for i in said]
        labels = [-100] * len(pieces(prompt)) + learned
        assert out["labels"][row].tolist() == labels + [-100] * (length - len(ids))
    assert PAD in out["input_ids"][0][: len(pieces(prompts[0])) + 3].tolist(), "the answer holds the padding token"
    whole = p.training_batch(None, prompts[1:], answers[1:], max_answer_tokens=None)
    assert whole["labels"][0, -1] == tok.convert_tokens_to_ids("###")
    assert "pixel_values" not in whole


def test_training_on_conversations() -> None:
    """Later prompts begin with bos, and only answers are learned (the original's `tokenize_conversation`)."""
    p, tok = processor(), tokenizer()
    questions, answers = [p.instruct("What?"), "###Human: More? ###Assistant: "], ["A dog", "No"]
    out = p.training_batch(picture(), [questions], [answers])
    first, second = (tok(answer + "###", add_special_tokens=False)["input_ids"] for answer in answers)
    asked = tok("<s>" + questions[1], add_special_tokens=False)["input_ids"]
    assert asked[0] == 1
    prompt = pieces(questions[0])
    assert out["input_ids"].tolist() == [prompt + first + asked + second]
    assert out["labels"].tolist() == [[-100] * len(prompt) + first + [-100] * len(asked) + second]


def test_what_does_not_match() -> None:
    p = processor()
    with pytest.raises(
        ValueError, match="hold 1, 2 times <ImageHere>, but 2 images were given; write <ImageHere> once"
    ):
        p([picture(), picture()], ["<ImageHere>", "<ImageHere> <ImageHere>"])
    with pytest.raises(ValueError, match="hold 1, 1 times <ImageHere>, but 2, 0 images were given"):
        p([[picture(), picture()], []], ["<ImageHere>", "<ImageHere>"])
    with pytest.raises(ValueError, match="hold 1 times <ImageHere>, but 0 images"):
        p.training_batch(None, ["<ImageHere>"], ["a"])
    with pytest.raises(ValueError, match="got 2 prompts and 1 answers"):
        p.training_batch(None, [["a", "b"]], ["c"])
    with pytest.raises(ValueError, match="stands in a later prompt; put images into the first"):
        p.training_batch([picture()], [["a", "<ImageHere>"]], [["b", "c"]])
    with pytest.raises(ValueError, match="unknown style 'alpaca'; choose one of vicuna, llama2, v2"):
        processor("alpaca")


def test_answers_are_read_as_the_chat_reads_them() -> None:
    p, tok = processor(), tokenizer()
    said = "Human: x Assistant: It is red.###Human: and?"
    ids = torch.tensor([[5, 6, *tok(said, add_special_tokens=False)["input_ids"]]])
    assert p.read_answers(ids, prompt_length=2) == ["It is red."]
    ids = torch.tensor([tok("[INST] q [/INST] Blue</s>", add_special_tokens=False)["input_ids"]])
    assert processor("llama2").read_answers(ids) == ["Blue"]


def test_it_feeds_the_model() -> None:
    p, model = processor(), minigpt4()
    batch = p([picture(10), picture(20)], [p.instruct("Both?", images=2), p.instruct("Hi", images=0)])
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    prompt = p.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert prompt[1].endswith("###Human: Hi ###Assistant: ".rstrip()) or prompt[1].endswith(
        "###Human: Hi ###Assistant: "
    )
    assert p.post_process_image_text_to_text(out)[1].startswith(prompt[1])
    assert p.decode(batch["input_ids"][0], skip_special_tokens=True) == prompt[0]
    assert len(p.read_answers(out, batch["input_ids"].shape[1])) == 2


def test_pipeline(tmp_path: Path) -> None:
    """transformers' own, from a folder: with a conversation, and with several prompts of its own making."""
    minigpt4().save_pretrained(tmp_path)
    p = processor()
    p.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
    given = p(picture(), p.apply_chat_template(chat, add_generation_prompt=True))
    said = ask.model.generate(**given, max_new_tokens=4, do_sample=False)[:, given["input_ids"].shape[1] :]
    settings = {"max_new_tokens": 4, "do_sample": False}
    answer = ask(text=chat, generate_kwargs=settings)[0]["generated_text"][-1]["content"]
    assert answer == p.batch_decode(said, skip_special_tokens=True)[0]
    prompts = [p.instruct("Hi"), p.instruct("What is this?")]
    for prompt, out in zip(
        prompts, ask(images=[picture(), picture()], text=prompts, generate_kwargs=settings), strict=True
    ):
        assert out["generated_text"].startswith(prompt)


def test_save_and_load(tmp_path: Path) -> None:
    p = processor("v2", image_token="<|image|>", image_token_id=-7)
    p.save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    expected = p(picture(), "a <|image|> b")
    for again in (MiniGPT4Processor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is MiniGPT4Processor
        assert again.style == "v2"
        found = again(picture(), "a <|image|> b")
        assert found["input_ids"].eq(-7).sum() == 4
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert again.apply_chat_template(CHAT) == p.apply_chat_template(CHAT)


@pytest.mark.parametrize(("style", "size", "rows"), [("vicuna", 224, 32), ("llama2", 224, 64), ("v2", 448, 256)])
def test_for_the_originals_files(tmp_path: Path, style: str, size: int, rows: int) -> None:
    """The tokenizer of the language model's folder is all that there is."""
    llama().save_pretrained(tmp_path)
    plain = tokenizer()
    plain.pad_token = None
    plain.save_pretrained(tmp_path)
    p = MiniGPT4Processor.from_original(tmp_path, style=style, image_size=size)
    assert p.tokenizer.pad_token == "$$"
    out = p(picture(), p.instruct("What?"))
    assert out["input_ids"].eq(IMAGE).sum() == rows
    assert out["pixel_values"].shape == (1, 3, size, size)
