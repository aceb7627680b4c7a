"""The report of runs: what run folders have recorded, as one HTML page without network, or as a table. No torch."""
