"""The kernels in other libraries."""
