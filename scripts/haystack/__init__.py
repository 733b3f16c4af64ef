"""What scripts/needle.py is made of: a checkpoint that finds needles, prompts, clients, reports."""
