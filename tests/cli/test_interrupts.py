# SPDX-License-Identifier: Apache-2.0
"""`chatglm-ov chat` in a terminal: what Ctrl-C stops."""

import codecs
import json
import os
import pty
import re
import select
import time

import pytest
from conftest import COMMAND, DATA

from optimum_chatglm_ov import export_model


# Python's readline notices a Ctrl-C between the prompt and its waiting for a key only with the next line.
WAKE = "\n"


class Terminal:
    """`chatglm-ov` in a pseudo-terminal."""

    def __init__(self, python, *arguments, fresh=False):
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._screen, side = pty.openpty()
        environment = python.environment(TERM="dumb")
        self.process = python.start([*COMMAND, *arguments], side, side, side, environment, fresh=fresh)
        os.close(side)

    def type(self, text):
        self.text = ""
        os.write(self._screen, text.encode())

    def wait_for(self, pattern):
        """Reads until the text since the last input matches; fails if it ends or takes too long before."""
        if not self._matches(pattern, seconds=120):
            pytest.fail(f"waited for {pattern!r} in vain after {self.text[:1000]!r}")

    def interrupt_until(self, pattern):
        """Presses Ctrl-C until the text matches: Python drops an interrupt that comes inside a callback."""
        for _ in range(6):
            self.type("\x03")
            if self._matches(pattern, seconds=20):
                return
        pytest.fail(f"interrupted in vain for {pattern!r}: {self.text[:1000]!r}")

    def _matches(self, pattern, seconds):
        end = time.monotonic() + seconds
        # the ends of the text only: searching all of an endless answer again and again would never catch up
        while not (re.search(pattern, self.text[:2000]) or re.search(pattern, self.text[-2000:])):
            ready, _, _ = select.select([self._screen], [], [], max(0, end - time.monotonic()))
            if not ready or time.monotonic() > end:
                return False
            try:
                self.text += self._decoder.decode(os.read(self._screen, 65536))
            except OSError:
                pytest.fail(f"ended before {pattern!r}: {self.text!r}")
        return True

    def close(self):
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._screen)


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """A model whose answers no stop token ends."""
    folder = export_model(DATA / "models" / "chatglm2-6b", tmp_path_factory.mktemp("endless") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["seq_length"] = 1_000_000
    config["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    return folder


def test_interrupt_stops_the_answer_and_not_the_session(endless_model, python):
    terminal = Terminal(python, "chat", "--model", endless_model, "--greedy", "--max-new-tokens", "900000")
    terminal.wait_for("> $")
    terminal.type("你好\n")
    terminal.wait_for(r"你好\r\n\S+")
    terminal.interrupt_until(r"\[\d+ tokens, .*, stopped\]\r\n> $")
    terminal.type("/clear\n")
    terminal.wait_for("> $")
    terminal.type("Hello\n")
    terminal.wait_for(r"Hello\r\n\S+")
    terminal.interrupt_until(r", stopped\]\r\n> $")
    terminal.type("\x03" + WAKE)  # a second one, at the prompt
    assert terminal.close() == 0


@pytest.mark.slow
def test_interrupts_at_the_prompt(exported, python):
    arguments = ("chat", "--model", exported("chatglm3-6b"), "--greedy", "--max-new-tokens", "4")
    terminal = Terminal(python, *arguments, fresh=True)
    terminal.wait_for("> $")
    terminal.type("\x03" + WAKE)
    terminal.wait_for(r"Ctrl-C again.*\r\n> ")
    terminal.type("你好\n")
    terminal.wait_for(r"\[4 tokens, .*\]\r\n> $")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_an_interrupted_prompt_tells_so(endless_model, python):
    terminal = Terminal(
        python, "chat", "--model", endless_model, "--greedy", "--max-new-tokens", "900000", "--prompt", "你好"
    )
    terminal.wait_for(r"\S+")
    terminal.type("\x03")
    assert terminal.close() == 130
