"""Device "mps" on a machine without Metal: whole training steps run there on fake tensors.

A small C++ library answers torch's questions about the device (`guard.cpp`, built once by `library.py`);
`device.py`, loaded before torch, lets fake tensors be made on it; `watch.py` sees every operator that runs
and says which of them would fail or wait on a Mac, by torch's own list of kernels (`kernels.py`). Nothing is
computed: what this catches is tensors on the wrong device, in float64, operators that MPS lacks and hidden
readings from the device; wrong numbers it cannot see.
"""
