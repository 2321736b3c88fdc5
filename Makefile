# make demo    a virtual environment, the embedded data, a tiny Llama trained on it, and what it writes
# make test    the test suite
# make web     the web demo, on http://127.0.0.1:7860, in a virtual environment of its own
# make test-web      its tests, every tab in a headless Chromium
# make compat  the tests of exports with transformers 4.46 and llama.cpp, in a virtual environment of their own
# make tpu-test      the same train.py on torch_xla's CPU client, in a virtual environment of its own (7 GB)
# make tpu-compile   the real Stentor3 steps, compiled for a TPU v5e-8 by its own compiler, without a TPU
# make clean   removes what those made

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt
RUN = .venv/bin/python
WEB_PIP = .venv-web/bin/python -m pip install --disable-pip-version-check --constraint .venv-web/constraints.txt
TPU_PIP = .venv-tpu/bin/python -m pip install --disable-pip-version-check

.PHONY: demo test web test-web compat tpu-test tpu-compile clean

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

web: .venv-web/run
	.venv-web/bin/python demo.py

test-web: .venv-web/test
	@command -v chromium > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update --quiet=2 \
			&& DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends --yes chromium; } \
		|| { echo "test-web drives a Chromium and there is none: apt-get install chromium" >&2; exit 1; }
	.venv-web/bin/python -m pytest tests/test_demo.py tests/test_web.py

compat: .venv-compat/test
	.venv-compat/bin/python -m pytest tests/test_export.py tests/test_gguf.py

tpu-test: .venv-tpu/test
	PJRT_DEVICE=CPU .venv-tpu/bin/python -m pytest tests/test_xla.py

tpu-compile: .venv-tpu/compile
	.venv-tpu/bin/python prepare.py
	.venv-tpu/bin/python -m tests.compile_for_tpu

.venv/run: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: Python 3.10 or newer is needed (make demo PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(PIP) --requirement requirements.txt
	touch $@

.venv/test: .venv/run requirements-test.txt requirements-export.txt
	$(PIP) --requirement requirements-test.txt
	touch $@

# gradio wants an older pillow than the tests have.
.venv-web/run: requirements.txt requirements-demo.txt constraints.txt
	$(PYTHON) -m venv .venv-web
	grep -v '^pillow==' constraints.txt > .venv-web/constraints.txt
	$(WEB_PIP) --requirement requirements-demo.txt
	touch $@

.venv-web/test: .venv-web/run
	$(WEB_PIP) pytest playwright transformers
	touch $@

.venv-compat/test: requirements.txt requirements-compat.txt constraints.txt
	$(PYTHON) -m venv .venv-compat
	grep -Ev '^(transformers|tokenizers|huggingface_hub|datasets|fsspec|dill|multiprocess)==' constraints.txt > .venv-compat/constraints.txt
	.venv-compat/bin/python -m pip install --disable-pip-version-check --constraint .venv-compat/constraints.txt \
		--requirement requirements-compat.txt
	touch $@

.venv-tpu/test: requirements.txt requirements-tpu.txt constraints.txt
	$(PYTHON) -m venv .venv-tpu
	grep -v '^torch==' constraints.txt > .venv-tpu/constraints.txt
	$(TPU_PIP) --constraint .venv-tpu/constraints.txt --requirement requirements-tpu.txt
	touch $@

# libtpu alone, without what it depends on: the compiler needs none of it.
.venv-tpu/compile: .venv-tpu/test
	$(TPU_PIP) jax==0.7.1 jaxlib==0.7.1
	$(TPU_PIP) --no-deps libtpu==0.0.21
	touch $@

clean:
	rm -rf .venv .venv-web .venv-compat .venv-tpu data/quickstart out/quickstart
