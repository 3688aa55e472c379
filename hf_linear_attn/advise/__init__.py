"""Which variant pays on this machine, at which length."""
