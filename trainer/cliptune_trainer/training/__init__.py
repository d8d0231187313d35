"""A run of a job: from its folder to a finished model, or to a checkpoint from which the next run goes on.

`run` puts it together, `loop` goes from step to step; between two steps it saves, measures and obeys.
"""
