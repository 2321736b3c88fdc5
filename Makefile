# make demo    a virtual environment, the embedded data, a tiny Llama trained on it, and what it writes
# make test    the test suite
# make lint    ruff, by the rules in pyproject.toml
# make web     the web demo, on http://127.0.0.1:7860, in a virtual environment of its own
# make test-web      its tests, every tab in a headless Chromium
# make compat  the tests of exports with transformers 4.46 and llama.cpp, in a virtual environment of their own
# make tpu-test      the same train.py on torch_xla's CPU client, in a virtual environment of its own (7 GB)
# make tpu-compile   the real Stentor3 steps, compiled for a TPU v5e-8 by its own compiler, without a TPU
# make clean   removes what those made

PYTHON ?= python3
RUN = .venv/bin/python
# Installs an extra of pyproject.toml with the pinned versions, but for those that the extra wants otherwise:
# $(call install,ENVIRONMENT,EXTRA,PACKAGES WITHOUT A PIN)
define install
	grep -Ev '^($(if $(3),$(3),none))==' constraints.txt > $(1)/constraints.txt
	$(1)/bin/python -m pip install --disable-pip-version-check --constraint $(1)/constraints.txt $(2)
endef

.PHONY: demo test lint web test-web compat tpu-test tpu-compile clean

demo: .venv/run
	$(RUN) prepare.py
	$(RUN) train.py --resume
	@echo; echo "--- Python"
	@$(RUN) sample.py --checkpoint out/quickstart --prompt "def read(" --max_new_tokens 120 --temperature 0.7 --seed 3
	@echo; echo "--- documentation"
	@$(RUN) sample.py --checkpoint out/quickstart --prompt "This function" --max_new_tokens 80 --temperature 0.7 --seed 3
	@echo; echo "--- sums that no training document holds"
	@$(RUN) sample.py --checkpoint out/quickstart --quiz data/quickstart/math_quiz.jsonl

test: .venv/test
	$(RUN) -m pytest -m "not browser" --numprocesses 2 --dist loadfile

lint: .venv/test
	$(RUN) -m ruff check

web: .venv-web/run
	.venv-web/bin/python demo.py

test-web: .venv-web/test
	@command -v chromium > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update --quiet=2 \
			&& DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends --yes chromium; } \
		|| { echo "test-web drives a Chromium and there is none: apt-get install chromium" >&2; exit 1; }
	.venv-web/bin/python -m pytest tests/web tests/test_demo.py

compat: .venv-compat/test
	.venv-compat/bin/python -m pytest tests/test_export.py tests/formats tests/tokenizer/test_for_transformers.py

tpu-test: .venv-tpu/test
	PJRT_DEVICE=CPU .venv-tpu/bin/python -m pytest tests/test_xla.py

tpu-compile: .venv-tpu/compile
	.venv-tpu/bin/python prepare.py
	.venv-tpu/bin/python -m tests.compile_for_tpu

.venv/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: Python 3.10 or newer is needed (make demo PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(call install,.venv,.)
	touch $@

.venv/test: .venv/run
	$(call install,.venv,".[test]")
	touch $@

# gradio wants an older pillow than the tests have.
.venv-web/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-web
	$(call install,.venv-web,".[web]",pillow)
	touch $@

.venv-web/test: .venv-web/run
	$(call install,.venv-web,".[test-web]",pillow)
	touch $@

.venv-compat/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-compat
	$(call install,.venv-compat,".[compat]",transformers|tokenizers|huggingface_hub|datasets|fsspec|dill|multiprocess)
	touch $@

.venv-tpu/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	$(call install,.venv-tpu,".[tpu]",torch)
	touch $@

# libtpu alone, without what it depends on: the compiler needs none of it.
.venv-tpu/compile: .venv-tpu/test
	.venv-tpu/bin/python -m pip install --disable-pip-version-check jax==0.7.1 jaxlib==0.7.1
	.venv-tpu/bin/python -m pip install --disable-pip-version-check --no-deps libtpu==0.0.21
	touch $@

clean:
	rm -rf .venv .venv-web .venv-compat .venv-tpu data/quickstart out/quickstart
