# SPDX-License-Identifier: Apache-2.0
"""The page, driven in a real browser, in both languages."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import aclosing

import pytest
from conftest import ROOT
from fastapi.testclient import TestClient
from selenium import webdriver
from selenium.common import exceptions
from selenium.webdriver.common.keys import Keys
from serving_support import engine_options, options, serving

from optimum_chatglm_ov.serving.app import create_app
from optimum_chatglm_ov.serving.engine import GeneratedToken


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytest_plugins = ["serving_support"]
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

# What the page says in each language: in the empty box, above the settings, and on the buttons under messages.
WORDS = {
    "en-US": {"ask": "Ask something", "settings": "Settings", "system": "System prompt", "retry": "Retry"},
    "zh-CN": {"ask": "说点什么吧", "settings": "设置", "system": "系统提示词", "retry": "重试"},
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {}}}
CALL = "好的 <|assistant|> get_weather\n ```python\ntool_call(city='北京')\n```"


class Listener:
    """Between the page and the engine: remembers requests, and says something else if it is told to."""

    def __init__(self, model):
        self._tokenizer, self._generate = model.tokenizer, model.engine.generate
        self.requests, self.text, self.endless, self.running = [], None, False, 0
        model.engine.generate = self.generate

    async def generate(self, request):
        self.requests.append(request)
        self.running += 1
        try:
            async with aclosing(self._tokens(request)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            self.running -= 1

    async def _tokens(self, request):
        if self.endless:
            for token_id in itertools.cycle(self._ids("好的。")):
                await asyncio.sleep(0.01)
                yield GeneratedToken(token_id)
        elif self.text is not None:
            for token_id in self._ids(self.text):
                yield GeneratedToken(token_id)
            yield GeneratedToken(request.stop_ids[0], finish_reason="stop")
        else:
            async with aclosing(self._generate(request)) as tokens:
                async for token in tokens:
                    yield token

    def _ids(self, text: str) -> list[int]:
        turn = self._tokenizer.convert_tokens_to_ids("<|assistant|>")
        parts = [self._tokenizer.encode(part, add_special_tokens=False) for part in text.split("<|assistant|>")]
        return [*parts[0], *(token_id for part in parts[1:] for token_id in (turn, *part))]

    def prompt(self) -> str:
        """The last prompt."""
        return self._tokenizer.decode(self.requests[-1].input_ids)


@pytest.fixture(scope="module")
def page(tiny):
    """A server with a page."""
    with serving(tiny, options(web=True), engine_options()) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    """A headless browser."""
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,760"):
        chosen.add_argument(argument)
    driver = webdriver.Chrome(options=chosen, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def listener(page):
    """What the page asks of the engine."""
    model = page.app.state.model
    heard = Listener(model)
    yield heard
    del model.engine.generate  # the class's own again


@pytest.fixture
def tab(chromium, page):
    """The page in the browser, in English, light and wide unless it is opened anew."""
    yield (opened := Tab(chromium, page.url))
    opened.leave()


class Tab:
    """What a reader does with the page."""

    def __init__(self, driver, url: str):
        self.driver, self._url = driver, url
        self.open()

    def open(self, language: str = "en-US", dark: bool = False, width: int | None = None) -> None:
        """Loads the page with the settings of a reader's browser."""
        agent = self.driver.execute_script("return navigator.userAgent")
        self._command("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])
        if width is None:
            self._command("Emulation.clearDeviceMetricsOverride")
        else:
            self._command(
                "Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=2, mobile=True
            )
        self.driver.get(self._url)
        wait_for(lambda: self.all("#ask textarea"))

    def leave(self) -> None:
        """Closes the page."""
        self.driver.get("about:blank")

    def _command(self, name: str, **arguments) -> None:
        self.driver.execute_cdp_cmd(name, arguments)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def write(self, selector: str, text: str) -> None:
        """Puts `text` in the place of what a field has."""
        field = wait_for(lambda: [found for found in self.all(selector) if found.is_displayed()])[0]
        field.send_keys(Keys.CONTROL + "a", Keys.BACKSPACE)
        field.send_keys(text, Keys.TAB)

    def say(self, text: str) -> None:
        wait_for(lambda: self.all("#ask textarea"))[0].send_keys(text, Keys.ENTER)

    def press(self, label: str, index: int = 0) -> None:
        wait_for(lambda: self.all(f"#chat button[aria-label='{label}']"))[index].click()

    def open_settings(self) -> None:
        wait_for(lambda: self.all("#settings button"))[0].click()
        wait_for(lambda: [field for field in self.all("#system textarea") if field.is_displayed()])

    def brightness(self) -> float:
        """Of the background, 0 to 255."""
        colour = self.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    def texts(self, role: str) -> list[str]:
        """Messages of "user" or "bot"."""
        return [element.text for element in self.all(f"#chat [data-testid={role}]")]

    def wait_for_warning(self, text: str) -> None:
        """Until the page warns, and asks again."""
        wait_for(lambda: text in "".join(toast.text for toast in self.all("[data-testid=toast-body]")))
        wait_for(lambda: self.all("#ask textarea")[0].is_enabled())

    def wait_for_answers(self, *expected: str) -> None:
        """Until the page shows exactly these answers, and no more is computed."""
        wait_for(lambda: self.texts("bot") == list(expected) and not self.all(STOP))


STOP = "#ask .stop-button"


def wait_for(find, seconds: float = 60.0):
    """What `find()` gives once it gives something."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := find():
                return found
        except exceptions.StaleElementReferenceException:
            pass
        assert time.monotonic() < end, "it has not appeared"
        time.sleep(0.05)


@needs_browser
@pytest.mark.parametrize("language", list(WORDS))
def test_a_conversation(page, tab, listener, language):
    words = WORDS[language]
    tab.open(language)
    assert tab.all("#ask textarea")[0].get_attribute("placeholder") == words["ask"]
    assert tab.all("#settings button")[0].text.startswith(words["settings"])
    answers = [page.chat(text).choices[0].message.content for text in ("你好", "再见")]
    tab.say("你好")
    tab.wait_for_answers(answers[0])
    speed = tab.all("#speed")[0].text
    assert float(speed.split(" · ")[2].removesuffix(" tokens/s")) > 0
    assert speed.startswith(f"{page.chat('你好').usage.completion_tokens} tokens · ")

    before = len(listener.requests)
    tab.press(words["retry"])
    wait_for(lambda: len(listener.requests) > before and not listener.running)
    tab.wait_for_answers(answers[0])
    assert tab.texts("user") == ["你好"]
    assert listener.requests[-1].input_ids == listener.requests[0].input_ids


@needs_browser
def test_stop_ends_the_computation(tab, listener):
    listener.endless = True
    tab.say("讲")
    wait_for(lambda: "好的。 好的。" in "".join(tab.texts("bot")))
    assert listener.running == 1
    tab.all(STOP)[0].click()
    wait_for(lambda: listener.running == 0)
    wait_for(lambda: not any(button.is_displayed() for button in tab.all(STOP)))  # the page takes the next message
    listener.endless, listener.text = False, "再讲"
    tab.say("继续")  # what was said before the stop is part of the conversation
    wait_for(lambda: "再讲" in tab.texts("bot"))
    assert listener.prompt().count("<|user|>") == 2 and "好的。 好的。" in listener.prompt()

    listener.endless = True
    tab.say("讲")
    wait_for(lambda: listener.running == 1)
    tab.leave()  # whoever closes the page stops it, too
    wait_for(lambda: listener.running == 0, 20)


@needs_browser
def test_an_earlier_message_is_edited(page, tab, listener):
    answers = [page.chat(text).choices[0].message.content for text in ("你好", "再见")]
    tab.say("你好")
    tab.wait_for_answers(answers[0])
    listener.text = "二"
    tab.say("什么")
    tab.wait_for_answers(answers[0], "二")
    listener.text = None
    tab.press("Edit")
    tab.write("#chat textarea", "再见")
    tab.press("Submit")
    tab.wait_for_answers(answers[1])
    assert tab.texts("user") == ["再见"] and listener.prompt().count("<|user|>") == 1


@needs_browser
def test_settings_reach_the_engine(tab, listener, capfd):
    tab.open("zh-CN")
    tab.open_settings()
    assert WORDS["zh-CN"]["system"] in tab.all("#system")[0].text
    tab.write("#system textarea", "你是一只猫")
    for name, value in (("temperature", "0.5"), ("top_p", "0.65"), ("max_tokens", "7")):
        tab.write(f"#{name} input[type=number]", value)
    listener.text = "喵"
    tab.say("你好")
    tab.wait_for_answers("喵")
    request = listener.requests[-1]
    assert (request.do_sample, request.temperature, request.top_p, request.max_new_tokens) == (True, 0.5, 0.65, 7)
    assert "<|system|> \n 你是一只猫<|user|>" in listener.prompt()

    tab.write("#temperature input[type=number]", "0")
    tab.say("你好")
    tab.wait_for_answers("喵", "喵")
    assert not listener.requests[-1].do_sample

    asked = len(listener.requests)
    for tools, reason in (("{no json", "Expecting property name"), ('[{"name": "私"}]', "Field required")):
        tab.write("#tools textarea", tools)
        tab.say("你好")
        tab.wait_for_warning(reason)
    assert len(listener.requests) == asked and "私" not in "".join(capfd.readouterr())
    tab.write("#tools textarea", "")
    tab.say("你好")
    wait_for(lambda: tab.texts("bot")[-1:] == ["喵"] and len(listener.requests) > asked)


@needs_browser
def test_tool_calls_are_shown_on_a_phone_in_the_dark(tab, listener):
    tab.open()
    light = tab.brightness()
    tab.open(dark=True, width=375)
    assert tab.brightness() < 60 and light > 200
    tab.open_settings()
    tab.write("#tools textarea", json.dumps([TOOL]))
    listener.text = CALL
    tab.say("北京天气？")
    tab.wait_for_answers("好的", '🛠 get_weather\n{"city": "北京"}')
    listener.text = "一个很长的回答。" * 20
    tab.say("继续")
    wait_for(lambda: listener.text in tab.texts("bot"))
    assert "tool_call(city='北京')" in listener.prompt()
    assert tab.driver.execute_script("return document.documentElement.scrollWidth") == 375
    for selector in ("#ask textarea", "#ask button", "#chat [data-testid=bot]", "#tools textarea"):
        place = tab.all(selector)[0].rect
        assert 0 <= place["x"] and place["x"] + place["width"] <= 375, selector


@pytest.mark.slow
@needs_browser
def test_the_command_opens_the_page(chromium):
    """`chatglm-ov chat --web` says where its page is, and ends at once when it is told to, though the page is open."""
    command = [sys.executable, "-m", "optimum_chatglm_ov.cli.main", "chat", "--web"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        greeting = process.stdout.readline()
        address = greeting.split(" at ")[-1].split()[0]
        assert address.startswith("http://127.0.0.1:"), greeting + process.stderr.read()
        tab = Tab(chromium, address)
        tab.say("你好")
        wait_for(lambda: "OpenVINO" in "".join(tab.texts("bot")), 60)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and "你好" not in log, log
        assert "Traceback" not in log and "exceeded" not in log, log
    finally:
        process.kill()
        process.wait()
        chromium.get("about:blank")


def test_the_page_asks_for_the_key(tiny):
    client = TestClient(create_app(tiny, options(web=True, api_key="secret"), engine_options()))
    ask = {"data": ["你好", None], "fn_index": 0, "session_hash": "x"}
    assert client.post("/gradio_api/queue/join", json=ask).status_code == 401
    assert client.post("/login", data={"username": "a", "password": "wrong"}).status_code == 400
    assert client.get("/v1/models").status_code == 401
    assert client.post("/login", data={"username": "a", "password": "secret"}).status_code == 200
    assert client.post("/gradio_api/queue/join", json=ask).status_code != 401
    assert client.get("/v1/models").status_code == 401  # whose key is a header
