# SPDX-License-Identifier: Apache-2.0
"""The text that the tiny model learns, as conversations.

`tiny_chatglm_qa.json` has topics, each with questions and one answer in Chinese (`zh`) and in English (`en`), requests
to repeat or translate the last answer, and questions whose answer is that the model does not know.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple


TEXT_FILE = Path(__file__).with_name("tiny_chatglm_qa.json")
OTHER_LANGUAGE = {"zh": "en", "en": "zh"}
_END_MARKS = "。！？.!?"
_VARIANTS = (
    str,
    lambda question: question.rstrip(_END_MARKS),
    str.lower,
    lambda question: question.lower().rstrip(_END_MARKS),
    lambda question: question.replace("？", "?").replace("！", "!").replace("，", ","),
)


class Turn(NamedTuple):
    """A question and its answer; `topic` (`"unknown"` for none) and `language` are those of the answer."""

    question: str
    answer: str
    topic: str
    language: str


class Text:
    """All questions and answers.

    Raises:
        ValueError: one question, whatever its case and end mark, has two answers.
    """

    def __init__(self, file: Path = TEXT_FILE):
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        self.system_prompts: list[str] = content["system"]
        self._repeat: dict[str, list[str]] = content["repeat"]
        self._translate: dict[str, list[str]] = content["translate"]
        self._subjects = {**content["topics"], "unknown": content["unknown"]}
        self.turns = [
            Turn(question, entry["answer"], topic, language)
            for topic, languages in self._subjects.items()
            for language, entry in languages.items()
            for question in entry["questions"]
        ]
        answers: dict[str, str] = {}
        for turn in self.turns:
            for question in variants(turn.question):
                if answers.setdefault(question, turn.answer) != turn.answer:
                    raise ValueError(f"{file}: the question {question!r} has two answers.")

    def follow_ups(self, turn: Turn) -> list[Turn]:
        """Every request to repeat or translate the answer of `turn`."""
        other = OTHER_LANGUAGE[turn.language]
        translated = self._subjects[turn.topic][other]["answer"]
        # A request to repeat may be in either language, the answer stays in its own.
        repeats = [turn._replace(question=question) for questions in self._repeat.values() for question in questions]
        return repeats + [Turn(question, translated, turn.topic, other) for question in self._translate[other]]

    def random_conversation(self, rng: random.Random, length: int) -> list[Turn]:
        """`length` turns: a new question of any phrasing, a follow-up to the turn before, or an unknown question."""
        conversation: list[Turn] = []
        for _ in range(length):
            if conversation and rng.random() < 0.4:
                turn = rng.choice(self.follow_ups(conversation[-1]))
            else:
                topic = "unknown" if rng.random() < 0.15 else rng.choice(list(self._subjects))
                language = rng.choice(("zh", "en"))
                entry = self._subjects[topic][language]
                turn = Turn(rng.choice(entry["questions"]), entry["answer"], topic, language)
            conversation.append(turn._replace(question=rng.choice(_VARIANTS)(turn.question)))
        return conversation

    def sentences(self) -> list[str]:
        """Every line of the text, for the tokenizer."""
        lines = [line for turn in self.turns for line in (turn.question, turn.question.lower(), turn.answer)]
        for questions in (*self._repeat.values(), *self._translate.values(), self.system_prompts):
            lines += questions
        return [line for text in lines for line in text.split("\n")]


def variants(question: str) -> list[str]:
    """`question` as it may be typed: without its end mark, in lower case, with ASCII punctuation."""
    return list(dict.fromkeys(variant(question) for variant in _VARIANTS))


def messages(conversation: list[Turn], system_prompt: str | None = None) -> list[dict[str, str]]:
    """`conversation` in the form of a chat history."""
    history = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for turn in conversation:
        history.append({"role": "user", "content": turn.question})
        history.append({"role": "assistant", "metadata": "", "content": turn.answer})
    return history
