# make demo    a virtual environment, the embedded data, a tiny Llama trained on it, and what it writes
# make test    the test suite
# make clean   removes what those two made

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt
RUN = .venv/bin/python

.PHONY: demo test clean

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
	$(RUN) -m pytest

.venv/run: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: Python 3.10 or newer is needed (make demo PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(PIP) --requirement requirements.txt
	touch $@

.venv/test: .venv/run requirements-test.txt
	$(PIP) --requirement requirements-test.txt
	touch $@

clean:
	rm -rf .venv data/quickstart out/quickstart
