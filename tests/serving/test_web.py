# SPDX-License-Identifier: Apache-2.0
"""The page, driven in a real browser, in both languages."""

from __future__ import annotations

import shutil
import time

import pytest
from selenium import webdriver
from selenium.common import exceptions
from serving_support import engine_options, options, serving


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytest_plugins = ["serving_support"]
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

# What the page says in each language: in the empty box, and on the button that answers once more.
WORDS = {"en-US": ("Ask something", "Retry"), "zh-CN": ("说点什么吧", "重试")}


@pytest.fixture(scope="module")
def page(tiny):
    """A server with a page."""
    with serving(tiny, options(web=True), engine_options()) as running:
        yield running


def browser(language: str, width: int = 1100, height: int = 760, dark: bool = False):
    """A headless browser in a language."""
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--lang={language}",
        f"--window-size={width},{height}",
    ):
        chosen.add_argument(argument)
    if dark:
        chosen.add_argument("--force-dark-mode")
    chosen.add_experimental_option("prefs", {"intl.accept_languages": language})
    service = webdriver.ChromeService(
        executable_path=DRIVER, env={"LANGUAGE": language, "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    )
    return webdriver.Chrome(options=chosen, service=service)


def wait_for(find, seconds: float = 20.0):
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


@pytest.mark.parametrize("language", list(WORDS))
def test_a_conversation_in_the_browser(page, language, tmp_path):
    expected = page.chat("你好").choices[0].message.content
    driver = browser(language)
    try:
        driver.get(page.url)
        box = wait_for(lambda: driver.find_elements("css selector", "#ask textarea"))[0]
        assert box.get_attribute("placeholder") == WORDS[language][0]

        def bots():
            return [element.text for element in driver.find_elements("css selector", "#chat [data-testid=bot]")]

        box.send_keys("你好\n")
        wait_for(lambda: any(expected in text for text in bots()))
        wait_for(lambda: "tokens/s" in driver.find_element("css selector", "#speed").text)
        driver.save_screenshot(str(tmp_path / f"page-{language}.png"))
        before = page.engine.state().running, len(bots())
        driver.find_element("css selector", f"button[aria-label={WORDS[language][1]}]").click()
        wait_for(
            lambda: any(expected in text for text in bots()) and (page.engine.state().running, len(bots())) == before
        )
        assert len(driver.find_elements("css selector", "#chat [data-testid=user]")) == 1
    finally:
        driver.quit()


def test_on_a_phone(page):
    driver = browser("en-US", 390, 844)
    try:
        driver.get(page.url)
        box = wait_for(lambda: driver.find_elements("css selector", "#ask textarea"))[0]
        assert 200 < box.size["width"] <= 390
        assert driver.execute_script("return document.documentElement.scrollWidth") <= driver.execute_script(
            "return window.innerWidth"
        )
    finally:
        driver.quit()
