"""The files of a source on this machine: which are read, as what, and which are left out.

We list them ourselves, so that nothing is chosen in silence. (The `datasets` library makes splits of words in the names
of a folder's files, takes only the commonest type of them, and names a missing file in many lines.)
"""

import difflib
import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from cli import BadInput, brief
from config import Source

READERS = ("text", "json", "csv", "parquet")  # a file of one of these kinds we read ourselves (readers.py)
SUFFIXES = {".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".rst": "text", ".jsonl": "json",
            ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
ABOUT = re.compile(r"(readme|license|licence|copying|notice|dataset_infos?|dataset_dict|state)(\..*)?", re.I)
SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
SHOWN = 8  # names in a list of files that we print


@dataclass
class File:
    """A file to read."""

    kind: str
    """One of READERS."""
    path: str
    """Absolute path, or URL."""
    stamp: list
    """What changes when its content does: size and time of a local file, commit or ETag of another."""
    separator: str = ","
    """Between the fields of a csv file."""


@dataclass
class Listing:
    """What a source reads, and what it does not."""

    files: list[File]
    left_out: list[str] = field(default_factory=list)
    """Names of files, for people to read."""
    commit: str | None = None
    """Commit of a dataset on the hub."""

    def words(self, source: Source) -> list[str]:
        """The same in a line or two."""
        paths = [file.path for file in self.files]
        if any("://" in path for path in paths):
            place = f"of {source.dataset}" + (f" at commit {self.commit[:8]}" if self.commit else "")
            names = [re.sub(r"^hf://datasets/[^/]+/[^/]+/", "", path) for path in paths]
        else:
            folder = os.path.commonpath([os.path.dirname(path) for path in paths])
            place = f"in {os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder}"
            names = [os.path.relpath(path, folder) for path in paths]
        lines = [f"reads {count(names, 'file')} {place}: {some(names)}"]
        return lines + ([f"leaves out {count(self.left_out, 'other')}: {some(self.left_out)}"] if self.left_out else [])


def count(names: list, noun: str) -> str:
    """ "1 file" or "2 files"."""
    return f"{len(names):,} {noun}{'s' * (len(names) != 1)}"


def some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def is_local(source: Source) -> bool:
    """Whether the source is files on this machine."""
    if source.dataset in READERS:
        return not any("://" in pattern for pattern in source.data_files)
    return looks_local(source.dataset) or Path(source.dataset).exists()


def looks_local(dataset: str) -> bool:
    """Whether a name can only be a path: the hub's are "name" or "owner/name"."""
    return not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", dataset) or (
        "/" in dataset and Path(dataset).parent.is_dir())


def kind_of(path: Path) -> str | None:
    """What a file's name says that it is."""
    return SUFFIXES.get(Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower())


def as_file(path: Path, kind: str) -> File:
    """A local file. Raises OSError if it is gone."""
    status = path.stat()
    return File(kind, os.path.abspath(path), [status.st_size, status.st_mtime_ns],
                "\t" if ".tsv" in path.suffixes else ",")


def find_files(source: Source) -> Listing:
    """The files of a local source. Raises BadInput if there are none, or if it is not clear which are meant."""
    try:
        if source.dataset in READERS:
            return named_files(source, Path("."), source.dataset)
        folder = Path(source.dataset).expanduser()
        if not folder.is_dir():
            raise BadInput(f"{folder} is a file; name it with the dataset text, json, csv or parquet, and data_files"
                           if folder.exists() else missing(folder))
        return named_files(source, folder, None) if source.data_files else folder_files(source, folder)
    except (OSError, ValueError) as error:  # no permission; a name too long, or with a NUL
        raise error if isinstance(error, BadInput) else BadInput(brief(error)) from None


def missing(path: Path) -> str:
    """What to say of a path where nothing is."""
    first, folder = path, path.parent
    while not folder.is_dir():
        first, folder = folder, folder.parent
    near = difflib.get_close_matches(first.name, os.listdir(folder), 1)
    return f"there is no {path}" + (f"; do you mean {folder / near[0]}?" if near else "")


def below(folder: Path) -> tuple[list[Path], list[str]]:
    """The files in a folder and its folders, in order; and names of what is not looked at."""
    files, left_out = [], []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        linked = [name for name in folders if (here / name).is_symlink()]
        hidden = [name for name in folders + names if name.startswith((".", "__"))]
        left_out += [str((here / name).relative_to(folder)) for name in dict.fromkeys(linked + hidden)]
        folders[:] = [name for name in folders if name not in (*linked, *hidden)]
        files += [here / name for name in names if name not in hidden]
    return sorted(files, key=str), left_out


def named_files(source: Source, folder: Path, kind: str | None) -> Listing:
    """The files that data_files names, in its order."""
    if source.split != "train":
        raise BadInput(f"there is no split {source.split!r}: the files that data_files names are the split train")
    listing = Listing([])
    for pattern in source.data_files:
        if "\0" in pattern:
            raise BadInput(f"no file matches {pattern!r}")
        paths, left_out = matching(folder, pattern)
        if kind and (folder / Path(pattern).expanduser()).is_dir():  # all of a folder: what is of this kind
            left_out += [str(path) for path in paths if kind_of(path) != kind]
            paths = [path for path in paths if kind_of(path) == kind]
        if not paths:
            raise BadInput(f"no file matches {pattern}" + (f" (there are: {some(left_out)})" if left_out else ""))
        listing.left_out += left_out
        for path in paths:
            if not (kind or kind_of(path)):
                raise BadInput(f"{path}: its name does not say what it is; choose the dataset text, json, csv or "
                               f"parquet, and name the files with data_files")
            file = as_file(path, kind or kind_of(path))
            if any(file.path == earlier.path for earlier in listing.files):
                listing.left_out.append(f"{path} (a second time)")
            else:
                listing.files.append(file)
    return listing


def matching(folder: Path, pattern: str) -> tuple[list[Path], list[str]]:
    """The files that a path or pattern means, and the folders that a pattern matches too.

    What exists is taken as it is written, so that a folder may be called "texts [v2]".
    """
    path = folder / Path(pattern).expanduser()
    if path.is_dir():
        return below(path)
    if path.exists():
        return [path], []
    rest, there = [path.name], path.parent
    while not there.exists():
        rest, there = [there.name, *rest], there.parent
    if not glob.has_magic("".join(rest)):
        raise BadInput(missing(path))
    found = sorted(map(Path, glob.glob(os.path.join(glob.escape(str(there)), *rest), recursive=True)), key=str)
    files = [path for path in found if path.is_file()]
    folders = [f"the folder {path}" for path in found if path.is_dir()] if "**" not in rest else []
    return files, folders


def split_of(path: Path) -> str | None:
    """The split that a file's name, or its folder's, is. A word among others ("train_journey") is no split."""
    numbered = r"([-_.]?\d+([-_.]of[-_.]\d+)?)?"
    for part in (path.name.partition(".")[0], *path.parent.parts):
        for split, names in SPLITS.items():
            if re.fullmatch(f"({names}){numbered}", part.lower()):
                return split
    return None


def folder_files(source: Source, folder: Path) -> Listing:
    """All the files of a folder that we can read; those of one split, if it has a split "train"."""
    if source.subset:
        raise BadInput(f"{folder} has no subset {source.subset!r}: it has no README.md that says what its subsets are")
    paths, left_out = below(folder)
    texts = [path for path in paths if kind_of(path) and not ABOUT.fullmatch(path.name)]
    left_out += [str(path.relative_to(folder)) for path in paths if path not in set(texts)]
    if not texts:
        raise BadInput(f"{folder} holds no {' '.join(SUFFIXES)} file" + (f", only {some(left_out)}" if left_out else "")
                       + "; other files of text are read with the dataset text, and data_files that names them")
    splits = {path: split_of(path.relative_to(folder)) for path in texts}
    wanted = next((split for split, names in SPLITS.items() if source.split in (split, *names.split("|"))), None)
    if source.split != "train" or "train" in splits.values():
        if wanted not in splits.values():
            raise BadInput(f"{folder} has no split {source.split!r}")
        neither = [str(path.relative_to(folder)) for path in texts if splits[path] is None]
        if neither:
            raise BadInput(f"{folder} has files of a split {wanted}, and others: {some(neither)}; name those that you "
                           f"mean with data_files")
        left_out += [str(path.relative_to(folder)) for path in texts if splits[path] != wanted]
        texts = [path for path in texts if splits[path] == wanted]
    return Listing([as_file(path, kind_of(path)) for path in texts], left_out)
