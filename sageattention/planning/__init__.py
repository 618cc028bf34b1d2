"""What is asked, and what will run it: no tensor is touched, no CUDA."""
