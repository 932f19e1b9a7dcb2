"""The project's kernels in other libraries."""
