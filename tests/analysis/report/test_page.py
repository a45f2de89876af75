"""The page of a run, as text: what it says, what it escapes, what it refuses."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from proxbit.analysis.report import write_report
from proxbit.analysis.run_log import RUN_LOG, append_event, start_log
from proxbit.errors import CheckpointError, ConfigError
from run_folder import NAME, RUN, write_run

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Outline(HTMLParser):
    """The elements of a page, with every start tag closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page(folder, **changes):
    text = write_report(folder, **changes).read_text()
    return text, Outline(text)


def test_the_page_has_every_part(tmp_path):
    text, outline = page(write_run(tmp_path / "run"))
    words = " ".join(" ".join(outline.texts).split())
    for title in ("Loss", "Accuracy on test data", "Sharpness mu", "Signs flipped", "Hardening gap", "Learning rate"):
        assert title in outline.texts
    assert sum("plot" in attributes.get("class", "") for attributes in outline.all("svg")) == 6
    assert "40 of 40 steps, 4 epochs" in words
    assert "80.0 %" in words and "hard, what ships; soft 90.0 %" in words
    assert "2.3 kB" in words and "latent checkpoint: 12.3 kB" in words
    assert "2,376" in words and "90% of all parameters, in 2 layers" in words
    assert "6 of 7 were right" in words and "says" in words
    assert "50 × 36" in words and "12 × 3 × 4 × 4" in words
    assert outline.all("h2")[-1] == {"id": "words"}
    assert "Quantization card" not in words
    assert len(text) < 200_000


def test_names_are_text_wherever_they_are(tmp_path):
    """Classes, layers, settings, the card, the folder: none of them becomes an element."""
    folder = tmp_path / NAME.replace("/", "")
    (write_run(folder) / "quantization_card.json").write_text(json.dumps({"model": {NAME: NAME}}))
    text, outline = page(folder)
    assert "<img src=x" not in text and "boom()" in html.unescape(text)
    assert not any("onerror" in attributes for _, attributes in outline.elements)
    assert len(outline.all("script")) == 1
    alternatives = [attributes["alt"] for attributes in outline.all("img")]
    assert alternatives == [f"{NAME}, predicted as cat", "cat, predicted as cat"]
    assert NAME in outline.texts


def test_the_page_needs_nothing_else(tmp_path):
    text, outline = page(write_run(tmp_path))
    for tag, attributes in outline.elements:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert re.search(r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-", text)


def test_everything_drawn_is_told_in_words(tmp_path):
    _, outline = page(write_run(tmp_path))
    assert all(attributes["alt"] for attributes in outline.all("img"))
    pictures = [attributes for _, attributes in outline.elements if attributes.get("role") in ("img", "region")]
    assert len(pictures) >= 13
    assert all(attributes["aria-label"] for attributes in pictures)
    assert any(
        attributes["aria-label"].endswith("hard, what ships: from 20 % to 80 %; soft: from 90 % to 90 %.")
        for attributes in pictures
    )


@pytest.mark.parametrize("place", [".", "packed"])
def test_the_card_is_shown_as_it_is(place, tmp_path):
    card = {"model": {"class": "ViT", "base": None}, "bytes": {"packed": 12345}, "ok": True, "skipped": ["head"]}
    folder = write_run(tmp_path) / place
    folder.mkdir(exist_ok=True)
    (folder / "quantization_card.json").write_text(json.dumps(card | {"none": [], "ratio": 3.25}))
    words = " ".join(" ".join(page(tmp_path)[1].texts).split())
    for row in ("model · class ViT", "model · base unknown", "bytes · packed 12,345", "ok yes", "skipped head"):
        assert row in words
    assert "none none" in words and "ratio 3.25" in words


def test_a_run_that_goes_on(tmp_path):
    words = " ".join(page(write_run(tmp_path, steps=20))[1].texts)
    assert "This run has done 20 of 40 steps" in words
    start_log(tmp_path, RUN)
    words = " ".join(page(tmp_path)[1].texts)
    assert "Nothing has been logged yet" in words and "0 of 40 steps" in words


def test_a_run_that_ended_soft_or_diverged(tmp_path):
    write_run(tmp_path)
    assert "ended soft" not in " ".join(page(tmp_path)[1].texts)
    append_event(tmp_path, {"event": "log", "step": 40, "epoch": 4.0, "loss": float("nan"), "hardening_gap": 0.4})
    words = " ".join(page(tmp_path)[1].texts)
    assert "ended soft (gap 0.4)" in words and "Some losses were NaN or infinite" in words


def test_metrics_of_several_datasets(tmp_path):
    start_log(tmp_path, RUN)
    values = {"eval_day_top_5": 0.5, "eval_day_soft_top_5": 0.6, "eval_day_loss": 1.0, "eval_day_soft_loss": 1.0}
    append_event(tmp_path, {"event": "log", "step": 40, "epoch": 4.0, **values, "eval_day_runtime": 3.0})
    texts = page(tmp_path)[1].texts
    assert "Day top 5 on test data" in texts
    assert not any("loss on test data" in text or "untime" in text for text in texts)


def test_where_the_page_goes(tmp_path):
    write_run(tmp_path / "run")
    assert write_report(tmp_path / "run") == tmp_path / "run" / "report.html"
    assert write_report(tmp_path / "run", tmp_path / "a page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a page.html", RUN_LOG, "report.html"]


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (lambda folder: (folder / RUN_LOG).unlink(), CheckpointError, "is not the output folder of a run"),
        (lambda folder: (folder / "quantization_card.json").write_text("{"), CheckpointError, "is not JSON"),
        (lambda folder: (folder / "quantization_card.json").write_text("[]"), CheckpointError, "a JSON object"),
        (lambda folder: append_event(folder, {"event": "layers", "step": 1}), CheckpointError, "lacks what a report"),
        (lambda folder: append_event(folder, PICTURE), CheckpointError, "lacks what a report"),
        (lambda folder: (folder / "report.html").mkdir(), ConfigError, "is a folder; name the page in it"),
    ],
    ids=["no log", "card", "card list", "layers", "no picture", "target"],
)
def test_refusals_write_nothing(tmp_path, break_it, error, words):
    write_run(tmp_path)
    break_it(tmp_path)
    with pytest.raises(error, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").is_file()


PICTURE = {"event": "predictions", "step": 1, "epoch": 1, "total": 1, "right": 1, "pictures": [{"png": "aGVsbG8="}]}


def test_a_page_in_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        write_report(write_run(tmp_path), tmp_path / "nowhere" / "x.html")


DAMAGE = {
    "no memory is so large": lambda lines: lines[0].update(edges=[-3, 3, 10**12]),
    "or so wide": lambda lines: lines[0].update(edges=[-(10**9), 10**9, 60]),
    "a number of many digits": lambda lines: lines[1].update(epoch=10**400),
    "a step of many digits": lambda lines: lines[1].update(step=10**400),
    "a word for a number": lambda lines: lines[0].update(packed_bytes="x"),
    "nothing for a number": lambda lines: lines[0].update(binary_parameters=None),
    "no edges": lambda lines: lines[0].pop("edges"),
    "an event without a name": lambda lines: lines[1].update(event=["log"]),
    "another format": lambda lines: lines[0].update(format="\x1b" * 10**6),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_log_is_one_line(tmp_path, damage):
    write_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / RUN_LOG).read_text().splitlines()]
    damage(lines)
    (tmp_path / RUN_LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError) as caught:
        write_report(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == [RUN_LOG]


NO_JSON = ["[" * 10**5, "9" * 5000, '{"a":' * 10**5]


def test_lines_that_are_no_json(tmp_path):
    for text in NO_JSON:
        write_run(tmp_path)
        with (tmp_path / RUN_LOG).open("a") as file:
            file.write(text + "\n")
        with pytest.raises(CheckpointError, match="not JSON"):
            write_report(tmp_path)


def test_half_of_a_pair_of_surrogates_is_written_as_text(tmp_path):
    write_run(tmp_path)
    (tmp_path / "quantization_card.json").write_text(json.dumps({"model_id": "\ud800"}))
    assert r"\ud800" in page(tmp_path)[0]
