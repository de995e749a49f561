# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call, also while they are written: as JSON (GLM-4, CodeGeeX4) or as Python (ChatGLM3)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from ..vocabulary import whole_characters


MORE, DONE, BROKEN = "more", "done", "broken"
PYTHON_CALL = r"\s*tool_call\s*\("  # what stands before keyword arguments
_DEEPEST = 64  # json.loads of whoever reads the arguments must not run out of stack
_LONGEST_SCALAR = 400
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_UNFINISHED_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_KEYWORD = re.compile(r"\s*([^\W\d]\w*)\s*=(?!=)(.*)", re.DOTALL)


class JsonArguments:
    """An object in JSON.

    What it gives is at every moment the beginning of a valid object: numbers, words and escapes are held back until
    they are complete.

    Attributes:
        used: characters that were read, up to the end of the object; of a broken one, those before what was not given.
    """

    def __init__(self) -> None:
        self.used = 0
        self._before = 0  # blanks in front of the object
        self._length = 0  # of what was given
        self._held = ""
        self._open: list[str] = []
        self._expected = "object"
        self._string: str | None = None  # what the string is that is open: "key" or "value"

    def feed(self, text: str) -> tuple[str, str]:
        """Reads `text`.

        Returns:
            What is certain by now of the arguments, and `MORE`, `DONE` or `BROKEN`.
        """
        given: list[str] = []
        state = MORE
        for character in text:
            if not self._read(character, given):
                state = BROKEN
                break
            self.used += 1
            if not self._open and self._expected == "end":
                state = DONE
                break
        self._length += sum(map(len, given))
        if state == BROKEN:
            self.used = self._before + self._length
        return "".join(given), state

    def _read(self, character: str, given: list[str]) -> bool:
        if self._string is not None:
            return self._in_string(character, given)
        if self._held and (character.isalnum() or character in "+-."):
            self._held += character
            return len(self._held) <= _LONGEST_SCALAR
        return (not self._held or self._end_scalar(given)) and self._outside(character, given)

    def _end_scalar(self, given: list[str]) -> bool:
        if not _SCALAR.fullmatch(self._held):
            return False
        given.append(self._held)
        self._held = ""
        self._expected = "comma or end"
        return True

    def _in_string(self, character: str, given: list[str]) -> bool:
        if self._held or character == "\\":
            self._held += character
            if _ESCAPE.fullmatch(self._held):
                given.append(self._held)
                self._held = ""
                return True
            return _UNFINISHED_ESCAPE.fullmatch(self._held) is not None
        if character == '"':
            self._expected = "colon" if self._string == "key" else "comma or end"
            self._string = None
        if character < " ":
            return False
        given.append(character)
        return True

    def _outside(self, character: str, given: list[str]) -> bool:
        if character in " \t\r\n":
            if self._open:
                given.append(character)
            else:
                self._before += 1
            return True
        expected = self._expected
        if character == "{" and expected in ("object", "value", "value or end"):
            self._open.append("}")
            self._expected = "key or end"
        elif character == "[" and expected in ("value", "value or end"):
            self._open.append("]")
            self._expected = "value or end"
        elif character in "}]" and expected in ("key or end", "value or end", "comma or end"):
            if self._open[-1] != character:
                return False
            self._open.pop()
            self._expected = "comma or end" if self._open else "end"
        elif character == '"' and expected in ("key", "key or end", "value", "value or end"):
            self._string = "key" if expected.startswith("key") else "value"
        elif character == ":" and expected == "colon":
            self._expected = "value"
        elif character == "," and expected == "comma or end":
            self._expected = "key" if self._open[-1] == "}" else "value"
        elif expected in ("value", "value or end"):
            self._held = character
            return character in "-tfn0123456789"
        else:
            return False
        if len(self._open) > _DEEPEST:
            return False
        given.append(character)
        return True


class KeywordArguments:
    """Reads keyword arguments in Python, after the opening bracket, up to the closing one; only literals.

    Nothing is evaluated, and a name may be a word of Python's own: tools have arguments called `from`.

    Attributes:
        used: characters of the arguments that were read.
        is_closed: whether the closing bracket was among them.
    """

    def __init__(self) -> None:
        self.used = 0
        self.is_closed = False
        self._source = ""
        self._scanned = 0  # of `_source`, which is the argument that is being written
        self._open: list[str] = []
        self._quote = ""
        self._names: set[str] = set()

    def feed(self, text: str) -> Iterator[tuple[str, Any]]:
        """Yields name and value of each argument that `text` completes.

        Raises:
            ValueError: something else is written.
        """
        self._source += text
        while not self.is_closed and (end := self._end_of_argument()) is not None:
            is_last = self._source[end] == ")"
            if self._source[:end].strip():
                yield self._argument(self._source[:end])
            elif not is_last:
                raise ValueError("an argument is empty")
            self.used += end + 1
            self._source, self._scanned = self._source[end + 1 :], 0
            self.is_closed = is_last

    def _argument(self, source: str) -> tuple[str, Any]:
        keyword = _KEYWORD.fullmatch(source)
        if keyword is None:
            raise ValueError("an argument has no name")
        name, value = keyword.groups()
        if name in self._names:
            raise ValueError(f"`{name}` occurs twice")
        self._names.add(name)
        try:
            if value.strip():  # without this, `()`
                return name, ast.literal_eval(f"({value}\n)")
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"`{name}` has no literal value") from error
        raise ValueError(f"`{name}` has no value")

    def _end_of_argument(self) -> int | None:
        """Finds the comma or bracket that ends the argument; `None` if it is not there.

        Raises `ValueError` where nothing can end it.
        """
        source = self._source
        while self._scanned < len(source):
            character = source[self._scanned]
            if self._quote:
                if character == "\\":
                    if self._scanned + 1 == len(source):
                        return None
                    self._scanned += 2
                elif source.startswith(self._quote, self._scanned):
                    self._scanned += len(self._quote)
                    self._quote = ""
                elif character == self._quote[0] and len(source) - self._scanned < len(self._quote):
                    return None  # it may become the three quotes that end the string
                else:
                    self._scanned += 1
                continue
            if character in "\"'":
                three = source[self._scanned : self._scanned + 3]
                if len(three) < 3 and three == character * len(three):
                    return None  # two quotes may be an empty string, or begin one of three
                self._quote = character * 3 if three == character * 3 else character
                self._scanned += len(self._quote)
                continue
            if character in ",)" and not self._open:
                return self._scanned
            if character in "([{":
                self._open.append({"(": ")", "[": "]", "{": "}"}[character])
            elif character in ")]}" and (not self._open or self._open.pop() != character):
                raise ValueError("its brackets do not match")
            if character == "#" or len(self._open) > _DEEPEST:
                raise ValueError("it has a comment, or brackets too deep")
            self._scanned += 1
        return None


class PythonArguments:
    """Keyword arguments in Python ([`KeywordArguments`]), given as JSON, each when it is complete.

    Attributes as in [`JsonArguments`].
    """

    def __init__(self) -> None:
        self._reader = KeywordArguments()
        self._count = 0

    @property
    def used(self) -> int:
        return self._reader.used

    def feed(self, text: str) -> tuple[str, str]:
        """Reads `text`, as [`JsonArguments.feed`]."""
        given: list[str] = []
        try:
            for name, value in self._reader.feed(text):
                written = whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False))
                given += [", " if self._count else "{", json.dumps(name, ensure_ascii=False), ": ", written]
                self._count += 1
        except (ValueError, TypeError, RecursionError):  # also of values that JSON lacks
            return "".join(given), BROKEN
        if not self._reader.is_closed:
            return "".join(given), MORE
        return "".join([*given, "}" if self._count else "{}"]), DONE


def read_python_call(code: str) -> dict[str, Any]:
    """Reads the arguments of a whole `tool_call(name=value, ...)`; see [`KeywordArguments`].

    Raises:
        ValueError: `code` is something else.
    """
    head = re.match(PYTHON_CALL, code)
    if head is None:
        raise ValueError("it is not a call of `tool_call`")
    source, reader = code[head.end() :], KeywordArguments()
    arguments = dict(reader.feed(source))
    if not reader.is_closed:
        raise ValueError("it has no end")
    if source[reader.used :].strip():
        raise ValueError("something follows the call")
    return arguments
