"""What every measurement uses: metrics, time and memory, bootstrap, result rows, crossovers, the style of pictures."""
