"""What layers would make a GPU do, counted without one, and what the kernels that they launch compile to."""
