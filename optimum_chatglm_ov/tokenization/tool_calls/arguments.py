# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call while they are written: as JSON (GLM-4, CodeGeeX4) or as Python (ChatGLM3)."""

from __future__ import annotations

import ast
import json
import re

from ..vocabulary import whole_characters


MORE, DONE, BROKEN = "more", "done", "broken"
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


class PythonArguments:
    """Keyword arguments in Python, after the opening bracket, up to the closing one; only literals.

    They are given as JSON, each argument when it is complete. Attributes as in [`JsonArguments`].
    """

    def __init__(self) -> None:
        self.used = 0
        self._source = ""
        self._scanned = 0  # of `_source`, which is the argument that is being written
        self._open: list[str] = []
        self._quote = ""
        self._names: set[str] = set()
        self._ended = False

    def feed(self, text: str) -> tuple[str, str]:
        """As [`JsonArguments.feed`]."""
        self._source += text
        given: list[str] = []
        while (end := self._end_of_argument()) is not None:
            mark = self._source[end : end + 1]
            written = self._as_json(self._source[:end], last=mark == ")") if end >= 0 else None
            if written is None:
                return "".join(given), BROKEN
            given.append(written)
            self.used += end + 1
            self._source, self._scanned = self._source[end + 1 :], 0
            if mark == ")":
                return "".join(given), DONE
        return "".join(given), MORE

    def _end_of_argument(self) -> int | None:
        """Index of the comma or bracket that ends the argument, -1 where nothing can, `None` if it is not there."""
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
                return -1
            if character == "#" or len(self._open) > _DEEPEST:
                return -1
            self._scanned += 1
        return None

    def _as_json(self, source: str, last: bool) -> str | None:
        """The argument as a member of a JSON object, with what stands around it; `None` if it is none."""
        begin = ", " if self._names else "{"
        if not source.strip():
            return ("}" if self._names else "{}") if last else None
        keyword = _KEYWORD.fullmatch(source)
        if keyword is None or keyword[1] in self._names or not keyword[2].strip():
            return None
        try:
            value = ast.literal_eval(f"({keyword[2]}\n)")
            written = whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False))
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            return None
        self._names.add(keyword[1])
        return f"{begin}{json.dumps(keyword[1], ensure_ascii=False)}: {written}" + ("}" if last else "")
