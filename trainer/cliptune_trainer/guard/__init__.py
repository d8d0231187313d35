"""The forgetting guard: what the model still knows beside its domain, and which weights are published.

`probe` and `agreement` measure general knowledge, `start` and `mean` keep weights to go back to, `curve`
chooses between them; `guard` puts it together for the loop.
"""
