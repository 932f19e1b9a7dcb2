"""The page: what is in the file, and how it behaves in a browser without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mqa_gpt import LLM
from mqa_gpt.explorer import collect, explore, render

# As a text that would run, break out or rearrange the page if it were not text.
HOSTILE = (
    "x = '</script><script>alert(1)</script>\"'\0 <!-- & \u202e\u05d0\u05d1 \U0001f600\u200b\n"
)

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push("

WAIT = 600_000  # milliseconds: a busy machine is no failure


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(dtype="float32")


@pytest.fixture(scope="module")
def data(llm: LLM) -> dict[str, Any]:
    return collect(llm, PROMPT, max_new_tokens=24, layer=2, head=1, name="demo")


class Blocks(HTMLParser):
    """The contents of scripts and styles, as a browser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag and text.strip()]


# --------------------------------------------------------------------------------- the file


def test_hostile_text_stays_in_the_data(llm: LLM) -> None:
    found = collect(llm, HOSTILE, max_new_tokens=1, name="<b>&'\"")
    page = render(found)
    values, code = Blocks(page).of("script")
    assert json.loads(values) == found
    assert "<" not in values
    assert page.count("<script") == 2
    assert "alert(1)" not in page.replace(values, "")
    assert "innerHTML" not in code


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(
    data: dict[str, Any],
) -> None:
    blocks = Blocks(render(data))
    (policy,) = (attrs["content"] for _, attrs in blocks.tags if "http-equiv" in attrs)
    assert policy is not None
    (style,), (_, code) = blocks.of("style"), blocks.of("script")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (style, code)]
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{hashes[0]}'",
        "script-src": f"'sha256-{hashes[1]}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_file_refers_to_nothing_outside(data: dict[str, Any]) -> None:
    page = render(data)
    assert set(re.findall(r"\b(?:https?|wss?):[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}
    attributes = {name for _, attrs in Blocks(page).tags for name in attrs}
    assert attributes.isdisjoint({"src", "href", "srcset", "style", "onclick", "onload"})


@pytest.mark.slow
def test_128_tokens_of_the_demo_take_at_most_2_megabytes(llm: LLM) -> None:
    page = explore(llm, PROMPT * 2, max_new_tokens=128 - len(llm.tokenizer.encode(PROMPT * 2)))
    assert len(json.loads(Blocks(page).of("script")[0])["ids"]) == 128
    assert len(page.encode()) <= 2_000_000


# ------------------------------------------------------------------------------ in a browser


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(names)}")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=path, args=arguments, timeout=WAIT)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a page from a file; afterwards there was no request, message, error or dialog."""
    events: list[str] = []
    contexts = []

    def open_(page: str, **options: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(WAIT)
        tab.on("request", lambda request: events.append(request.url))
        tab.on("console", lambda message: events.append(message.text))
        tab.on("pageerror", lambda error: events.append(str(error)))
        tab.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
        tab.goto(path.as_uri())
        assert events == [path.as_uri()]
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert len(events) == len(contexts), events


def focused(tab: Any) -> str:
    return str(tab.evaluate("document.activeElement.closest('[id]').id"))


def label_of_focused(tab: Any) -> str:
    return str(tab.evaluate("document.activeElement.getAttribute('aria-label')"))


@pytest.mark.slow
def test_every_panel_follows_the_keyboard(open_page: Open, data: dict[str, Any]) -> None:
    tab = open_page(render(data))
    T, N = len(data["ids"]), data["prompt_tokens"]
    stops = []
    for _ in range(7):
        tab.keyboard.press("Tab")
        stops.append(focused(tab))
    assert stops == ["play", "slider", "colouring", "text", "attention", "heads", "lens"]
    tab.locator("#text [tabindex='0']").focus()
    tab.keyboard.press("Home")
    assert tab.locator("#current").inner_text().startswith(f"Token 1 of {T}: class")
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#current").inner_text().startswith(f"Token {T - 1} of {T}")
    assert tab.locator("#slider").input_value() == str(T - 2)
    assert f"{T - N - 1} steps of decoding" in tab.locator("#cache-sum").inner_text()
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowDown")  # to the line below
    assert tab.locator("#text .current").inner_text() == " def"
    tab.locator("#heads [tabindex='0']").focus()
    assert label_of_focused(tab) == "layer 2, head 1"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("End")
    assert label_of_focused(tab) == "layer 3, head 3"
    assert "layer 3, head 3" in tab.locator("#looking").inner_text()
    tab.locator("#lens [tabindex='0']").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    assert label_of_focused(tab).startswith("layer 4 after ")
    assert tab.locator("#lens tbody .current").count() == data["model"]["n_layer"] + 1


@pytest.mark.slow
def test_the_pointer_shows_a_token_and_a_click_keeps_it(
    open_page: Open, data: dict[str, Any]
) -> None:
    tab = open_page(render(data))
    before = tab.locator("#current").inner_text()
    tab.locator("#text span").nth(3).hover()
    assert tab.locator("#current").inner_text().startswith("Token 4 of ")
    assert tab.locator("#attention .later").count() == len(data["ids"]) - 4
    tab.locator("h1").hover()
    assert tab.locator("#current").inner_text() == before
    tab.locator("#text span").nth(3).click()
    tab.locator("h1").hover()
    assert tab.locator("#current").inner_text().startswith("Token 4 of ")


@pytest.mark.slow
def test_the_panels_show_the_data_of_the_token_and_the_head(
    open_page: Open, data: dict[str, Any]
) -> None:
    tab = open_page(render(data))
    i, T = 17, len(data["ids"])
    tab.locator("#text span").nth(i).click()
    listed = tab.locator("#next-list .number").all_inner_texts()
    expected = data["next"]["probabilities"][i]
    assert shares(listed)[:8] == pytest.approx(expected, abs=0.006)
    weights = base64.b64decode(data["attention"])
    row = (2 * data["model"]["n_head"] + 1) * T * (T + 1) // 2 + i * (i + 1) // 2
    said = tab.locator("#attention span").evaluate_all("all => all.map((x) => x.ariaLabel)")
    expected = [weight / 255 for weight in weights[row : row + i + 1]]
    assert shares(said[: i + 1]) == pytest.approx(expected, abs=0.006)
    assert sum(expected) == pytest.approx(1, abs=0.05)
    assert all(text.endswith("not yet read") for text in said[i + 1 :])
    column = tab.locator(f"#lens tbody td:nth-child({i + 2})").all_inner_texts()
    tokens = [data["texts"][str(row[i])] for row in reversed(data["lens"]["ids"])]
    assert [text.split("\n")[0].replace("·", " ") for text in column] == [
        token.replace("\n", "↵") for token in tokens
    ]
    expected = [row[i] for row in reversed(data["lens"]["probabilities"])]
    assert shares(column) == pytest.approx(expected, abs=0.006)


def shares(texts: list[str]) -> list[float]:
    """The percentage at the end of each."""
    return [float(re.findall(r"([\d.]+) %$", text)[0]) / 100 for text in texts]


@pytest.mark.slow
def test_playing_goes_from_the_prompts_end_to_the_texts(
    open_page: Open, data: dict[str, Any]
) -> None:
    tab = open_page(render(data))
    tab.clock.install()
    T, N = len(data["ids"]), data["prompt_tokens"]
    tab.locator("#play").click()
    assert tab.locator("#play").inner_text() == "Pause"
    tab.clock.run_for(700 * 2 + 50)
    assert tab.locator("#slider").input_value() == str(N + 1)
    tab.clock.run_for(700 * T)
    assert tab.locator("#slider").input_value() == str(T - 1)
    assert tab.locator("#play").inner_text() == "Play"


@pytest.mark.slow
def test_hostile_text_is_shown_and_not_run(open_page: Open, llm: LLM) -> None:
    found = collect(llm, HOSTILE, max_new_tokens=2, name="<b>demo</b>")
    tab = open_page(render(found))
    shown = tab.locator("#text").inner_text()
    assert "x = '</script><script>alert(1)</script>\"'⟨U+0000⟩ <!-- & " in shown
    assert "\\xf0\\x9f\\x98\\x80" in shown
    assert "\u202e" not in tab.locator("body").inner_text()
    assert tab.locator("#facts").inner_text().startswith("<b>demo</b>: ")
    assert tab.locator("script").count() == 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(open_page: Open, data: dict[str, Any], scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = open_page(render(data), color_scheme=scheme)
    for action in (lambda: None, tab.locator("input[value=loss]").check):
        action()
        violations = axe.run(tab).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in violations] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(
    open_page: Open, data: dict[str, Any], width: int
) -> None:
    tab = open_page(render(data), viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    # What scrolls by itself may hold wider things; nothing else may.
    wide = tab.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter((x) => !x.closest(".scroll, #heads, .text"))
            .filter((x) => x.getBoundingClientRect().right > innerWidth)
            .map((x) => x.outerHTML.slice(0, 80))"""
    )
    assert wide == []


@pytest.mark.slow
def test_nothing_moves_by_itself(open_page: Open, data: dict[str, Any]) -> None:
    tab = open_page(render(data), reduced_motion="reduce")
    tab.locator("#text span").nth(2).click()
    assert tab.evaluate("document.getAnimations().length") == 0


@pytest.mark.slow
def test_one_new_token_and_one_layer_make_a_page(open_page: Open, llm: LLM) -> None:
    tab = open_page(render(collect(llm, "a", max_new_tokens=1)))
    assert tab.locator("#current").inner_text().startswith("Token 1 of 2: a")
    assert tab.locator("#time tbody tr").count() == 1
