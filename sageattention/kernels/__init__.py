"""The CUDA kernels: the table that build, planner and launches read (standard library only), and the images it gives."""
