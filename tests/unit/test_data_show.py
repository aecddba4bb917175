"""`qwen-merge data show`: the rows, counts and pictures of a set on a page that nobody's text can take over.

The layout is checked in headless Chromium where there is one (Debian's package `chromium`).
"""

import base64
import html
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen_merge.data import check_recipe
from qwen_merge.data.check import check
from qwen_merge.data.check_summary import Histogram
from qwen_merge.data.look_command import RECIPES
from qwen_merge.data.manifest import Manifest, manifest_path
from qwen_merge.data.schema import Record
from qwen_merge.data.show import look_at
from qwen_merge.data.show_page import bars, render, thumbnail
from qwen_merge.errors import UserError
from record_sets import picture, records, run, settings, turns, write_recipe, write_set

HOSTILE = "</pre><script>alert(1)</script><img src=https://example.com/x onerror=alert(1)> & <!-- ROWS --> \u202e end"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tied) -> Path:
    """A set of sound rows, one hostile, one with a broken picture, and very long words; a recipe that trains on it."""
    folder = tmp_path_factory.mktemp("data")
    rows = records(30)
    rows[4] = Record(turns(f"<image>{HOSTILE}", HOSTILE), [picture(40, 30)])
    rows[9] = Record(turns("<image>What?", "This."), [picture(64, 48)[:-300]])
    rows[11] = Record(turns("<image>" + "x" * 3000, "word " * 4000), [picture(2000, 60)])
    write_set(folder, "mixed", rows, shards=2)
    path = manifest_path(folder, "mixed")
    manifest = Manifest.read(path)
    for reason, times in (("more than one <image>", 5), (f"because {HOSTILE}", 2)):
        for number in range(times):
            manifest.counts.rows_in += 1
            manifest.counts.drop(reason, f"row {number} {HOSTILE}")
    manifest.write(path)
    write_recipe(folder / "stage.yaml", settings(folder, tied.merged, "mixed", cutoff_len=2000))
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    output = folder / "page.html"
    assert run("show", "mixed", "--recipe", folder / "stage.yaml", "--rows", 30, "--output", output) == 0
    return output.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Names and attributes of all elements; text by itself."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_every_row_is_there_with_its_texts_and_token_counts(page, folder, tied):
    parsed = Elements(page)
    config = settings(folder, tied.merged, "mixed", cutoff_len=2000)
    (checked,) = check(config).sets
    look = look_at("mixed", recipe=folder / "stage.yaml", rows=30)
    assert look.summary == checked.summary  # the page and `data check` count the same
    assert len(look.shown) == 30
    for shown in look.shown:
        assert f"{shown.place} " in parsed.text
        if shown.row.tokens is not None:
            facts = f"{shown.row.trained:,} with loss, {shown.row.picture_tokens:,} of pictures"
            assert f"{shown.row.tokens:,} tokens" in parsed.text
            assert facts in parsed.text
    assert "2,000 tokens, cut from " in parsed.text
    assert f"95 % below {checked.summary.full.quantile(0.95):,}" in parsed.text
    assert f"tokens a row, {checked.summary.over} over cutoff_len" in parsed.text
    assert "这是什么颜色?" in parsed.text
    assert "<think>\nIt is round.\n</think>" in parsed.text


def test_nothing_of_the_set_becomes_markup(page):
    parsed = Elements(page)
    assert HOSTILE.replace("\u202e", "\ufffd") in parsed.text
    assert "\u202e" not in page
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "link", "object", "a")]
    sources = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in page
    # Control: the same text unescaped would be seen.
    assert [tag for tag, _ in Elements(HOSTILE).tags] == ["script", "img"]


def test_the_manifests_counts_are_on_the_page(page):
    rows = re.findall(r"<tr><td>(.*?)</td><td class='number'>([\d,]+)</td>", page)
    assert [(html.unescape(name), int(count)) for name, count in rows][:3] == [
        ("rows in", 37), ("rows out", 30), ("dropped: more than one <image>", 5),
    ]  # fmt: skip
    assert page.count("<li>row ") == 3 + 2  # three examples of the first reason, two of the second
    assert "made/by-program" in page


def test_a_broken_row_is_named(page):
    text = Elements(page).text
    assert "1 measured row would stop a training: a picture does not decode (part-00000-000.parquet row 9: " in text
    assert "picture not readable" in text


def test_pictures_are_small_and_as_training_sees_them():
    from PIL import Image

    def shown(data: bytes) -> Image.Image:
        encoded = re.search(r'base64,([^"]+)"', thumbnail({"bytes": data, "path": None}))
        assert encoded
        return Image.open(io.BytesIO(base64.b64decode(encoded[1])))

    assert shown(picture(3000, 1000)).size == (300, 100)
    assert shown(picture(40, 30)).size == (40, 30)
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))  # transparent red: LLaMA-Factory trains on red
    file = io.BytesIO()
    clear.save(file, "PNG")
    red, green, blue = shown(file.getvalue()).getpixel((10, 10))
    assert red > 240
    assert green < 20
    assert blue < 20
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which the loader does not make either
    Image.new("RGB", (60, 20)).save(turned, "JPEG", exif=exif)
    assert shown(turned.getvalue()).size == (60, 20)
    assert "not readable" in thumbnail({"bytes": b"nothing", "path": None})


def test_the_choice_of_rows_is_seeded_and_uniform(folder):
    def places(seed: int, **options) -> list[str]:
        look = look_at("mixed", recipe=folder / "stage.yaml", rows=5, seed=seed, **options)
        return [shown.place for shown in look.shown]

    assert places(1) == places(1)
    assert places(1) != places(2)
    assert len(places(1, measure=12)) == 5
    assert {place.split(" row")[0] for seed in range(3) for place in places(seed)} == {
        "part-00000-000.parquet", "part-00001-000.parquet",
    }  # fmt: skip
    assert look_at("mixed", recipe=folder / "stage.yaml", rows=5, measure=12).summary.rows.rows_in == 12


def test_without_a_tokenizer_the_page_says_so(folder, tmp_path):
    config = settings(folder, tmp_path / "untrained", "mixed")
    look = look_at("mixed", recipe=write_recipe(tmp_path / "stage.yaml", config), rows=3)
    text = Elements(render(look)).text
    assert "token counts" in text
    assert "no tokenizer and processor can be read" in text
    assert look.summary.tokens.count == 0
    assert look.summary.characters.count == 30
    assert look.uncounted
    # By its path, a set needs no dataset_info.json, and without a recipe there is nothing to count with.
    plain = look_at(str(folder / "mixed"), rows=3)
    assert "give one with --recipe" in plain.uncounted
    assert plain.summary.pixels == look.summary.pixels


def test_what_cannot_be_shown(folder, tmp_path):
    with pytest.raises(UserError, match="did you mean mixed"):
        look_at("mixd", dataset_dir=folder)
    with pytest.raises(UserError, match="no folder or file either"):
        look_at("something-else", dataset_dir=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        look_at(str(tmp_path / "empty"), dataset_dir=folder)
    for content in ("[]", '["mixed"]', "3", "{"):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(UserError, match="is not the list of sets"):
            look_at("mixed", dataset_dir=tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        run("show", "mixed", "--recipe", folder / "stage.yaml", "--output", tmp_path)
    assert check_recipe.read(folder / "stage.yaml")["dataset"] == "mixed"


def test_a_set_of_which_no_row_can_be_counted_is_shown(folder, tmp_path, capsys):
    rows = [Record(list(reversed(turns("<image>What?", "This."))), [picture(64, 48)])]
    write_set(tmp_path, "reversed", rows)
    recipe = folder / "stage.yaml"
    page = tmp_path / "page.html"
    assert run("show", "reversed", "--dataset-dir", tmp_path, "--recipe", recipe, "--output", page) == 0
    assert "1 measured; tokens of none of them could be counted" in capsys.readouterr().out
    assert "roles do not alternate" in Elements(page.read_text(encoding="utf-8")).text
    assert run("show", "mixed", "--recipe", recipe, "--output", page) == 0  # control
    assert "tokens a row" in capsys.readouterr().out


def test_files_that_are_no_recipe_are_passed_over(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RECIPES.mkdir(parents=True)
    for name, content in {"a": "", "b": "- x\n", "c": "a: [", "e": "\x00", "f": "dataset:\n"}.items():
        (RECIPES / f"{name}.yaml").write_text(content)
    assert look_at("mixed", dataset_dir=folder, rows=1).recipe is None
    shutil.copy(folder / "stage.yaml", RECIPES / "d.yaml")
    assert look_at("mixed", dataset_dir=folder, rows=1).recipe == RECIPES / "d.yaml"


@pytest.mark.parametrize("option", ["--rows", "--measure"])
def test_numbers_of_rows_are_not_negative(folder, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        run("show", "mixed", option, -1)
    assert f"argument {option}: -1; expected at least 0" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert run("show", "mixed", "--recipe", folder / "stage.yaml", option, 0, "--output", page) == 0


def test_bars_hold_every_value():
    values = Histogram()
    for value in [0, 1, 1, 7, 900, 900, 100000]:
        values.add(value)
    chart = bars(values, "x", mark=512)
    titles = re.findall(r"<title>(.*?): ([\d,]+)</title>", chart)
    assert sum(int(count) for _, count in titles) == 7
    assert ("0", "1") in titles
    assert ("724 to 1,024", "2") in titles
    assert 'class="mark"' in chart
    assert 'class="mark"' not in bars(values, "x", mark=2**40)
    one = Histogram()
    one.add(5)
    assert bars(one, "x").count("<rect") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_the_window_in_chromium(page, folder, tmp_path, width):
    """A script, for which the page's policy is taken out, reads how wide the page became and which pictures load."""
    probed = tmp_path / "probed.html"
    opened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert opened != page
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + document.images.length + ' ' + " \
        "[...document.images].filter(i => i.naturalWidth > 0).length</script></body>"  # fmt: skip
    probed.write_text(opened.replace("</body>", probe), encoding="utf-8")

    def title(file: Path) -> list[int]:
        dumped = chromium(f"--window-size={width},900", "--dump-dom", file.as_uri())
        found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", dumped)
        assert found, dumped[:500]
        return [int(number) for number in found.groups()]

    wide, images, loaded = title(probed)
    assert wide <= width
    assert images == loaded > 20
    # Control: words that may not be broken are wider than the window.
    broken = tmp_path / "broken.html"
    style = re.sub(r"overflow-wrap: anywhere|overflow-y: auto", "", probed.read_text(encoding="utf-8"))
    broken.write_text(style, encoding="utf-8")
    assert title(broken)[0] > width


def chromium(*arguments: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout
