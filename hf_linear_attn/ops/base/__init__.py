"""What every mechanism uses: masks, compaction, packing, memory that grows, numbers, tracing, the choice of backend."""
