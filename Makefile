# Everything from a fresh clone on Debian 12 or Ubuntu 24.04. Each target does its own set-up first,
# says what it installs, and may be repeated; what is already there is left alone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
FUZZ_PACKETS ?= 2000000
FUZZ_FILTERS ?= 20000
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
BIN := .venv/bin
# Tests start some thousand commands, half of whose time is compiling where Python may not keep what it has compiled.
export PYTHONDONTWRITEBYTECODE :=

# libbpf-dev brings libbpf, tcpdump brings libpcap (whose own package has another name on Ubuntu),
# linux-libc-dev the kernel's headers for user space. BCC, python3-bpfcc, wants those of a kernel, of any version.
# groff-base and mandoc check the man pages.
KERNEL_HEADERS := linux-headers-$(if $(shell grep -x ID=ubuntu /etc/os-release),generic,$(shell dpkg --print-architecture))
# The web page is tested in it. Ubuntu's package is a snap, which enters no network namespace: playwright has its own there.
CHROMIUM := $(if $(shell grep -x ID=ubuntu /etc/os-release),,chromium)
PACKAGES := clang curl ethtool groff-base haproxy iproute2 libbpf-dev libfaketime linux-libc-dev llvm make mandoc nftables \
	nginx python3-bpfcc python3-venv systemd tcpdump $(KERNEL_HEADERS) $(CHROMIUM)

.PHONY: help setup system apt-install build lint test durations demo bench fuzz scale soak attack test-kernels man wheel clean

help: ## list the targets
	@sed -En 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: system .venv/.test $(if $(CHROMIUM),,.venv/.chromium) ## install what is missing: apt packages, and Python packages into .venv

system:
	@command -v apt-get >/dev/null || {
		echo "no apt here, nothing installed; needed, by their Debian names: $(PACKAGES)"
		exit 0
	}
	missing=()
	for package in $(PACKAGES); do
		status=$$(dpkg-query --show --showformat '$${Status}' "$$package" 2>/dev/null || true)
		[[ $$status == *" ok installed" ]] || missing+=("$$package")
	done
	[[ $${#missing[@]} = 0 ]] || $(SUDO) $(MAKE) --no-print-directory apt-install MISSING="$${missing[*]}"

# As root. Debian starts a service as it installs it and again at each boot; nginx and haproxy are wanted
# here only as programs, so policy-rc.d forbids the first and update-rc.d undoes the second. Ubuntu's
# needrestart would restart services that have nothing to do with this.
apt-install: export DEBIAN_FRONTEND := noninteractive
apt-install: export NEEDRESTART_SUSPEND := 1
apt-install:
	@echo "installing with apt: $(MISSING)"
	policy=/usr/sbin/policy-rc.d
	if [[ ! -e $$policy ]]; then
		trap 'rm -f "$$policy"' EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\nexit 101\n' >"$$policy"
		chmod 755 "$$policy"
	fi
	apt-get update -qq </dev/null
	apt-get install --yes -qq --no-install-recommends $(MISSING) </dev/null
	[[ " $(MISSING) " != *" nginx "* ]] || update-rc.d nginx disable
	[[ " $(MISSING) " != *" haproxy "* ]] || update-rc.d haproxy disable

# .venv/.test: the extra of that name is installed as pyproject.toml asks for it.
.venv/.%: pyproject.toml | system
	@echo "installing with pip into .venv: xdp-lb[$*] and what it requires"
	[[ -x $(BIN)/pip ]] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

.venv/.chromium: .venv/.test
	@echo "installing with playwright: chromium"
	$(SUDO) $(BIN)/playwright install --with-deps --only-shell chromium
	touch $@

# The programs of benchmarks and tests are built by the same rule, but not in xdp/, so the wheel does not have them.
build: system ## compile the BPF programs, lb/hashing/native and filters/native
	@$(MAKE) --no-print-directory -C xdp all $(patsubst %.c,../%.o,$(wildcard bench/*.bpf.c netns_tests/*/*.bpf.c))
	@$(MAKE) --no-print-directory -C lb/hashing/native
	@$(MAKE) --no-print-directory -C filters/native

lint: setup ## ruff and mypy
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: setup build lint ## lint, then every test (as root: they make network namespaces)
	ulimit -S -n 1024 && $(SUDO) $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

durations: setup build ## run every test and record how long each file takes, by which `make test` orders them
	report=$$(mktemp)
	trap 'rm -f "$$report"' EXIT
	$(SUDO) $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --junitxml="$$report"
	$(BIN)/python -m netns_tests.durations "$$report"

demo: setup build ## a test bed, real traffic through the balancer, a backend added and one drained
	$(SUDO) $(BIN)/python -m netns_tests.demo

bench: setup build ## every benchmark; a single one: .venv/bin/python -m bench NAME
	@for name in dataplane live ring control filter capture; do
		echo "python -m bench $$name"
		$(SUDO) $(BIN)/python -m bench $$name
	done

fuzz: setup build ## the program against its model and its promise (FUZZ_PACKETS packets), filters against classic BPF
	$(SUDO) env FUZZ_PACKETS=$(FUZZ_PACKETS) $(BIN)/python -m pytest netns_tests/program/test_differential.py netns_tests/program/test_promise.py
	$(SUDO) env FUZZ_FILTERS=$(FUZZ_FILTERS) $(BIN)/python -m pytest filters/tests

scale: setup build ## a million connections through fifty changes: none may leave its backend
	$(SUDO) env SCALE_CONNECTIONS=1000000 SCALE_CHANGES=50 $(BIN)/python -m pytest netns_tests/traffic/test_scale.py

soak: setup build ## the daemon under load: killed 20 times, upgraded five times, 200 changes: no request may fail
	$(SUDO) env SOAK_DEATHS=20 $(BIN)/python -m pytest netns_tests/daemon/test_upgrade.py

# 5 minutes at most; `make test` has a small one of each kind.
attack: setup build ## the daemon under floods, rebound names and patterns, short of descriptors
	$(SUDO) env ATTACK=full timeout --kill-after=10 300 $(BIN)/python -m pytest netns_tests/attack

# Debian's own kernels: 6.1 is bookworm's, 6.12 is trixie's. They are emulated, by qemu.
test-kernels: PACKAGES += busybox-static debian-archive-keyring file kmod \
	$(if $(filter x86_64,$(shell uname -m)),qemu-system-x86,qemu-system-arm)
test-kernels: setup build .kernels/bookworm .kernels/trixie .kernels/venv ## the dataplane on Linux 6.1 and 6.12 beside this one
	$(SUDO) $(BIN)/python -m netns_tests.kernels

# Unpacked, not installed. To apt the folder is another machine, whose only source is the release, on a mirror of Debian
# that this machine uses.
.kernels/%: | system
	@mirror=$$(apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' | grep --max-count=1 '/debian/$$') || {
		echo "no mirror of Debian in the sources of apt, to get the kernel of $* from"
		exit 1
	}
	echo "unpacking the kernel of Debian $* into $@"
	new=$(CURDIR)/$@.new
	trap 'rm -rf "$$new"' EXIT
	mkdir -p "$$new"/apt/{lists,cache/archives}/partial
	cd "$$new"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $$mirror $* main" >apt/sources.list
	options=(-o Dir::Etc::sourcelist="$$new/apt/sources.list" -o Dir::Etc::sourceparts=-)
	options+=(-o Dir::State::lists="$$new/apt/lists" -o Dir::Cache="$$new/apt/cache" -o APT::Sandbox::User=root)
	apt-get "$${options[@]}" update -qq
	image=$$(apt-cache "$${options[@]}" depends linux-image-$$(dpkg --print-architecture) | sed -n 's/.*Depends: //p')
	apt-get "$${options[@]}" download -qq "$$image"
	dpkg-deb --extract "$$image"_*.deb .
	rm -r apt *.deb
	mv "$$new" $(CURDIR)/$@

.kernels/venv: | system
	@echo "installing with pip into $@: virtme-ng"
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check virtme-ng || { rm -rf $@; exit 1; }

man: setup ## the man pages, into man/: MANPATH=man: man xdp-lb
	@$(BIN)/python docs/man/make_pages.py man

wheel: setup ## dist/xdp_lb-*.whl, with the compiled programs and the man pages in it
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove what was built and set up (apt packages stay)
	@$(MAKE) --no-print-directory -C xdp clean
	@$(MAKE) --no-print-directory -C lb/hashing/native clean
	@$(MAKE) --no-print-directory -C filters/native clean
	rm -f bench/*.bpf.o netns_tests/*/*.bpf.o
	$(SUDO) rm -rf .cache .venv .kernels build dist man .hypothesis .mypy_cache .pytest_cache .ruff_cache
	$(SUDO) find . -name __pycache__ -type d -prune -exec rm -rf {} +
