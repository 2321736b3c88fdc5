"""notebooks/quickstart.ipynb runs from top to bottom, as on Kaggle, in a folder of its own and on tiny settings."""
import json

import nbclient
import nbformat
import pytest

from tests.commands import ROOT

PATH = ROOT / "notebooks" / "quickstart.ipynb"
WORKPLACES = ("data", "out", "exports", "wandb", "notebooks", "tests")  # made afresh, or not needed
TINY = ("--max_steps 3 --block_size 32 --tokens_per_step 128 --micro_batch_size 4 --eval_blocks 1 "
        "--model.hidden_size 32 --model.num_attention_heads 2 --model.intermediate_size 64 --backend cpu --dtype fp32")


@pytest.fixture(scope="module")
def notebook(quickstart_data, tmp_path_factory):
    """The notebook with its outputs. The project is linked into an empty folder, whose data is already prepared."""
    folder = tmp_path_factory.mktemp("notebook")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in WORKPLACES:
            (folder / path.name).symlink_to(path)
    (folder / "data").symlink_to(quickstart_data.parent)
    (folder / "notebooks").mkdir()
    settings = {"TRAIN_MINUTES": "1", "TRAIN_OPTIONS": TINY, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    homes = {name: str(folder / "home") for name in ("HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    content = nbformat.read(PATH, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**settings, **homes}.items():
            patch.setenv(name, value)
        nbclient.NotebookClient(content, timeout=300, kernel_name="python3",
                                resources={"metadata": {"path": str(folder / "notebooks")}}).execute()
    return content


def printed(notebook, source):
    """What the one cell whose source has this in it has printed."""
    [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_no_cell_failed(notebook):
    """A command that fails does not fail its cell: so what each has printed is looked at, too."""
    for cell in notebook.cells:
        assert not any(output.output_type == "error" for output in cell.get("outputs", [])), cell
    assert printed(notebook, "missing := ") == ""
    assert "is complete" in printed(notebook, "prepare.py")
    assert "trained 3 steps" in printed(notebook, "train.py --name")
    text = printed(notebook, "sample.py")
    assert text.count("def read(") == 2 and "tokens/s" in text, text


def test_the_curves_are_shown(notebook):
    images = [output for cell in notebook.cells for output in cell.get("outputs", [])
              if "image/png" in output.get("data", {})]
    assert len(images) == 1 and len(images[0].data["image/png"]) > 5000


def test_the_likeliest_tokens(notebook):
    """Five of them, in falling order."""
    prompt, *lines = printed(notebook, "topk(5)").splitlines()
    shares = [float(line.split("%")[0].split()[-1]) for line in lines]
    assert prompt == "What is 3 + 4? It is" and len(shares) == 5 and shares == sorted(shares, reverse=True)


def test_transformers_agrees(notebook):
    assert "whose logits differ by" in printed(notebook, "export.py")
    assert "the same token ids, and the same logits" in printed(notebook, "AutoModelForCausalLM")


def test_it_is_committed_clean():
    """Without outputs, which would be one machine's, and would show up in every diff."""
    content = json.loads(PATH.read_text(encoding="utf-8"))
    nbformat.validate(content)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert PATH.read_text(encoding="utf-8") == json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def test_links_lead_somewhere():
    text = "".join(line for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] for line in cell["source"])
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    assert targets and all((PATH.parent / target).exists() for target in targets), targets
