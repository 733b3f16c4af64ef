"""What a model would need on given devices, from its config alone; see `sglang.plan_memory`."""
