"""The arena: who meets whom, votes that are on the disk before anybody hears that they count, and scores."""

import math
import random
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERDICTS = ("A", "B", "tie", "both bad")
POINTS = 400 / math.log(10)  # a score's points per unit of log-strength: 400 are odds of ten to one, as in chess


def draw_pair(sizes: dict[str, int], ours: set[str], rng: random.Random) -> tuple[str, str]:
    """Two models of similar size, from {name: parameters}, in random order.

    The first is drawn at random. The second is drawn from those up to twice as large or small; if there are none, it
    is the one nearest in size. If there are models of ours and of others, the pair has one of each.
    """
    own = [name for name in sizes if name in ours] or list(sizes)
    first = rng.choice(own)
    others = [name for name in sizes if name not in ours] if ours else []
    others = others or [name for name in sizes if name != first]
    ratio = {name: abs(math.log(sizes[name] / sizes[first])) for name in others}
    near = [name for name in others if ratio[name] <= math.log(2)] or [min(others, key=ratio.get)]
    pair = [first, rng.choice(near)]
    rng.shuffle(pair)
    return pair[0], pair[1]


# ---------------------------------------------------------------------------------------------------------------
# Votes


@dataclass
class Vote:
    """A verdict on two texts that continue one prompt. Each match has an id of its own."""

    match: str
    mode: str
    prompt: str
    model_a: str
    model_b: str
    text_a: str
    text_b: str
    verdict: str


def connect(path: Path) -> sqlite3.Connection:
    """Open the file of votes, or make an empty one that only its owner can read: prompts are nobody else's business.

    Raises sqlite3.Error if it is some other file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    if path.stat().st_mode & 0o077:  # made by an earlier version
        with suppress(OSError):  # it may be somebody else's, or on a disk without such rights
            path.chmod(0o600)
    database = sqlite3.connect(path, timeout=10)  # seconds to wait while another process writes
    # EXTRA: a commit returns once the vote and the end of its journal are on the disk, whatever happens next.
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("""CREATE TABLE IF NOT EXISTS votes (
        id INTEGER PRIMARY KEY, at TEXT DEFAULT CURRENT_TIMESTAMP, match TEXT UNIQUE, mode TEXT, prompt TEXT,
        model_a TEXT, model_b TEXT, text_a TEXT, text_b TEXT,
        verdict TEXT CHECK (verdict IN ('A', 'B', 'tie', 'both bad')))""")
    return database


def record(path: Path, vote: Vote):
    """Add a vote; it is on the disk when this returns. If the match already has a vote, that one stays.

    Raises sqlite3.Error if the file cannot be written, or if the verdict is none of VERDICTS.
    """
    with closing(connect(path)) as database, database:
        database.execute("INSERT INTO votes (match, mode, prompt, model_a, model_b, text_a, text_b, verdict) VALUES "
                         "(:match, :mode, :prompt, :model_a, :model_b, :text_a, :text_b, :verdict) "
                         "ON CONFLICT (match) DO NOTHING", vars(vote))


def read(path: Path) -> list[tuple[str, str, str]]:
    """All votes, oldest first: (model A, model B, verdict)."""
    with closing(connect(path)) as database:
        return database.execute("SELECT model_a, model_b, verdict FROM votes ORDER BY id").fetchall()


# ---------------------------------------------------------------------------------------------------------------
# Scores: the odds between any two models, and how much of them is luck


def bradley_terry(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-strengths of n models, with mean 0, and their standard errors, (n,) each.

    points (n, n)    [i, j] is how many points i has won from j: 1 for a win, half a point each for a tie

    i beats j with probability s_i / (s_i + s_j) (Bradley & Terry 1952, Rank Analysis of Incomplete Block Designs).
    Hunter's iteration finds the likeliest strengths (2004, MM Algorithms for Generalized Bradley-Terry Models):
    s_i <- points of i / sum_j (games of i and j) / (s_i + s_j). Each step raises the likelihood. Every model starts
    with one tie against an imaginary model of strength 1. So a model that has lost every game has a low strength, not
    0, and models that never met can be compared. The errors come from the Fisher information (imaginary games
    included) and are for the distance from the mean of all models; since a tie counts as two half wins, they are a
    little too wide.
    """
    games, won = points + points.T, points.sum(1) + 0.5
    strength = np.ones(len(points))
    for _ in range(100_000):
        before = strength
        strength = won / ((games / (before[:, None] + before)).sum(1) + 1 / (before + 1))
        if np.abs(np.log(strength / before)).max(initial=0) < 1e-12:
            break
    chance = strength[:, None] / (strength[:, None] + strength)  # [i, j]: i beats j
    shared = games * chance * (1 - chance)
    information = np.diag(shared.sum(1) + strength / (strength + 1) ** 2) - shared
    # Only differences mean anything: nobody votes on how good all of them are together.
    centre = np.eye(len(points)) - 1 / max(1, len(points))
    return centre @ np.log(strength), np.sqrt(np.diag(centre @ np.linalg.inv(information) @ centre))


class Standing(NamedTuple):
    """A model's score, half the width of its 95% interval, and its votes."""

    name: str
    score: float
    margin: float
    won: int
    tied: int
    lost: int
    both_bad: int


def standings(votes: list[tuple[str, str, str]]) -> list[Standing]:
    """Every model that has been voted on, the best first. "Both bad" is counted but moves no score: it prefers nobody.
    """
    names = sorted({name for a, b, _ in votes for name in (a, b)})
    number = {name: i for i, name in enumerate(names)}
    points, count = np.zeros((len(names), len(names))), {name: [0, 0, 0, 0] for name in names}
    for a, b, verdict in votes:
        share = {"A": 1.0, "B": 0.0, "tie": 0.5, "both bad": None}[verdict]
        for name, other, got in ((a, b, share), (b, a, share if share is None else 1 - share)):
            count[name][3 if got is None else round(2 - 2 * got)] += 1  # won, tied, lost, both bad
            points[number[name], number[other]] += got or 0
    table = [Standing(name, 1000 + POINTS * strength, 1.96 * POINTS * error, *count[name])
             for name, strength, error in zip(names, *bradley_terry(points))]
    return sorted(table, key=lambda standing: -standing.score)
