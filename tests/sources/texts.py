"""Documents drawn afresh, files that hold them, a run that wants them, and what a plain reference makes of them."""
import json
import math
import string
import unicodedata

import pyarrow
import pyarrow.parquet

import prepare
import tokenizer
from config import Source, load
from data import tokens_needed

HELD_OUT = 40  # documents of each source, in all tests here


# -----------------------------------------------------------------------------
# inputs: documents, the files that hold them, the run that wants them

class Text:
    """Documents drawn afresh: words of ASCII and others, every kind of white space, code-like lines."""

    def __init__(self, rng):
        letters = "etaoinshrdlu" * 9 + string.ascii_letters + string.digits + string.punctuation
        letters += "éﬁ½漢字😀\u0301\u212b"
        spaces = [" "] * 40 + list("\n\r\t\x0b\x85\xa0\u2028\u3000") + ["\n    ", "\n\n", "\r\n", "  ", " \n"]

        def word():
            return "".join(rng.choices(letters, k=rng.randint(1, 9)))

        self.rng, self.pieces = rng, [word() + rng.choice(spaces) for _ in range(9000)]

    def document(self, size):
        """About this many characters."""
        return "".join(self.rng.choices(self.pieces, k=max(1, size // 6)))

    def documents(self, size, lengths=(5, 20, 80, 1000), long=()):
        """Rows of about `size` characters in all: some empty, some copies of the first, some `long` besides."""
        rows, left = [self.document(300) for _ in range(HELD_OUT // 2)], size
        while left > 0:
            kind = self.rng.random()
            rows.append(self.rng.choice(["", None, " \r\n\t", "\u3000\n"]) if kind < 0.05 else
                        f" {self.rng.choice(rows[:HELD_OUT])}\r\n" if kind < 0.1 else
                        self.document(self.rng.choice(lengths)))
            left -= len(rows[-1] or "")
        for length in long:
            rows.insert(self.rng.randrange(len(rows)), self.document(length))
        return rows


def write_parquet(path, rows, rng, column="text", smallest=1, largest=300, width=64):
    """A Parquet file whose row groups are of all sizes, and which has columns besides the text."""
    schema = pyarrow.schema({"id": pyarrow.int64(), "embedding": pyarrow.binary(), column: pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        done = 0
        while done < len(rows):
            some = rows[done:done + rng.randint(smallest, largest)]
            numbers = list(range(done, done + len(some)))
            embeddings = [rng.randbytes(width) for _ in some]
            writer.write_table(pyarrow.table([numbers, embeddings, some], schema=schema))
            done += len(some)


def write_shards(directory, name, rows, rng, count, **options):
    """The rows, in order, in `count` Parquet files of unlike lengths; returns the pattern that names them."""
    cuts = [0, *sorted(rng.sample(range(1, len(rows)), count - 1)), len(rows)]
    for number, (first, last) in enumerate(zip(cuts, cuts[1:])):
        write_parquet(directory / f"{name}-{number}.parquet", rows[first:last], rng, **options)
    return str(directory / f"{name}-*.parquet")


def preset(path, sources, **settings):
    """A config file of these sources, all with the same share of a run whose steps are one block of 64 tokens."""
    for source in sources.values():
        source.ratio = source.anneal_ratio = 1 / len(sources)
        source.held_out = HELD_OUT if source.held_out == 100 else source.held_out
    settings = {"data_dir": "data", "block_size": 64, "tokens_per_step": 64, "max_steps": 1000} | settings
    path.write_text(f"from config import Config, Source\nconfig = Config(sources={sources!r}, **{settings!r})\n")
    return path


def two_sources(directory, rng, size=100_000, **options):
    """Prose and code in a few shards each -> (sources, name -> rows)."""
    text = Text(rng)
    rows = {name: text.documents(size) for name in ("web", "code")}
    files = {name: write_shards(directory, name, rows[name], rng, 3, **options) for name in rows}
    return {"web": Source("parquet", data_files=files["web"]),
            "code": Source("parquet", data_files=files["code"], preserve_linebreaks=True)}, rows


# -----------------------------------------------------------------------------
# what comes out, and what should

def result(data_dir):
    """Everything that a finished directory must hold: the bins' bytes, the counts of meta.json, no other file."""
    files = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    meta = json.loads(files.pop("meta.json"))
    apart = ("position", "files", "stamps", "commit")
    counts = {name: {key: value for key, value in source.items() if key not in apart}
              for name, source in meta["sources"].items()}
    for source in counts.values():  # whatever came in went somewhere
        kinds = ("documents", "empty", "copies", "bad_rows", "special")
        assert source["read"] == sum(source[split][kind] for split in ("train", "val") for kind in kinds)
    return files, counts


def card_clean(text, preserve_linebreaks):
    """The Stentor3 card's function as it is printed there (its doubled backslashes undone)."""
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if preserve_linebreaks:
        lines = [line.rstrip() for line in text.splitlines()]
        text = "\n".join(lines).strip()
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        text = " ".join(lines)
        text = " ".join(text.split())
    return text


def expected(sources, rows, goals, name_or_path="quickstart-2048"):
    """What `result` must be: computed one document after another, without datasets, workers or positions."""
    vocabulary = tokenizer.load(name_or_path)
    files, counts, unwanted = {}, {}, set()

    def take(name, split, some, goal):
        data, documents, size, dropped, read, empty, copies = b"", 0, 0, 0, 0, 0, 0
        for row in some:
            if len(data) // 2 >= goal:
                break
            read += 1
            text = card_clean(row or "", sources[name].preserve_linebreaks)
            ids = vocabulary.encode(text)
            if len(ids) == 0:
                empty += 1
                continue
            if split == "train" and ids.tobytes() in unwanted:
                copies += 1
                continue
            if split == "val":
                unwanted.add(ids.tobytes())
            data += ids.astype("<u2").tobytes() + vocabulary.eos_id.to_bytes(2, "little")
            documents += 1
            dropped += vocabulary.count_dropped(text)
            size += (len(vocabulary.decode_bytes(ids)) if isinstance(vocabulary, tokenizer.TokenMonster) else
                     len(text.encode()) - vocabulary.count_dropped(text))
        files[f"{name}.bin" if split == "train" else f"{name}_val.bin"] = data
        counts[name][split] = {"documents": documents, "tokens": len(data) // 2, "bytes": size,
                               "dropped_bytes": dropped, "empty": empty, "copies": copies, "bad_rows": 0,
                               "special": 0, "marked": 0}
        counts[name]["read"] += read

    for name in sources:
        counts[name] = {"read": 0}
        take(name, "val", rows[name][:sources[name].held_out], math.inf)
    for name in sources:
        take(name, "train", rows[name][sources[name].held_out:], goals[name])
        counts[name]["exhausted"] = counts[name]["train"]["tokens"] < goals[name]
    return files, counts


def make(file, data_dir, *options):
    """prepare.py in this process -> what it made."""
    prepare.main([str(file), "--data_dir", str(data_dir), *map(str, options)])
    return result(data_dir)


def needed(file, steps):
    return tokens_needed(load([str(file), "--max_steps", str(steps)]))
