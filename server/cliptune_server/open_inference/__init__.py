"""The Open Inference Protocol, version 2, over both transports.

`tensors.py` knows how its tensors are laid out, `inference.py` what the models take and give. The faces are
`rpc/open_inference.py` and `gateway/open_inference.py`.
"""
