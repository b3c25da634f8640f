//! Benchmarks live beside this file; `scripts/bench.sh` runs them.
