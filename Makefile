# GNU make. `make help` lists the targets.
CC ?= cc
CFLAGS ?= -O2
PREFIX ?= /usr/local
B = build
MAKEFLAGS += --no-print-directory

VERSION = $(shell sed -n 's/^\#define DOTOPT_VERSION "\(.*\)".*/\1/p' dotopt.h)
STB = $(shell test -e /usr/include/stb/stb_image_write.h && echo /usr/include/stb || echo third_party/stb)
EXAMPLES = $(patsubst examples/%.c,$(B)/%,$(wildcard examples/*.c))
TESTS = $(patsubst tests/%.c,$(B)/%,$(wildcard tests/test_*.c))
COMPILE = $(CC) $(CFLAGS) -std=c99 -I. -I$(STB) -o $@

sweep: data $(B)/fashion_sweep ## set up everything, then run the quick optimizer sweep on Fashion-MNIST (default)
	$(B)/fashion_sweep --preset quick

nirdot: stb $(B)/nirdot ## set up, simulate phantoms, train and evaluate NIR-DOT at its small size: 25 minutes on two cores
	@tools/fetch_data.sh font
	$(B)/nirdot all

test: data cmocka ## set up everything, then build and run all tests
	-@$(MAKE) -k -j$$(nproc 2>/dev/null || echo 2) examples $(TESTS)
	@tests/run.sh $(EXAMPLES) $(TESTS)

examples: $(EXAMPLES) ## build the examples, each with a single cc line

check-compilers: ## build with every compiler that is installed
	tests/compile.sh

bench: $(B)/bench ## build the benchmarks (build/bench --help; tools/compare: beside PyTorch)

sanitize: examples ## run the tests with the address, undefined behaviour and thread sanitizers
	$(MAKE) test B=build/asan CFLAGS='-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all'
	$(MAKE) test B=build/tsan CFLAGS='-O1 -g -fsanitize=thread'

install: ## install dotopt.h and dotopt.pc below $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/share/pkgconfig
	install -m 644 dotopt.h $(DESTDIR)$(PREFIX)/include/dotopt.h
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: dotopt' \
	    'Description: Single-header C99 library for training neural networks' \
	    'Version: $(VERSION)' 'Cflags: -I$${includedir}' 'Libs: -lm -pthread' \
	    >$(DESTDIR)$(PREFIX)/share/pkgconfig/dotopt.pc

clean: ## remove the built programs; data/ stays
	rm -rf build

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 18

compiler: ## check that there is a C compiler
	@command -v $(firstword $(CC)) >/dev/null || \
	    { echo "no C compiler '$(firstword $(CC))': install one (Debian: gcc and libc6-dev) or set CC" >&2; exit 1; }

stb: compiler ## get the stb headers, which the examples' plots need
	@tools/fetch_data.sh stb

data: stb ## get the Fashion-MNIST data and the font of the plots
	@tools/fetch_data.sh data
	@tools/fetch_data.sh font

CMOCKA_H = printf '\#include <%s>\n' stdarg.h stddef.h stdint.h setjmp.h cmocka.h | $(CC) -E - >/dev/null 2>&1
APT_INSTALL = DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends

cmocka: stb ## get cmocka, which the tests need (as root)
	@$(CMOCKA_H) || { test "$$(id -u)" = 0 && command -v apt-get && \
	    { $(APT_INSTALL) libcmocka-dev || { apt-get -qq update && $(APT_INSTALL) libcmocka-dev; }; }; } >/dev/null 2>&1; \
	$(CMOCKA_H) || { echo "cmocka.h is missing: install the package libcmocka-dev" >&2; exit 1; }

# A program that does not compile leaves no older one behind.
$(B)/%: examples/%.c dotopt.h $(wildcard examples/*.h) | stb
	@mkdir -p $(B) && rm -f $@
	$(COMPILE) $< -lm -pthread

# The tests use the interface alone, and share one build of the implementation.
$(B)/dotopt.o: dotopt.h | compiler
	@mkdir -p $(B) && rm -f $@
	printf '\043define DOTOPT_IMPLEMENTATION\n\043include "dotopt.h"\n' | $(COMPILE) -x c -c -

$(B)/test_%: tests/test_%.c $(B)/dotopt.o $(wildcard tests/*.h tests/fuzz.c examples/*.[ch]) | stb
	@mkdir -p $(B) && rm -f $@
	$(COMPILE) $< $(B)/dotopt.o -lcmocka -lm -pthread

$(B)/bench: tools/bench.c dotopt.h $(wildcard tools/bench_*.h) | compiler
	@mkdir -p $(B) && rm -f $@
	$(COMPILE) $< -lm -pthread -ldl

.PHONY: sweep nirdot test examples bench check-compilers sanitize install clean help compiler stb data cmocka
