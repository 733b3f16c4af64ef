"""Linear attention with a recurrent state: the gated delta rule over packed batches."""
