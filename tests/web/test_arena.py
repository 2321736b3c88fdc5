"""Scores are the likeliest there are, pairs are fair, and every vote is kept."""
import math
import os
import signal
import sqlite3
import subprocess
import sys
from functools import partial

import pytest
import torch

from tests.commands import ROOT
from tests.web.models import Page
from web import arena, html


def log_likelihood(theta, points):
    """Of points under log-strengths theta, everybody's tie with a model of strength 1 included; up to a constant."""
    beats = torch.nn.functional.logsigmoid(theta[:, None] - theta)
    return (points * beats).sum() + 0.5 * (torch.nn.functional.logsigmoid(theta)
                                           + torch.nn.functional.logsigmoid(-theta)).sum()


@pytest.mark.parametrize("case", range(8))
def test_bradley_terry(rng, case):
    """Scores are the maximum that Newton's method finds, from their mean, and errors those of its Hessian, for any
    votes: of models that never met, or of one that has always lost."""
    n = rng.randint(2, 6)
    points = torch.tensor([[rng.choice([0, 0, 0.5, 1, 4, 30]) * (i != j) for j in range(n)] for i in range(n)]).double()
    if case % 2:
        points[0] = 0
    theta = torch.zeros(n, dtype=torch.float64)
    for _ in range(200):
        gradient = torch.autograd.functional.jacobian(partial(log_likelihood, points=points), theta)
        hessian = torch.autograd.functional.hessian(partial(log_likelihood, points=points), theta)
        step = torch.linalg.solve(hessian, gradient)
        theta = theta - step / max(1, float(step.abs().max()))
    covariance = (-hessian).inverse()
    from_mean = [covariance[i, i] - 2 * covariance[i].mean() + covariance.mean() for i in range(n)]
    strengths, errors = arena.bradley_terry(points.numpy())
    assert strengths == pytest.approx((theta - theta.mean()).tolist(), abs=1e-6)
    assert errors == pytest.approx([math.sqrt(variance) for variance in from_mean], rel=1e-5)


def test_standings(rng):
    """A table counts every verdict on both sides; a tie is half a win for each, and "both bad" moves no score."""
    votes = [(*rng.sample("abc", 2), rng.choice(arena.VERDICTS)) for _ in range(60)]
    table = {row.name: row for row in arena.standings(votes)}
    for name, row in table.items():
        mine = [(a == name, verdict) for a, b, verdict in votes if name in (a, b)]
        assert row.won == sum(verdict == ("A" if first else "B") for first, verdict in mine)
        assert row.lost == sum(verdict == ("B" if first else "A") for first, verdict in mine)
        assert (row.tied, row.both_bad) == tuple(sum(v == x for _, v in mine) for x in ("tie", "both bad"))
    plain = [vote for vote in votes if vote[2] != "both bad"]
    assert {row.name: (row.score, row.margin) for row in arena.standings(plain)} == {
        name: (row.score, row.margin) for name, row in table.items()}
    swapped = [(b, a, {"A": "B", "B": "A"}.get(verdict, verdict)) for a, b, verdict in votes]
    for row in arena.standings(swapped):
        assert row.score == pytest.approx(table[row.name].score)
    assert sum(row.score for row in table.values()) / len(table) == pytest.approx(1000)
    ties = arena.standings([("a", "b", "tie")] * 2)
    halves = arena.standings([("a", "b", "A"), ("a", "b", "B")])
    assert [(row.score, row.margin) for row in ties] == [(row.score, row.margin) for row in halves]
    scores = [row.score for row in table.values()]
    assert scores == sorted(scores, reverse=True) and arena.standings([]) == []
    page = Page(html.score_table(arena.standings(votes)))
    assert [bold[2] for bold in page.all("b")] == list(table)


def test_ten_to_one():
    """400 points are odds of ten to one, once there are so many games that the imaginary one does not count."""
    first, second = arena.standings([("a", "b", "A")] * 10_000 + [("a", "b", "B")] * 1000)
    assert first.name == "a" and first.score - second.score == pytest.approx(400, abs=0.5)


def test_pairs_are_of_similar_size(rng):
    """A drawn pair is of two models, one of ours and one of theirs where there are both, no more than twice as large or
    the nearest that there is; every fair pair comes up, on both sides."""
    sizes = {"a": 10, "b": 15, "c": 200, "x": 12, "y": 19, "z": 390, "huge": 10**6}
    pairs = {arena.draw_pair(sizes, set("abc"), rng) for _ in range(600)}
    fair = {("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "z")}
    assert pairs == fair | {(b, a) for a, b in fair}
    assert {frozenset(arena.draw_pair({"a": 1, "b": 9, "c": 50}, set("abc"), rng)) for _ in range(200)} == {
        frozenset("ab"), frozenset("bc")}
    assert {frozenset(arena.draw_pair({"x": 1, "y": 2}, set(), rng)) for _ in range(20)} == {frozenset("xy")}


VOTER = """
import sys
from pathlib import Path
from web.arena import Vote, record
for number in range(10**6):
    record(Path("arena.sqlite"), Vote(f"{sys.argv[1]} {number}", "Blind", "p", "a", "b", "x", "y", "A"))
    print(number, flush=True)
"""


def test_killed_processes_lose_no_vote(rng, tmp_path):
    """Of two processes that vote at once and are killed, every vote that was said to be kept is in the file."""
    voters = [subprocess.Popen([sys.executable, "-c", VOTER, name], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}) for name in "ab"]
    wanted = {voter: rng.randint(1, 30) for voter in voters}
    said = {}
    for voter in voters:
        heard = [voter.stdout.readline() for _ in range(wanted[voter])]
        voter.send_signal(signal.SIGKILL)
        said[voter] = heard + voter.stdout.readlines()
        voter.wait()
    kept = {match for match, in sqlite3.connect(tmp_path / "arena.sqlite").execute("SELECT match FROM votes")}
    for name, voter in zip("ab", voters):
        assert len(said[voter]) >= wanted[voter]
        assert {f"{name} {number.strip()}" for number in said[voter] if number.endswith("\n")} <= kept


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_votes_are_their_owners(tmp_path):
    """Prompts and texts are for the owner's eyes: a new file is, and one of an earlier version becomes so."""
    new, old = tmp_path / "new" / "votes.sqlite", tmp_path / "old.sqlite"
    old.touch(mode=0o644)
    old.chmod(0o644)
    before = os.umask(0)
    try:
        for path in (new, old):
            assert arena.read(path) == [] and path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
