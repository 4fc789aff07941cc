"""The web page: gradio's own client and a real browser talk to it; without gradio a clear line.

Most tests need gradio (pip install -r requirements-web.txt). Those of the browser also need the package
playwright and Debian's chromium; they make the screenshot that the README shows: SCREENSHOT=tiny/web.png
"""
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import cli

import pytest
from conftest import ROOT, one_line, run_main
from PIL import Image

import lavin
import sample
import web
from evaluation.conversation import Conversation
from official.tokenizer import Tokenizer
from web import replay

DEMO = str(ROOT / "tiny/demo.png")
OPPOSITE = "What is the opposite of hot? (A) wet (B) old (C) cold"
WHERE = "Seen from the circle, where is the square?"
COLOR = "What color is the circle?"


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def fails(monkeypatch, *argv) -> str:
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, web.main, *argv)
    assert "\n" not in str(e.value.code)
    return str(e.value.code)


# --- without gradio --------------------------------------------------------------------------------

def test_without_gradio_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # import gradio fails
    assert fails(monkeypatch) == "web.py needs gradio: pip install -r requirements-web.txt"
    assert "gradio" in (ROOT / "requirements-web.txt").read_text()


def test_flags(capsys):
    cfg = cli.parse(web.Config, argv=["--port", "65535", "--no-any_base", "--temperature", "0"])
    assert cfg.port == 65535 and cfg.temperature == 0 and not cfg.any_base
    assert (web.Config().host, web.Config().port) == ("127.0.0.1", 7860)
    for argv in ("--port 0", "--port 65536", "--top_p 0.0", "--seed -1", "--max_new_tokens -1"):
        with pytest.raises(SystemExit) as e:
            cli.parse(web.Config, argv=argv.split())
        assert e.value.code == 2 and f"{argv}: expected" in capsys.readouterr().err


def test_flags_that_sample_has_too_are_the_same():
    shared = {name: f for name, f in web.Config.__dataclass_fields__.items() if hasattr(sample.Config, name)}
    assert len(shared) == 10
    assert all(getattr(sample.Config, name) == f.default for name, f in shared.items())


def test_a_port_in_use_is_one_line_before_the_weights_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    monkeypatch.setattr(lavin, "load", lambda *args: pytest.fail("read the weights"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = fails(monkeypatch, "--port", port)
    assert told.endswith(f": --host 127.0.0.1 --port {port}: Address already in use; choose another")
    assert "--host no.such.host.invalid --port" in fails(monkeypatch, "--host", "no.such.host.invalid")


@pytest.fixture(scope="module")
def loaded():
    files = (str(ROOT / f"tiny/{name}") for name in ("adapters.safetensors", "llama", "clip"))
    model, meta = lavin.load(*files)
    return model, meta, Tokenizer(str(ROOT / "tiny/llama"))


def on_the_page(role: str, text: str, *files: str) -> dict:
    parts = [{"type": "file", "file": {"path": f}} for f in files]
    return {"role": role, "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}


def in_the_client(role: str, text: str, *files: str) -> dict:
    if role == "assistant":
        return {"role": role, "content": text}
    return {"role": role, "content": [*({"path": f} for f in files), *([text] if text else [])]}


@pytest.mark.parametrize("message", [on_the_page, in_the_client])
def test_a_replayed_history_is_the_chat_of_sample(loaded, message):
    """Token for token: the answers are encoded anew from their words."""
    model, meta, tokenizer = loaded
    said = ["On the left is a big red circle, on the right a small blue square. The circle is red.", "It is."]
    chat, replayed = Conversation(*loaded), Conversation(*loaded)
    chat.start(DEMO)
    for question, answer in zip((COLOR, OPPOSITE), said):
        rest = chat.batch(question, "", 64).tokens.tolist()
        whole = tokenizer.encode(chat.wrap(question, "") + answer)
        "".join(chat.reply([id] for id in whole[len(chat.new_prompt):]))  # keeps the turn
        assert rest[-len(chat.new_prompt):] == whole[:len(chat.new_prompt)]  # no token across the border
    replay(replayed, [message("user", COLOR, DEMO), message("assistant", said[0]),
                      message("user", OPPOSITE), message("assistant", said[1])])
    assert len(chat.turns) == 2 and replayed.turns == chat.turns and replayed.image == chat.image


@pytest.mark.parametrize("message", [on_the_page, in_the_client])
def test_what_failed_is_no_turn(loaded, message, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    c = Conversation(*loaded)
    replay(c, [message("user", COLOR, DEMO), message("user", "word " * 300)])
    assert c.turns == [] and c.image == Path(DEMO)
    replay(c, [message("user", COLOR), message("assistant", "Red."),
               message("user", WHERE, tmp_path / "text.jpg"), message("user", ""), message("assistant", "")])
    assert len(c.turns) == 1 and c.image == Path(DEMO)
    replay(c, [message("user", COLOR, tmp_path / "blank.png")])  # a new picture, as /image in sample.py
    assert c.turns == [] and c.image == tmp_path / "blank.png"


# --- with gradio -----------------------------------------------------------------------------------

@pytest.fixture
def chat(monkeypatch, tmp_path, at_root):
    """chat(model, meta) -> the function that answers on the page, without a server"""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    found, interface = [], gr.ChatInterface
    monkeypatch.setattr(gr, "ChatInterface", lambda fn, **kw: found.append(fn) or interface(fn, **kw))

    def build(model, meta, **flags):
        web.build_page(model, meta, web.Config(**flags), tmp_path)
        return found[-1]
    return build


def fresh():
    return lavin.load(*(f"tiny/{name}" for name in ("adapters.safetensors", "llama", "clip")))


def last(answers) -> str:
    return list(answers)[-1][0]


def test_two_answers_do_not_mix(chat):
    """A text and a picture are answered with different projections, which one model holds in turn."""
    ask = chat(*fresh())
    about_text, about_image = {"text": OPPOSITE, "files": []}, {"text": COLOR, "files": [DEMO]}
    alone = last(ask(about_text, [])), last(ask(about_image, []))
    first, second = ask(about_text, []), []
    begun = [next(first)]
    thread = threading.Thread(target=lambda: second.append(last(ask(about_image, []))))
    thread.start()
    thread.join(1)  # the time in which it would take the projections away
    assert not second
    mixed = last([*begun, *first])
    thread.join()
    assert (mixed, *second) == alone


def test_an_answer_that_is_stopped_lets_the_next_one_begin(chat):
    ask = chat(*fresh())
    stopped = ask({"text": OPPOSITE, "files": []}, [])
    next(stopped)
    stopped.close()
    answered = []
    thread = threading.Thread(target=lambda: answered.append(next(ask({"text": OPPOSITE, "files": []}, []))),
                              daemon=True)  # should it wait forever
    thread.start()
    thread.join(60)
    assert answered


def test_text_only_adapters_and_adapters_without_a_router(chat, tmp_path):
    gr = pytest.importorskip("gradio")
    model, meta = fresh()
    cfg = lavin.LaVINConfig(lavin.AdapterConfig(kind="rep"), vision=False)
    ask = chat(lavin.LaVIN(model.llama, None, cfg).eval(), meta, max_new_tokens=2)
    text, chart = next(ask({"text": OPPOSITE, "files": []}, []))
    assert isinstance(text, str) and chart is None
    with pytest.raises(gr.Error) as e:
        next(ask({"text": COLOR, "files": [DEMO]}, []))
    assert e.value.message == "these adapters are text-only (trained with --no-vision)"
    assert next(ask({"text": OPPOSITE, "files": []}, [on_the_page("user", COLOR, DEMO)]))[0] == text


REPORT = """
import sys
def audit(event, args):
    host = {"socket.connect": lambda: args[1], "socket.getaddrinfo": lambda: args}.get(event, tuple)()
    if isinstance(host, tuple) and host and host[0] not in ("127.0.0.1", "localhost", None):
        open(LOG, "a").write(f"{event} {host}\\n")
sys.addaudithook(audit)
sys.path.insert(0, ROOT)
sys.argv[0] = "web.py"
import cli, web
cli.run(web.main)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a page; at its end, Ctrl-C ends it, and it has talked to nobody else."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    log = tmp_path_factory.mktemp("web") / "connections"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"LOG, ROOT = {str(log)!r}, {str(ROOT)!r}{REPORT}"
    env = {**os.environ, "http_proxy": "http://192.0.2.1:9", "TMPDIR": str(log.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, "--port", str(port), "--device", "cpu"], cwd=ROOT,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    said = ""
    while "open http" not in said:
        line = process.stderr.readline()
        assert line, said  # it ended
        said += line
    assert said.endswith(f"open http://127.0.0.1:{port}/, Ctrl-C ends it\n")
    yield f"http://127.0.0.1:{port}/"
    assert list(log.parent.glob("*/*/text.jpg"))  # an upload
    process.send_signal(subprocess.signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err.strip(), process.returncode) == ("", "interrupted", 130)
    assert not log.exists(), log.read_text()
    assert not list(log.parent.glob("*/*/*"))


@pytest.fixture
def client(server, monkeypatch):
    """ask(text, *files) -> the words of the answer; one conversation"""
    gradio_client = pytest.importorskip("gradio_client", reason="gradio's client is not installed")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("no_proxy", "*")
    talk = gradio_client.Client(server, verbose=False, analytics_enabled=False)

    def ask(text: str, *files):
        message = {"text": text, "files": [gradio_client.handle_file(str(f)) for f in files]}
        ask.job = talk.submit(message, api_name="/chat")
        return ask.job.result()[0]
    return ask


def sampled(monkeypatch, capsys, *argv, stdin: str = "") -> list[str]:
    """What sample.py answers."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    run_main(monkeypatch, sample.main, "--device", "cpu", *argv)
    return capsys.readouterr().out.splitlines()


def test_the_client_gets_the_words_of_sample(client, monkeypatch, capsys, at_root):
    expected = sampled(monkeypatch, capsys, "--chat", stdin=f"{OPPOSITE}\n/image {DEMO}\n{COLOR}\n{WHERE}\n")
    assert expected[0] == client(OPPOSITE) == "The opposite of hot is cold. The answer is C."
    pieces = [words for words, _ in client.job.outputs()]
    assert len(pieces) > 5 and all(b.startswith(a) for a, b in zip(pieces, pieces[1:]))  # it streams
    assert client(COLOR, DEMO) == expected[1] and client(WHERE) == expected[2]  # the picture is kept
    assert len(expected) == 3 and "red" in expected[1]


def test_a_mistake_is_one_line_and_the_page_goes_on(client, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")

    def told(*message) -> str:
        text = one_line(client, *message)
        assert "/" not in text and "--" not in text
        return text

    assert told(COLOR, tmp_path / "text.jpg").startswith("text.jpg: not a readable image (")
    assert told("word " * 300).endswith("tokens; the context holds 256, answer included")
    assert told("", DEMO) == "the prompt is empty"
    assert client(COLOR, DEMO).endswith("The circle is red.")


# --- in a browser ----------------------------------------------------------------------------------

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update "
         "--disable-background-networking --disable-sync").split()


@pytest.fixture
def browser_page(server):
    """A page of a real browser, at the address; at its end, it asked nobody but the server."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    asked = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 620})
        page.set_default_timeout(150_000)  # a busy machine
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server)
        yield page
        browser.close()
    assert asked and all(url.startswith((server, "data:", "blob:")) for url in asked), asked


FEWEST = """window.fewest = 9
new MutationObserver(() => {
    fewest = Math.min(fewest, document.querySelectorAll("[data-testid=bot]").length)
}).observe(document.body, {childList: true, subtree: true})"""


def send(page, text: str, file: str = "") -> None:
    if file:
        page.set_input_files("input[type=file]", file)
        page.wait_for_selector(".thumbnail-item img")
    page.get_by_test_id("textbox").fill(text)
    page.get_by_test_id("submit-button").click()


def answers(page, n: int) -> list[str]:
    """The words of the answers on the page, as soon as there are n of them and the next may be asked."""
    page.wait_for_function(f"document.querySelectorAll('[data-testid=bot]').length == {n}")
    page.wait_for_selector("[data-testid=submit-button]")  # while it answers, this is the stop button
    return [text.strip() for text in page.get_by_test_id("bot").all_inner_texts()]


def width_of_chart(page) -> int:
    return page.evaluate("document.querySelector('img[src*=routing_]').naturalWidth")


def test_a_browser_asks_about_a_picture(browser_page, tmp_path):
    page = browser_page
    send(page, COLOR, DEMO)
    first = answers(page, 1)
    assert first[0].endswith(" The circle is red.") and width_of_chart(page) == 280
    picture = Path(os.environ.get("SCREENSHOT", tmp_path / "web.png"))
    page.wait_for_timeout(1000)  # the last animation
    page.screenshot(path=picture)
    assert Image.open(picture).width == 900 and picture.stat().st_size < 150_000

    send(page, WHERE)
    both = answers(page, 2)
    assert both[0] == first[0] and both[1].endswith("the square is on the right.")
    page.evaluate(FEWEST)
    page.get_by_role("button", name="Retry").last.click()
    page.wait_for_function("fewest == 1")  # it took the answer away
    assert answers(page, 2) == both
    page.get_by_role("button", name="Undo").last.click()
    assert answers(page, 1) == first and page.get_by_test_id("textbox").input_value() == WHERE
    page.get_by_test_id("submit-button").click()
    assert answers(page, 2) == both
    assert page.get_by_role("button", name="Share").count() == 0


def test_a_browser_shows_a_mistake_as_one_line(browser_page, tmp_path):
    page = browser_page
    (tmp_path / "text.jpg").write_text("no picture")
    send(page, COLOR, str(tmp_path / "text.jpg"))
    told = page.get_by_test_id("toast-text").inner_text()
    assert told.startswith("text.jpg: not a readable image (") and "\n" not in told
    send(page, OPPOSITE)
    assert answers(page, 1) == ["The opposite of hot is cold. The answer is C."]
    send(page, "", DEMO)
    page.get_by_text("the prompt is empty", exact=True).wait_for()
    send(page, COLOR)  # the picture is still there
    assert answers(page, 2)[1].endswith(" The circle is red.")


def test_the_stored_screenshot_is_small():
    picture = ROOT / "tiny/web.png"
    assert Image.open(picture).width == 900 and picture.stat().st_size < 150_000
