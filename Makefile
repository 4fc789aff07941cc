# Everything runs in .venv, which the first target makes.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test torture experiments clean

demo: .venv/ready  ## train the adapters on the small world, print Table 1's columns, ask two questions
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node 2 train.py --device cpu  # two processes beat two threads
	$(BIN)/python sample.py --adapters out/adapters.safetensors
	$(BIN)/python sample.py --adapters out/adapters.safetensors --prompt "What is the opposite of hot? (A) wet (B) old (C) cold"

test: .venv/ready-dev  ## all tests, on the CPU, offline
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

experiments: .venv/ready  ## the claims of experiments/README.md, 30 to 60 minutes on 2 cores; a stopped run goes on
	for name in table2 routing mixture cost; do $(BIN)/python -m experiments.$$name || exit 1; done
	$(BIN)/python -m experiments.report

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -r requirements.txt -c constraints.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

torture: .venv/ready-dev  ## kills, mutated files, odd flags, full disks, other Pythons: 12 to 30 minutes, 6 GB of disk
	$(BIN)/python -m tests.torture

clean:  ## forget the environment, the generated data and the runs
	rm -rf .venv tiny/data out
