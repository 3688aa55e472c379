"""The ops as a kernel of the Hub, which Hugging Face's `kernels` library loads without this package."""
