"""The sampler: a process that looks into one uploaded data set and ends.

Whatever strangers uploaded is parsed and decoded here, apart from the daemon and from the engine that serves
requests: a decoder that crashes, hangs or eats memory costs this process alone.
"""
