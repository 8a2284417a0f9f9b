"""Several processes that train one run: ranks, exchange of values, detection of failures, layout of the model.

A single process uses the same interfaces with trivial implementations. Only modules that are needed for several
processes import ``torch.distributed``, and they are imported only once there are several.
"""
