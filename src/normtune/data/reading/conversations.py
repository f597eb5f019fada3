"""Converts a conversation about images, as fine-tuning toolkits write it, to question-answer pairs.

Example: the row

    {"messages": [{"role": "user", "content": "<image>What is shown?"},
                  {"role": "assistant", "content": "A chest X-ray."},
                  {"role": "user", "content": "Where is it abnormal?"},
                  {"role": "assistant", "content": "In the left lung."}],
     "images": ["a.png"]}

becomes two pairs, both about a.png. The second has `refers_back` set: "it" is among its first words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from normtune.data.reading.tables import RowError
from normtune.errors import did_you_mean

IMAGE_MARK = "<image>"  # in a message's text: the position of an image
# Role in the file -> its meaning; human and gpt are ShareGPT's names.
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation")  # roles that are not read
# Marks of a message that is context only: OpenAI's weight, ms-swift's loss, axolotl's train.
_NOT_LEARNT = {"weight": 0, "loss": False, "train": False}
# Columns of rows with one question: ms-swift's query and response, Alpaca's instruction, input and output.
_ONE_TURN = {"response": ("query",), "output": ("instruction", "input")}
CONVERSATION_FIELDS = (
    *("messages", "conversations", "images", "image"),
    *("query", "response", "history", "instruction", "input", "output"),
)
# Column of the conversation -> (key of a message's role, key of its text).
_LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}

# Phrases that mention the conversation itself ("you mentioned", "the previous answer", "what about ...").
_CONVERSATION = re.compile(
    r"\b(you|we) (just |have |had |also )*(said|mention\w*|describ\w*|stat\w+|identif\w+|noted|discussed)\b"
    r"|\b(previous|earlier|last|above|your) (answer|question|response|statement|explanation|description)\b"
    r"|\b(mentioned|described|discussed|noted) (above|earlier|before|previously)\b"
    r"|\b(tell me more|elaborate|anything else|what else|explain (it |that )?(further|more))\b"
    r"|^(what|how) about\b|^(and|but|so)\b|^(why|how so|how come|really|are you sure)( not)?\W*$",
    re.IGNORECASE,
)
_PAIR = ("user", "assistant")
_PRONOUNS = frozenset(["it", "its", "it's", "they", "them", "their"])
_FIRST_WORDS = 4  # a pronoun after them usually refers to a noun of the same question


@dataclass(frozen=True)
class Pair:
    """One question of a conversation and its answer."""

    turn: int  # number of the pair, from 1
    question: str  # without image marks
    answer: str
    image_count: int  # the first so many images of the conversation are shown before the answer
    refers_back: bool  # the question seems to need earlier turns; see `refers_back`
    learnt: bool = True  # False: the row marks the answer as context only (weight 0 or loss false)


@dataclass(frozen=True)
class Conversation:
    """The images of one row, as the row names them, and its question-answer pairs."""

    images: tuple[Any, ...]  # paths, or {bytes, path} as in parquet files
    pairs: tuple[Pair, ...]


def read_conversation(cells: dict[str, Any]) -> Conversation:
    """Read a row in the layout `messages` (role, content) or ShareGPT's `conversations` (from, value).

    Rows with one question are read too: `query`, `response` and `history` (ms-swift), or `instruction`, `input` and
    `output` (Alpaca). Images are named in `images` or `image`, or inside a message's content
    ({"type": "image", "image": path}, or OpenAI's {"type": "image_url", "image_url": {"url": path}}). Answers with
    "weight": 0, "loss": false or "train": false are context only.
    An `<image>` mark, or an image in the content, is the position at which an image is shown. Without any
    mark, all images are shown before the first question. System messages are ignored, as model families have
    their own.

    Args:
        cells: column -> value of the row.

    Raises:
        RowError: the row has neither layout, questions and answers do not alternate, or the number of marks
            is not the number of images.
    """
    cells = _as_messages(cells)
    layout = next((name for name in _LAYOUTS if isinstance(cells.get(name), list)), None)
    if layout is None:
        hint = did_you_mean("messages", cells) or did_you_mean("conversations", cells)
        what = f"no list 'messages' or 'conversations'{hint.replace('did you mean', 'is it')}"
        raise RowError(what, "Write one conversation a row.")
    named_images = _images(cells)
    turns: list[tuple[str, str, int, bool]] = []  # role, text without marks, number of marks, whether it is learnt
    inline_images: list[Any] = []
    for number, message in enumerate(cells[layout], start=1):
        role, text, images = _turn(message, *_LAYOUTS[layout], number)
        inline_images += images
        if role != "system":
            marks = text.count(IMAGE_MARK) if role == "user" else 0
            learnt = all(message.get(key, True) != value for key, value in _NOT_LEARNT.items())
            turns.append((role, text.replace(IMAGE_MARK, " ") if marks else text, marks, learnt))
    if inline_images and named_images:
        what = "images both in a message's content and in the column of images"
        raise RowError(what, "Name each image once.")
    all_images = named_images or inline_images
    return Conversation(tuple(all_images), _pairs(turns, len(all_images)))


def _as_messages(cells: dict[str, Any]) -> dict[str, Any]:
    """A row with one question (query and response, or instruction, input and output) in the layout `messages`."""
    if any(name in cells for name in _LAYOUTS):
        return cells
    for answer, columns in _ONE_TURN.items():
        if isinstance(cells.get(answer), str) and isinstance(cells.get(columns[0]), str):
            question = "\n".join(str(cells[column]) for column in columns if cells.get(column))
            turns = [*(cells.get("history") or []), (question, cells[answer])]
            if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
                raise RowError("history is no list of questions and answers", "Write [[question, answer], ...].")
            roles = ({"role": role, "content": text} for turn in turns for role, text in zip(_PAIR, turn, strict=True))
            return cells | {"messages": list(roles)}
    return cells


def refers_back(question: str) -> bool:
    """Whether a question seems to need the turns before it. This is a rule on words and can be wrong.

    True if the question mentions the conversation ("you mentioned", "the previous answer", "what about ..."),
    or if one of its first four words is a pronoun (it, its, they, them, their), as in "Where is it located?".
    """
    words = [word.strip('.,;:?!"()').lower() for word in question.split()]
    return bool(_CONVERSATION.search(question.strip())) or any(w in _PRONOUNS for w in words[:_FIRST_WORDS])


def _images(cells: dict[str, Any]) -> list[Any]:
    """The images that the row's column `images` or `image` names."""
    for column in ("images", "image"):
        value = cells.get(column)
        if value is not None and value != "" and value != []:
            return value if isinstance(value, list) else [value]
    return []


def _turn(message: Any, role_key: str, text_key: str, number: int) -> tuple[str, str, list[Any]]:
    """Read one message.

    Args:
        message: the message, {role_key: ..., text_key: ...}.
        role_key: key of the role.
        text_key: key of the text.
        number: number of the message in the row, for errors.

    Returns:
        The role ("user", "assistant" or "system"), the text with a mark for each image, and the images that
        the content names.
    """
    message = message if isinstance(message, dict) else {}
    word = message.get(role_key)
    role = _ROLES.get(word.lower()) if isinstance(word, str) else None
    if role is None and word in _TOOLS:
        raise RowError(f"turn {number} is of a tool", "Skipped: tool calls are not read.", harmless=True)
    if role is None:
        raise RowError(f"turn {number}: '{role_key}' is none of {', '.join(_ROLES)}", "Use one of these.")
    content = message.get(text_key)
    if isinstance(content, str):
        return role, content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        what = f"turn {number}: '{text_key}' is not text"
        raise RowError(what, "Write text, or a list of parts with types.")
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        match part.get("type"):
            case "text" if isinstance(part.get("text"), str):
                texts.append(part["text"])
            case "image":
                texts.append(IMAGE_MARK)
                image = part.get("image") or part.get("path")
                images += [image] if image else []
            case "image_url":
                texts.append(IMAGE_MARK)
                image = part.get("image_url")
                images.append(image.get("url") if isinstance(image, dict) else image)
            case _:
                raise RowError(f"turn {number}: a part is neither text nor image", "Remove it.")
    return role, "\n".join(texts), images


def _pairs(turns: list[tuple[str, str, int, bool]], images: int) -> tuple[Pair, ...]:
    """Join each question with the answer after it.

    Args:
        turns: (role, text, number of image marks, whether it is learnt) of each message but system messages.
        images: number of images of the conversation.
    """
    marks = sum(marks for _, _, marks, _ in turns)
    if marks not in (0, images):
        what = f"{marks} {IMAGE_MARK} marks for {images} images"
        raise RowError(what, "Write one mark for each image, or none.")
    roles = [role for role, *_ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RowError("questions and answers do not alternate", "Write user and assistant in turn.")
    # Images shown so far: without marks all images from the start, else one for each mark so far.
    image_count = 0 if marks else images
    pairs = []
    for turn, (user, assistant) in enumerate(zip(turns[::2], turns[1::2], strict=True), 1):
        (_, question, new_images, _), (_, answer, _, learnt) = user, assistant
        image_count += new_images
        question = question.strip()
        pairs.append(Pair(turn, question, answer.strip(), image_count, turn > 1 and refers_back(question), learnt))
    return tuple(pairs)
