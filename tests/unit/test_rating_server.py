"""The rating page's server is blind, goes on where it was left, and refuses what it should."""

from __future__ import annotations

import http.client
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ganscale.cli import main
from ganscale.errors import ConfigError, DataError
from ganscale.generation.snapshot import save_snapshot
from ganscale.models import build_generator
from ganscale.rating.answers import read_answers
from ganscale.rating.contestants import Contestant, default_reference, encode_png, open_runs
from ganscale.rating.questions import REAL
from ganscale.rating.results import as_table
from ganscale.rating.server import RatingServer
from ganscale.rating.session import RatingSession, rater_name
from tests.conftest import MakeConfig


def contestant(name: str, *, side: int = 8, num_images: int = 40) -> Contestant:
    """Noise images that tell the contestants apart; the real ones would compress better."""
    random = np.random.default_rng(list(name.encode()))
    shape, high = (num_images, 3, side, side), 4 if name == REAL else 256
    pixels: NDArray[np.uint8] = random.integers(0, high, shape, dtype=np.uint8)
    pngs = tuple(encode_png(torch.from_numpy(image)) for image in pixels)
    return Contestant(name, f"images of {name}", f"digest of {name}", (3, side, side), pngs)


MakeSession = Callable[..., RatingSession]


@pytest.fixture
def make_session(tmp_path: Path) -> MakeSession:
    def make(folder: str = "ratings", **changes: Any) -> RatingSession:
        contestants = [contestant(REAL), contestant("runs/a"), contestant("runs/b")]
        options = {"contestants": contestants, "task": "realness", "num": 20, "seed": 0}
        return RatingSession(tmp_path / folder, **{**options, **changes})

    return make


def finish(session: RatingSession, rater: str, answer: str = "real") -> list[dict[str, Any]]:
    """Answer all that is left; what was shown before each answer, and at the end."""
    states = [session.state(rater)]
    while states[-1]["question"]:
        session.answer(rater, states[-1]["question"]["token"], answer, 0.5)
        states.append(session.state(rater))
    return states


def test_a_session_goes_on_where_it_was_left_with_the_same_tokens(
    make_session: MakeSession,
) -> None:
    with closing(make_session()) as session:
        for _ in range(7):
            token = session.state("ada")["question"]["token"]
            session.answer("ada", token, "real", 0.5)
            session.answer("ada", token, "fake", 0.1)
        before = session.state("ada")
        finish(session, "ben")
    with closing(make_session()) as session:
        assert session.state("ada") == before
        assert (before["num_answered"], before["question"]["number"]) == (7, 8)
        assert [s["num_answered"] for s in finish(session, "ada")] == list(range(7, 21))
        answers = session.answers.of("ada")
        assert [a.answer for a in answers.values()] == ["real"] * 20
        assert sum(bool(a.correct) for a in answers.values()) == 10


def test_preferences_against_real_images_are_right_or_wrong(make_session: MakeSession) -> None:
    for folder, names in [("real", (REAL, "runs/a")), ("runs", ("runs/a", "runs/b"))]:
        contestants = [contestant(name) for name in names]
        with closing(
            make_session(folder, contestants=contestants, task="preference", reveal=True)
        ) as session:
            end = finish(session, "ada", "left")[-1]
            answers = session.answers.all()
        assert all(a.chosen == a.truth[0] for a in answers)
        if REAL in names:
            assert all(a.correct == (a.truth[0] == REAL) for a in answers)
            assert end["result"] == "10 of 20 answers were wrong"
        else:
            assert {a.correct for a in answers} == {None}
            assert end["result"] == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"num": 22}, "num: 20 there, 22 now"),
        ({"task": "preference"}, "task: realness there, preference now"),
        ({"contestants": [contestant(REAL), contestant("runs/c")]}, "runs/c (digest of ru)"),
    ],
)
def test_a_folder_of_answers_takes_no_others(
    make_session: MakeSession, change: dict[str, Any], words: str
) -> None:
    make_session().close()
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_session(**change)
    make_session().close()


def test_a_folder_is_served_once(make_session: MakeSession) -> None:
    with (
        closing(make_session()),
        pytest.raises(ConfigError, match="another ganscale rate serves these ratings"),
    ):
        make_session()


@pytest.mark.parametrize(
    ("contestants", "words"),
    [
        ([contestant(REAL), contestant("runs/a", side=16)], "would give them away"),
        ([contestant(REAL), contestant("runs/a", num_images=9)], "has 9 images.* may need 10"),
    ],
)
def test_images_that_cannot_be_judged_fairly_are_refused(
    make_session: MakeSession, contestants: list[Contestant], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        make_session(contestants=contestants)


def test_names_are_compared_without_case_and_blanks() -> None:
    assert rater_name("  Ada   Lovelace ") == rater_name("ada lovelace") == "ada lovelace"
    for name in ("", " ", "x" * 65, "a\x07b"):
        with pytest.raises(ValueError, match="1 to 64 letters"):
            rater_name(name)


@contextmanager
def serving(session: RatingSession, host: str = "127.0.0.1") -> Iterator[RatingServer]:
    with closing(session), RatingServer(session, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(
    server: RatingServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Ask once; `body` is sent as JSON, underscores in the headers' names become dashes."""
    client = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    data = None
    if body is not None:
        sent = {"Content-Type": "application/json", **sent}
        data = json.dumps(body).encode()
    with closing(client):
        client.request(method, path, data, sent)
        response = client.getresponse()
        return response, response.read()


def test_what_is_served_does_not_depend_on_the_truth(
    make_session: MakeSession, tmp_path: Path
) -> None:
    """With one key and other truths, everything but the pixels is the same."""
    served, truths = [], []
    for seed in (0, 1):
        folder = f"seed-{seed}"
        make_session(folder, seed=seed).close()
        definition = tmp_path / folder / "session.json"
        definition.write_text(json.dumps({**json.loads(definition.read_text()), "key": "00" * 16}))
        with serving(make_session(folder, seed=seed)) as server:
            served.append([_strip(*answer) for answer in _walk(server)])
        truths.append([a.truth for a in read_answers(tmp_path / folder / "answers.jsonl")])
    assert truths[0] != truths[1]
    assert served[0] == served[1]
    images = [answer for answer in served[0] if ("Content-Type", "image/png") in answer[0]]
    assert len(images) == 20
    assert len(set(images)) == 1


def _walk(server: RatingServer) -> Iterator[tuple[http.client.HTTPResponse, bytes]]:
    """Everything that a browser is sent during a session."""
    yield request(server, "GET", "/")
    path, body = "/question", {"rater": "ada"}
    while True:
        response, data = request(server, "POST", path, body)
        yield response, data
        question = json.loads(data)["question"]
        if question is None:
            return
        for token in question["images"]:
            yield request(server, "GET", f"/image/{token}")
        path = "/answer"
        body = {"rater": "ada", "token": question["token"], "answer": "real"}
        body["response_seconds"] = "0.5"


def _strip(response: http.client.HTTPResponse, data: bytes) -> tuple[tuple[Any, ...], bytes]:
    """Headers and body, of an image its length and structure in place of its pixels."""
    headers = tuple((name, value) for name, value in response.getheaders() if name != "Date")
    if response.headers["Content-Type"] != "image/png":
        return headers, data
    kinds, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kinds.append(data[at + 4 : at + 8])
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    return headers, data[:33]


def test_the_page_needs_nothing_but_its_server(make_session: MakeSession) -> None:
    with serving(make_session()) as server:
        response, data = request(server, "GET", "/")
    page = data.decode()
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|style=", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert response.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["Server"].strip() == "ganscale"


ANSWER = {"rater": "ada", "token": "0" * 32, "answer": "real", "response_seconds": 1}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/session.json", None, {}, 404),
        ("GET", "/../session.json", None, {}, 404),
        ("GET", "/image/../../session.json", None, {}, 404),
        ("GET", "/image/..%2f..%2fsession.json", None, {}, 404),
        ("GET", "//etc/passwd", None, {}, 404),
        ("GET", "/image/", None, {}, 404),
        ("GET", f"/image/{'0' * 32}", None, {}, 404),
        ("GET", "/", None, {"Host": "rebound.example"}, 421),
        ("GET", "/", None, {"Host": "127.0.0.1.rebound.example:80"}, 421),
        ("GET", "/", None, {"Host": ""}, 421),
        ("POST", "/question", {"rater": "ada"}, {"Host": "rebound.example"}, 421),
        ("HEAD", "/", None, {}, 405),
        ("PUT", "/answer", ANSWER, {}, 405),
        ("DELETE", "/", None, {}, 405),
        ("OPTIONS", "/answer", None, {}, 405),
        ("POST", "/", {}, {}, 404),
        ("POST", "/answer", ANSWER, {"Content_Type": "text/plain"}, 415),
        ("POST", "/answer", ANSWER, {"Content_Length": "-1"}, 411),
        ("POST", "/answer", {**ANSWER, "rater": "x" * 5000}, {}, 413),
        ("POST", "/answer", {}, {"Content_Length": "999999999"}, 413),
        ("POST", "/answer", [], {}, 400),
        ("POST", "/answer", {"rater": "ada"}, {}, 400),
        ("POST", "/answer", {"rater": 5}, {}, 400),
        ("POST", "/question", {"rater": " "}, {}, 400),
        ("POST", "/answer", ANSWER, {}, 400),
        ("POST", "/answer", {**ANSWER, "token": []}, {}, 400),
        ("POST", "/answer", {**ANSWER, "response_seconds": "nan"}, {}, 400),
    ],
)
def test_what_is_not_meant_to_be_asked_is_refused_in_a_line(
    make_session: MakeSession,
    capsys: pytest.CaptureFixture[str],
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    status: int,
) -> None:
    with serving(make_session()) as server:
        response, data = request(server, method, path, body, **headers)
        assert response.status == status
        assert method == "HEAD" or list(json.loads(data)) == ["error"]
        assert server.session.answers.all() == []
        well, _ = request(server, "GET", "/", Host="localhost:9000")
        assert well.status == 200
    assert capsys.readouterr().err == ""


def test_answers_that_are_none_to_a_shown_question_are_refused(make_session: MakeSession) -> None:
    with serving(make_session()) as server:
        session = server.session
        own, others = (session.state(rater)["question"]["token"] for rater in ("ada", "ben"))
        for change in ({"token": others}, {"answer": "left"}, {"response_seconds": -1}):
            body = {**ANSWER, "token": own, **change}
            response, _ = request(server, "POST", "/answer", body)
            assert response.status == 400
        assert session.answers.all() == []


def test_a_full_disk_is_told_and_the_answer_can_be_given_again(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_session()) as server:
        token = server.session.state("ada")["question"]["token"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *_: 0)
            response, data = request(server, "POST", "/answer", {**ANSWER, "token": token})
        assert response.status == 507
        assert "is not stored" in json.loads(data)["error"]
        response, data = request(server, "POST", "/answer", {**ANSWER, "token": token})
        assert (response.status, json.loads(data)["num_answered"]) == (200, 1)


def test_other_names_are_served_where_other_machines_may_ask(make_session: MakeSession) -> None:
    with serving(make_session(), host="0.0.0.0") as server:
        assert not server.only_loopback
        assert request(server, "GET", "/", Host="lab.example")[0].status == 200


def test_a_port_in_use_is_told(make_session: MakeSession) -> None:
    with serving(make_session()) as server:
        port = server.server_address[1]
        with pytest.raises(ConfigError, match=f"cannot serve at .* --port {port}: .*in use"):
            RatingServer(server.session, "127.0.0.1", port)


# Runs and the command


@pytest.fixture
def run(make_config: MakeConfig) -> Path:
    """The folder of a run with two snapshots."""
    config = make_config()
    folder = Path(config.run_dir)
    spec = {**config.model.model_dump(), "base_channels": 8}
    for nimg in (16, 32):
        torch.manual_seed(nimg)
        path = folder / "snapshots" / f"nimg-{nimg:012d}.safetensors"
        save_snapshot(path, build_generator(spec), spec=spec, nimg=nimg)
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def test_runs_are_their_newest_snapshot_a_named_one_or_images(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    older = run / "snapshots" / "nimg-000000000016.safetensors"
    places = [str(run), str(older), str(image_folder)]
    found = open_runs(places, num_images=20, seed=3, device="cpu", scratch=tmp_path)
    names = [f"tiny/nimg-{nimg:012d}" for nimg in (32, 16)]
    assert [c.name for c in found] == [*names, image_folder.name]
    assert [len(c) for c in found] == [20, 20, 20]
    assert len({c.digest for c in found}) == len({c.pngs for c in found}) == 3
    again = open_runs(places, num_images=20, seed=3, device="cpu", scratch=tmp_path)
    assert found == again
    with pytest.raises(ConfigError, match="named twice"):
        open_runs([str(run), str(run)], num_images=1, seed=0, device="cpu", scratch=tmp_path)


def test_the_folder_of_an_average_is_its_newest_snapshot(
    run: Path, procedural_shards: Path, tmp_path: Path
) -> None:
    average = run / "snapshots" / "ema-2000"
    average.mkdir()
    older = run / "snapshots" / "nimg-000000000016.safetensors"
    older.rename(average / older.name)
    (found,) = open_runs([str(average)], num_images=2, seed=3, device="cpu", scratch=tmp_path)
    assert found.name == f"tiny/{older.stem}"
    assert default_reference([str(average)]) == str(procedural_shards)


def test_the_real_images_are_those_the_run_learned_from(
    run: Path, procedural_shards: Path, image_folder: Path
) -> None:
    snapshot = run / "snapshots" / "nimg-000000000016.safetensors"
    assert default_reference([str(run), str(snapshot)]) == str(procedural_shards)
    with pytest.raises(ConfigError, match="--reference"):
        default_reference([str(run), str(image_folder)])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name at least one run"),
        (["RUN", "--num", "7"], 2, "--num 7: half of the images are real"),
        (["RUN", "--task", "beauty"], 2, "beauty"),
        (["IMAGES"], 2, "name a shard set or a folder of images by --reference"),
        (["absent.safetensors", "--reference", "IMAGES"], 1, "no snapshot at absent.safetensors"),
        (["IMAGES", "--reference", "absent"], 1, "no such image source"),
        (["IMAGES", "--reference", "IMAGES"], 1, "37 images, a rater may need 50"),
        (["--results"], 1, "holds no answers"),
    ],
)
def test_wrong_use_is_one_line(
    run: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    places = {"RUN": str(run), "IMAGES": str(image_folder)}
    given = [places.get(a, a) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["rate", *given, "--out", str(tmp_path / "out"), "--port", "0"])
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == code
    assert line.startswith("ganscale: ")
    assert words in line


def test_results_are_printed_as_a_table_and_written_as_json(
    make_session: MakeSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(make_session()) as session:
        finish(session, "ada")
        options = ["--out", str(tmp_path / "ratings"), "--json", str(tmp_path / "r.json")]
        with pytest.raises(SystemExit) as stop:
            main(["rate", "--results", *options])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == as_table(
        read_answers(tmp_path / "ratings" / "answers.jsonl")
    )
    assert json.loads((tmp_path / "r.json").read_text())["num_answers"] == 20
