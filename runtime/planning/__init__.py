"""What a machine would do with a model: memory on each GPU and the host, expert groups, expected speed."""

from krasis.runtime.planning.hardware import Figure, GpuSpec, HardwareSpec, describe_gpu, describe_host
from krasis.runtime.planning.planner import make_plan, make_workload
from krasis.runtime.planning.sizes import ModelSizes, count_parameters, sizes_of_bundle, sizes_of_shape
from krasis.runtime.planning.types import GpuPlacement, HostPlacement, Plan, Workload

__all__ = [
    "Figure",
    "GpuPlacement",
    "GpuSpec",
    "HardwareSpec",
    "HostPlacement",
    "ModelSizes",
    "Plan",
    "Workload",
    "count_parameters",
    "describe_gpu",
    "describe_host",
    "make_plan",
    "make_workload",
    "sizes_of_bundle",
    "sizes_of_shape",
]
