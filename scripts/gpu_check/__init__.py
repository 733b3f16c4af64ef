"""What is true on a GPU, in one command: `scripts/gpu_check.sh`. See docs/gpu.md, gpu_check."""
