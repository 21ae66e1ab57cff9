"""Classes over torch's processes: each holds a shard of every row, and they exchange row states."""
