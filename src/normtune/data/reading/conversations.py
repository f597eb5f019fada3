"""A conversation about images, as fine-tuning toolkits write it -> pairs of question and answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from normtune.data.reading.tables import Fault
from normtune.errors import did_you_mean

MARK = "<image>"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_SHAPES = {"messages": ("role", "content"), "conversations": ("from", "value")}

# Words of the conversation itself, and a pronoun in the place of what an earlier turn named.
_CONVERSATION = re.compile(
    r"\b(you|we) (just |have |had |also )*(said|mention\w*|describ\w*|stat\w+|identif\w+|noted|discussed)\b"
    r"|\b(previous|earlier|last|above|your) (answer|question|response|statement|explanation|description)\b"
    r"|\b(mentioned|described|discussed|noted) (above|earlier|before|previously)\b"
    r"|\b(tell me more|elaborate|anything else|what else|explain (it |that )?(further|more))\b"
    r"|^(what|how) about\b|^(and|but|so)\b|^(why|how so|how come|really|are you sure)( not)?\W*$",
    re.IGNORECASE,
)
_PRONOUNS = frozenset(["it", "its", "it's", "they", "them", "their"])
_FIRST_WORDS = 4  # a pronoun further on has its noun in the question itself


@dataclass(frozen=True)
class Pair:
    """One question of a conversation, its answer, and how many of its images stand before the answer."""

    turn: int  # from 1
    question: str
    answer: str
    images: int
    refers_back: bool


@dataclass(frozen=True)
class Conversation:
    """The images of one row, as it names them, and its pairs of turns."""

    images: tuple[Any, ...]  # paths, or {bytes, path} as parquet keeps them
    pairs: tuple[Pair, ...]


def conversation(cells: dict[str, Any]) -> Conversation:
    """Read a row of `messages` (role, content) or ShareGPT's `conversations` (from, value).

    Images stand in `images` or `image`, or inside a message's content ({"type": "image", "image": path}). A
    `<image>` mark, or an image in the content, says where an image is shown; without any mark all are shown
    before the first question. System messages are left out: families have their own.

    Raises:
        Fault: the row is of neither shape, turns do not alternate from a question to an answer, or there
            are other numbers of marks than of images.
    """
    shape = next((shape for shape in _SHAPES if isinstance(cells.get(shape), list)), None)
    if shape is None:
        hint = did_you_mean("messages", cells) or did_you_mean("conversations", cells)
        what = f"no list 'messages' or 'conversations'{hint.replace('did you mean', 'is it')}"
        raise Fault(what, "Write one conversation a row.")
    stated = _images(cells)
    turns: list[tuple[str, str, int]] = []  # role, text, marks in it
    inline: list[Any] = []
    for number, message in enumerate(cells[shape], start=1):
        role, text, shown = _turn(message, *_SHAPES[shape], number)
        inline += shown
        if role != "system":
            marks = text.count(MARK) if role == "user" else 0
            turns.append((role, text.replace(MARK, " ") if marks else text, marks))
    if inline and stated:
        raise Fault("images both in the content and beside it", "Name each image once.")
    return Conversation(tuple(stated or inline), _pairs(turns, len(stated or inline)))


def refers_back(question: str) -> bool:
    """Whether a later question seems to need the turns before it: a rule of words, not an understanding.

    True where it speaks of the conversation ("you mentioned", "the previous answer", "what about ...") or
    where one of its first words is a pronoun (it, its, they, them, their): "Where is it located?".
    """
    words = [word.strip('.,;:?!"()').lower() for word in question.split()]
    return bool(_CONVERSATION.search(question.strip())) or any(w in _PRONOUNS for w in words[:_FIRST_WORDS])


def _images(cells: dict[str, Any]) -> list[Any]:
    for column in ("images", "image"):
        value = cells.get(column)
        if value is not None and value != "" and value != []:
            return value if isinstance(value, list) else [value]
    return []


def _turn(message: Any, role_key: str, text_key: str, number: int) -> tuple[str, str, list[Any]]:
    """(role, its text with a mark for each image, images named in it) of one message."""
    message = message if isinstance(message, dict) else {}
    word = message.get(role_key)
    role = _ROLES.get(word.lower()) if isinstance(word, str) else None
    if role is None:
        raise Fault(f"turn {number}: '{role_key}' is none of {', '.join(_ROLES)}", "Use these.")
    content = message.get(text_key)
    if isinstance(content, str):
        return role, content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Fault(f"turn {number}: '{text_key}' is no text", "Write text, or a list of parts with types.")
    texts: list[str] = []
    shown: list[Any] = []
    for part in content:
        match part.get("type"):
            case "text" if isinstance(part.get("text"), str):
                texts.append(part["text"])
            case "image":
                texts.append(MARK)
                named = part.get("image") or part.get("path")
                shown += [named] if named else []
            case _:
                raise Fault(f"turn {number}: a part is neither text nor image", "Remove it.")
    return role, "\n".join(texts), shown


def _pairs(turns: list[tuple[str, str, int]], images: int) -> tuple[Pair, ...]:
    marks = sum(marks for _, _, marks in turns)
    if marks not in (0, images):
        raise Fault(f"{marks} {MARK} marks for {images} images", "Write one mark for each image, or none.")
    roles = [role for role, _, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Fault("turns do not go from question to answer", "Write user and assistant in turn.")
    shown = 0 if marks else images
    pairs = []
    for turn, ((_, question, here), (_, answer, _)) in enumerate(
        zip(turns[::2], turns[1::2], strict=True), 1
    ):
        shown += here
        question = question.strip()
        pairs.append(Pair(turn, question, answer.strip(), shown, turn > 1 and refers_back(question)))
    return tuple(pairs)
