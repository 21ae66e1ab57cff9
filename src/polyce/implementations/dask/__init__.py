"""dask: few tasks for each block of the logits, which run the best path of the chunk's library."""
