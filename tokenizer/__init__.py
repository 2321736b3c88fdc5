"""Text to token ids and back.

    tokenizer = load("quickstart-2048")
    ids = tokenizer.encode("Hello, world!")          # (n,) uint16
    tokenizer.decode(ids)                            # "Hello, world!"

Two kinds of vocabulary stand behind one small interface, `Tokenizer`: TokenMonster's ".vocab" files, read and searched
from scratch in tokenmonster.py, and "tokenizer.json" files, for which the `tokenizers` library does the work
(huggingface.py). A ".vocab" file can also be turned into the latter (portable.py).

Here is how a vocabulary is found by its name.
"""

import hashlib
import os
import re
from pathlib import Path

from cli import BadInput, brief
from tokenizer import portable
from tokenizer.delimiters import Beside
from tokenizer.hub import download
from tokenizer.huggingface import TokenizerJson
from tokenizer.interface import Tokenizer, TokenMonster
from tokenizer.tokenmonster import MAX_FILE, VocabularyError

__all__ = ["Tokenizer", "TokenMonster", "TokenizerJson", "find", "load"]

# The vocabularies that the Stentor models use: sha256 of the file, id of the end-of-document token. None of them has a
# special token. Cleaned text holds no "\r", so that token's id (2) is free to end documents; the model of english-8000
# has rows to spare after its 8,000 ids and uses the first.
VOCABULARIES = {
    "quickstart-2048":
        ("49ca8bc8684277f8cac3877c988aa56f02926e00a56e9eb87b4449a440addbc1", 2),
    "english-4096-strict-nocapcode-v1":
        ("8b4270afaa2280d960efd52b0cbcb3986b7757f09cfbc6bc616ef35fc21597b6", 2),
    "english-8000-strict-nocapcode-v1":
        ("cd0f9d205c5f090374c8f556ec04958f4225868b80a20b2060e4d4dc5bbf4744", 8000),
}
HUB_REPOSITORY = "alasdairforsythe/tokenmonster"
VOCABULARY_FOLDER = Path(__file__).parents[1] / "vocabs"


def load(name_or_path: str | Path, segmentation: str = "exact", eos_token: str | int | None = None,
         bos_token: str | int | None = None, beside: Beside | bool = True) -> Tokenizer:
    """The tokenizer of a vocabulary; `find` says what may be given.

    segmentation    how the ids of a .vocab file are found: "exact" is TokenMonster's own search, "portable" what a
                    tokenizer.json made of it does (portable.py). A tokenizer.json does what it does.
    eos_token       the token, or its id, that follows a document. If None, what the files beside a tokenizer.json say,
                    or a token of a usual name (delimiters.py)
    bos_token       the token, or its id, that prompts begin with, if that is another
    beside          whether to look at those files; or what they say

    Raises BadInput if the vocabulary is missing, damaged or not supported.
    """
    path = find(name_or_path)
    try:
        if path.suffix != ".json" and path.stat().st_size > MAX_FILE:
            raise BadInput(f"{path}: {path.stat().st_size} bytes are too many for a .vocab file")
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {brief(error)}") from None
    if path.suffix == ".json":
        name = path.stem
        if path.name == "tokenizer.json":
            name = path.resolve().parent.name if os.path.exists(name_or_path) else str(name_or_path)
        said = Beside.of(path.parent) if beside is True else beside or None
        return TokenizerJson(data, name, eos_token, bos_token, said)
    vocabulary = read_vocab(data, str(name_or_path) if str(name_or_path) in VOCABULARIES else path.stem, path)
    if eos_token is not None and eos_token not in (vocabulary.eos_id, str(vocabulary.eos_id)):
        raise BadInput(f"{vocabulary.name}: eos_token is for a tokenizer.json; in a .vocab file the id "
                       f"{vocabulary.eos_id} ends documents")
    if segmentation == "exact":
        return vocabulary
    return TokenizerJson(portable.tokenizer_json(vocabulary, lossless=True), f"{vocabulary.name} (portable)")


def read_vocab(data: bytes, name: str, path: Path) -> TokenMonster:
    """The tokenizer of a .vocab file. Raises BadInput if it is damaged, or is not the published file of that name."""
    sha256 = hashlib.sha256(data).hexdigest()
    if name in VOCABULARIES and VOCABULARIES[name][0] != sha256:
        raise BadInput(f"{name}: the file's sha256 is {sha256[:12]}..., the published one "
                       f"{VOCABULARIES[name][0][:12]}...; delete {path} and run this again, or download it again")
    # A renamed file is still the vocabulary that its digest says it is.
    listed = {published: (known, eos_id) for known, (published, eos_id) in VOCABULARIES.items()}
    try:
        return TokenMonster(data, *listed.get(sha256, (name, None)))
    except VocabularyError as error:
        raise BadInput(str(error)) from error


def find(name_or_path: str | Path) -> Path:
    """The file of a vocabulary.

    name_or_path    a .vocab file; a tokenizer.json file, or the folder it is in; or a name: that of vocabs/NAME.vocab
                    in this project, of one in VOCABULARIES, or OWNER/NAME for the tokenizer.json of a repository on
                    the Hugging Face hub. The latter two are downloaded, once.

    Raises BadInput if there is none.
    """
    name, path = str(name_or_path), Path(name_or_path)
    local = VOCABULARY_FOLDER / f"{name}.vocab"
    for candidate in (path / "tokenizer.json", path, local):
        if os.path.isfile(candidate):
            return candidate
    if name in VOCABULARIES:
        return download(HUB_REPOSITORY, f"vocabs/{name}.vocab", f"put it at {local}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and path.suffix not in (".vocab", ".json"):
        return download(name, "tokenizer.json", "give its path as the tokenizer")
    raise BadInput(f"{name}: no such vocabulary; give a .vocab or tokenizer.json file, or put one at "
                   f"vocabs/NAME.vocab, or choose from {', '.join(VOCABULARIES)}")
