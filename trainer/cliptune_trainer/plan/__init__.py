"""What is settled before the first step: from a spec, its data and a machine to decisions with reasons.

`decide` says what is trained and how long, `planning` how a step is computed on the device; `cautions` speaks
up where a setting is known to do harm.
"""
