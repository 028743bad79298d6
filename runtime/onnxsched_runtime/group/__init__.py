"""A process group of torch.distributed: what ranks send each other, and who is still alive.

Nothing else touches torch.distributed.
"""

from onnxsched_runtime.group.binding import (
    heard_by_others,
    joined_process_group,
    leave_process_group,
    require_timeout,
)
from onnxsched_runtime.group.links import GlooLinks, NcclLinks
from onnxsched_runtime.group.monitor import Monitor
from onnxsched_runtime.group.peers import Peers

__all__ = [
    "GlooLinks",
    "Monitor",
    "NcclLinks",
    "Peers",
    "heard_by_others",
    "joined_process_group",
    "leave_process_group",
    "require_timeout",
]
