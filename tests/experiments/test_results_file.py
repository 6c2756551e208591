"""Where a chapter finds its stored results."""

import json
import re

import pytest
from werkzeug import Response

from t2t_ref.experiments.results import results_file


@pytest.fixture
def repository(httpserver):
    """A server on this machine that knows two files, and breaks off in the middle of the second."""
    httpserver.no_handler_status_code = 404
    httpserver.expect_request(re.compile(".*/whole.json")).respond_with_data("[2]")
    # of bytes in one piece werkzeug corrects the length
    httpserver.expect_request(re.compile(".*/broken.json")).respond_with_handler(
        lambda request: Response(iter([b"[2]"]), headers={"Content-Length": "300"})
    )
    return httpserver.url_for("/owner/name"), httpserver.log


def test_a_copy_beside_or_above_is_taken(tmp_path, monkeypatch, repository):
    address, asked = repository
    for name in ("results", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "results" / "whole.json").write_text("[1]", encoding="utf-8")
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert json.loads(results_file("whole.json", address).read_text(encoding="utf-8")) == [1]
    assert not asked


def test_what_is_missing_is_fetched_once(tmp_path, monkeypatch, repository):
    address, asked = repository
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert json.loads(results_file("weights/whole.json", address).read_text(encoding="utf-8")) == [2]
    assert [request.path for request, _ in asked] == ["/owner/name/main/results/weights/whole.json"]


def test_the_address_on_github(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "t2t_ref.experiments.results.urlopen", lambda url: asked.append(url) or open("nothing", encoding="utf-8")
    )
    with pytest.raises(ConnectionError):
        results_file("a.json", "https://github.com/some-owner/some-name")
    assert asked == ["https://raw.githubusercontent.com/some-owner/some-name/main/results/a.json"]


@pytest.mark.parametrize("name, reason", [("broken.json", "IncompleteRead|3 bytes read"), ("none.json", "404")])
def test_what_cannot_be_had_leaves_nothing(tmp_path, monkeypatch, repository, name, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=rf"results/{name} is not here.*({reason}).*put the file there"):
        results_file(name, repository[0])
    assert not list((tmp_path / "results").iterdir())
