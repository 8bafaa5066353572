# make demo | make test: each sets itself up. Needs Python 3.11+ and a C++ compiler.
# Another interpreter: make PYTHON=python3.12 demo. An existing environment: make VENV=/path/to/venv demo.
# Another build of torch: make TORCH="torch==2.13.0 --index-url URL" demo
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin
DEMO ?= outputs/demo
PORT ?= 29517

export PATH := $(abspath $(RUN)):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo demo-checkpoint test test-slow faults sanitize lint clean-demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11"; exit 1; }
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(TORCH)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) clean-demo
	$(RUN)/deepspeed -q --master_port $(PORT) --num_accelerators 2 recipes/train.py --config recipes/configs/hstu_synthetic.yaml \
	    --deepspeed_config ds_configs/zero1.json --dataset_dir $(DEMO)/dataset --output_dir $(DEMO) --use_cpu
	$(RUN)/python recipes/recommend.py --model $(DEMO)/export --expect $(DEMO)/recommendations.json

# The small model that comes with the package (models/demo/): trained anew, one rank, one thread, rows in bfloat16.
demo-checkpoint: export OMP_NUM_THREADS = 1
demo-checkpoint: $(STAMP) clean-demo
	$(RUN)/python recipes/train.py --config hstu_synthetic --dataset_dir $(DEMO)/dataset --output_dir $(DEMO) --use_cpu --save_total_limit 1
	rm -rf models/demo/export
	$(RUN)/python recipes/export.py --checkpoint $(DEMO)/checkpoint-* --row_dtype bfloat16 --license apache-2.0 --output_dir models/demo/export

clean-demo:
	rm -rf $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -m "not slow"

test-slow: $(STAMP)
	$(RUN)/python -m pytest -q -m slow --ignore tests/faults --ignore tests/distributed/test_elastic.py

# Crashes at every file operation, SIGKILLs of training, random damages, all layouts: about half an hour on two cores.
# Another seed of the damages: make GRZOO_FAULTS_SEED=7 faults
faults: $(STAMP)
	GRZOO_FAULTS_RESULTS=$(abspath recipes/benchmark/results/faults.csv) OMP_NUM_THREADS=1 \
	    $(RUN)/python -m pytest -q -m slow tests/faults tests/distributed/test_elastic.py

# Fuzzes the C++ of the tables under AddressSanitizer and ThreadSanitizer.
sanitize: $(STAMP)
	$(RUN)/python tests/embeddings/host_sanitizers/run.py

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/mypy
