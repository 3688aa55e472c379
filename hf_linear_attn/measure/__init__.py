"""What every measurement uses: methods, metrics, time and memory, bootstrap, rows, crossovers, the style of figures."""
