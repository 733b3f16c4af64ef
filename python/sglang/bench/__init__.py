"""The engine without its doors, one batch at a time; see `sglang.bench_one_batch`."""
