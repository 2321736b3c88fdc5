"""
Text to token ids and back.

    tokenizer = load("quickstart-2048")
    ids = tokenizer.encode("Hello, world!")          # (n,) uint16
    tokenizer.decode(ids)                            # "Hello, world!"

Two kinds of vocabulary stand behind one small interface, `Tokenizer`: TokenMonster's ".vocab" files, read and
searched in vocabulary.py from scratch, and "tokenizer.json" files, for which the `tokenizers` library does the work.
A ".vocab" file can also be made into the latter (portable.py).
"""
import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import portable
from vocabulary import MAX_FILE, Tokenizer, TokenMonster, VocabularyError

# The vocabularies that the Stentor models use: sha256 of the file, id of the end-of-document token.
# None of them has a special token. Cleaned text holds no "\r", so that token's id (2) is free to
# end documents; the model of english-8000 has rows to spare after its 8,000 ids and uses the first.
VOCABULARIES = {
    "quickstart-2048":
        ("49ca8bc8684277f8cac3877c988aa56f02926e00a56e9eb87b4449a440addbc1", 2),
    "english-4096-strict-nocapcode-v1":
        ("8b4270afaa2280d960efd52b0cbcb3986b7757f09cfbc6bc616ef35fc21597b6", 2),
    "english-8000-strict-nocapcode-v1":
        ("cd0f9d205c5f090374c8f556ec04958f4225868b80a20b2060e4d4dc5bbf4744", 8000),
}
HUB_REPOSITORY = "alasdairforsythe/tokenmonster"
VOCABULARY_FOLDER = Path(__file__).parent / "vocabs"
END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")


class TokenizerJson(Tokenizer):
    """A tokenizer.json file (Mistral's BPE, for example), through the `tokenizers` library."""

    def __init__(self, data, name):
        """data: the bytes of a tokenizer.json file. Raises VocabularyError where it is not one."""
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise VocabularyError(f"{name}: needs a library to read it: pip install tokenizers") from None
        try:
            self._library = Library.from_str(data.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise VocabularyError(f"{name}: not a tokenizer.json file: {_one_line(error)}") from None
        ids = self._library.get_vocab(with_added_tokens=True)
        eos = [ids[token] for token in END_OF_TEXT if token in ids]
        if not eos:
            raise VocabularyError(f"{name}: has no end-of-text token; looked for {' '.join(END_OF_TEXT)}")
        self.name, self.data, self.sha256 = name, data, hashlib.sha256(data).hexdigest()
        self.eos_id, self.vocab_size = eos[0], max(ids.values()) + 1
        self.eos_token = self._library.id_to_token(self.eos_id)
        model = self._library.model  # a byte-level or byte-fallback BPE never drops anything
        self._unknown = ids.get(getattr(model, "unk_token", None), -1)
        self._library.encode_special_tokens = True  # "</s>" in a text is text: only we end documents
        self._library.no_padding()
        self._library.no_truncation()

    def encode_counted(self, text):
        return self.encode_batch_counted([text])[0]

    def encode_batch_counted(self, texts):
        # The library takes no lone surrogates (JSON can smuggle them in): they become U+FFFD, as above.
        texts = [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
        encodings = self._library.encode_batch(texts, add_special_tokens=False)  # on threads of its own
        return [(np.array(encoding.ids, self.dtype), self._count_unknown(text, encoding))
                for text, encoding in zip(texts, encodings)]

    def _count_unknown(self, text, encoding):
        if self._unknown not in encoding.ids:
            return 0
        return sum(len(text[start:stop].encode()) for token, (start, stop)
                   in zip(encoding.ids, encoding.offsets) if token == self._unknown)

    def decode(self, ids):
        ids = [token for token in self._checked(ids) if token != self.eos_id]
        return self._library.decode(ids, skip_special_tokens=True)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def stream(self):
        return TokenizerJsonStream(self)


class TokenizerJsonStream:
    """As TokenMonsterStream. What the library's decoder makes of an id depends on those before it,
    so each push decodes all of them: fine for a page of text."""

    def __init__(self, tokenizer):
        self._tokenizer, self._ids, self._shown = tokenizer, [], 0

    def push(self, token):
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._rest(text)  # U+FFFD: an incomplete character

    def finish(self):
        return self._rest(self._tokenizer.decode(self._ids))

    def _rest(self, text):
        new, self._shown = text[self._shown:], len(text)
        return new


# -----------------------------------------------------------------------------
# finding a vocabulary

def load(name_or_path, segmentation="exact"):
    """The tokenizer for a vocabulary: see `find` for what may be given.

    segmentation    how a .vocab file's ids are found: "exact", TokenMonster's own search, or "portable", what a
                    tokenizer.json made of it does (portable.py). A tokenizer.json does what it does.

    Raises VocabularyError, one line, for a vocabulary that is missing, damaged or not supported.
    """
    path = find(name_or_path)
    try:
        if path.suffix != ".json" and path.stat().st_size > MAX_FILE:
            raise VocabularyError(f"{path}: {path.stat().st_size} bytes are too many for a .vocab file")
        data = path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path}: cannot be read: {_one_line(error)}") from None
    if path.name == "tokenizer.json":
        return TokenizerJson(data, path.resolve().parent.name if os.path.exists(name_or_path) else str(name_or_path))
    if path.suffix == ".json":
        return TokenizerJson(data, path.stem)
    vocabulary = tokenmonster(data, name_or_path if name_or_path in VOCABULARIES else path.stem)
    if segmentation == "exact":
        return vocabulary
    return TokenizerJson(portable.tokenizer_json(vocabulary, lossless=True), f"{vocabulary.name} (portable)")


def tokenmonster(data, name):
    """The tokenizer for the bytes of a .vocab file. Raises VocabularyError where they are not the file of that name."""
    sha256 = hashlib.sha256(data).hexdigest()
    if name in VOCABULARIES and VOCABULARIES[name][0] != sha256:
        raise VocabularyError(f"{name}: the file's sha256 is {sha256[:12]}..., the published one "
                              f"{VOCABULARIES[name][0][:12]}...; delete the file and download it again")
    # A renamed file is still the vocabulary that its digest says it is.
    listed = {published: (known, eos_id) for known, (published, eos_id) in VOCABULARIES.items()}
    return TokenMonster(data, *listed.get(sha256, (name, None)))


def find(name_or_path):
    """The file of a vocabulary -> Path.

    name_or_path    a .vocab file; a tokenizer.json file, or the folder it is in; or a name: that of
                    vocabs/NAME.vocab beside this file, of one in VOCABULARIES, or OWNER/NAME for the
                    tokenizer.json of a repository on the Hugging Face hub. The latter two are
                    downloaded, once.
    Raises VocabularyError where there is none.
    """
    name, path = str(name_or_path), Path(name_or_path)
    local = VOCABULARY_FOLDER / f"{name}.vocab"
    for candidate in (path / "tokenizer.json", path, local):
        if os.path.isfile(candidate):
            return candidate
    if name in VOCABULARIES:
        return _download(HUB_REPOSITORY, f"vocabs/{name}.vocab", f"put it at {local}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and path.suffix not in (".vocab", ".json"):
        return _download(name, "tokenizer.json", "give its path as the tokenizer")
    raise VocabularyError(f"{name}: no such vocabulary; give a .vocab or tokenizer.json file, or put one at "
                          f"vocabs/NAME.vocab, or choose from {', '.join(VOCABULARIES)}")


def _download(repository, file, otherwise):
    """Fetch a file from the hub -> its path in the hub's cache."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # one line says it all, not one for each attempt
    try:
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(repo_id=repository, filename=file))
    except Exception as error:  # no library, no network, no such file: the way out is the same
        raise VocabularyError(f"{file} of {repository} cannot be downloaded ({_one_line(error)}); get it from "
                              f"huggingface.co/{repository} and {otherwise}. The quickstart needs no download: "
                              f"python prepare.py") from None


def _one_line(error):
    """The first line of an exception's message, at a readable length."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


# -----------------------------------------------------------------------------
# python tokenizer.py check: against the reference

# A process of its own, so that a server that hangs can be ended.
REFERENCE = """
import json, sys, tokenmonster
vocabulary = tokenmonster.load(sys.argv[1])
print(json.dumps([vocabulary.tokenize(text).tolist() for text in json.load(sys.stdin)]))
"""


def reference_encode(path, texts, timeout=600):
    """What the `tokenmonster` package makes of non-empty texts -> list of lists of ids.

    Raises RuntimeError, one line, where the package or the server that it downloads cannot be had.
    """
    try:
        answer = subprocess.run([sys.executable, "-c", REFERENCE, str(Path(path).resolve())],
                                input=json.dumps(texts), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the tokenmonster package gave no answer in {timeout} s") from None
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError("the tokenmonster package does not run (pip install tokenmonster; it downloads "
                           f"its server at first use): {reason}")
    return json.loads(answer.stdout.splitlines()[-1])


def check(vocabulary, files):
    """Compare ids with the reference's, document by document; print each first difference.

    A document is a paragraph of a file with the blank lines after it: so a difference is small to
    look at. -> number of documents that differ. Raises VocabularyError, OSError, RuntimeError.
    """
    path, tokenizer = find(vocabulary), load(vocabulary)
    if not isinstance(tokenizer, TokenMonster):
        raise VocabularyError(f"{vocabulary}: only a .vocab file can be checked")
    places, texts = [], []
    for file in files:
        line = 1
        for text in re.split(r"(?<=\n\n)(?!\n)", Path(file).read_bytes().decode("utf-8", "replace")):
            if text:
                places.append(f"{file}:{line}")
                texts.append(text)
                line += text.count("\n")
    theirs = reference_encode(path, texts)
    ours = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    differing = 0
    for place, text, our, their in zip(places, texts, ours, theirs):
        if our != their:
            differing += 1
            at = len(os.path.commonprefix([our, their]))
            print(f"{place}: after {tokenizer.decode(our[:at])[-40:]!r}: ours {our[at:at + 5]}, "
                  f"theirs {their[at:at + 5]}")
    print(f"{tokenizer.name}: {len(texts)} documents, {sum(len(text.encode()) for text in texts)} bytes, "
          f"{sum(map(len, theirs))} ids: {differing or 'none'} differ")
    return differing


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    """-> exit status: 0 all the same, 1 some differ, 2 could not be checked."""
    parser = OneLineParser(description="Compare ids with the tokenmonster package's, paragraph by paragraph.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8")
    parser.add_argument("--vocab", default="quickstart-2048", help="name or path (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        return 1 if check(arguments.vocab, arguments.files) else 0
    except (VocabularyError, OSError, RuntimeError) as error:
        print(f"tokenizer.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
