# Short names for the scripts; each works by itself too.
.PHONY: quickstart check format

quickstart: ## convert the committed model and generate text
	scripts/quickstart.sh

check: ## everything CI runs
	.ci/run

format: ## rewrite Python and C++ to the house style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs .venv/bin/clang-format -i
