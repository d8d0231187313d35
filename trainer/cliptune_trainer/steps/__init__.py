"""One optimisation step, of any batch in any memory: towers → loss → gradients → weights.

`step` is what the training calls; `accumulation` divides a batch without changing its gradient; the others
are what a step needs: precision, replayed randomness, recomputed activations, the optimizer, a guard.
"""
